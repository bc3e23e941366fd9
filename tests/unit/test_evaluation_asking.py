"""Questions with options: orders, log-probabilities, sampling, and what can be read."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from culturepark.errors import EndpointError
from culturepark.evaluation.asking import Answer, Asker, Method, Question, orders_of, read_choice
from culturepark.models.errors import ModelError
from culturepark.ports import Prompt
from culturepark.prompts.training_rows import marks_of
from tests.builders import FakeChat
from tests.evaluation_models import OptionsModel, always, at_place, evenly

AGREE = ("agree a lot", "agree", "disagree", "disagree a lot")
QUESTION = Question("q1", "You are a person.", "Is tea better than coffee?", AGREE)


def ask(model: object, draws: int = 4, method: Method | None = None, question: Question = QUESTION) -> Answer:
    asker = Asker(model, method=method)  # type: ignore[arg-type]
    return asyncio.run(asker.ask(question, draws))


def test_cultures_are_asked_one_after_the_other_and_answered_in_the_order_given() -> None:
    """A server with an adapter a culture batches only what is for the same one."""
    names = ["korean/1", "arabic/1", "korean/2", "arabic/2", "turkish/1"]
    kinds = dict(zip(names, (*AGREE, "agree"), strict=True))
    asked: list[str] = []

    class Culture(OptionsModel):
        async def complete(self, prompt: Any, sampling: Any, *, affinity: str, schema: Any = None) -> Any:
            asked.append(affinity.partition("/")[0])
            self._shares = always(lambda option: option == kinds[affinity])
            return await super().complete(prompt, sampling, affinity=affinity, schema=schema)

    questions = [Question(name, "", "Is tea better?", AGREE) for name in names]
    answers = asyncio.run(Asker(Culture(evenly), method="logprobs").ask_balanced(questions))
    assert [answer.modes for answer in answers] == [(0,), (1,), (2,), (3,), (1,)]
    assert [culture for culture, _ in itertools.groupby(asked)] == ["arabic", "korean", "turkish"]


@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 9))
def test_every_option_stands_in_every_place_equally_often(n: int, draws: int, seed: int) -> None:
    orders = orders_of(n, draws, random.Random(seed))
    assert len(orders) == draws
    assert all(sorted(order) == list(range(n)) for order in orders)
    for place in range(n):
        counts = [[order[place] for order in orders].count(one) for one in range(n)]
        assert max(counts) - min(counts) <= 1 + (draws % n > 0)
        whole = [order[place] for order in orders[: draws // n * n]]
        assert all(whole.count(one) == draws // n for one in range(n))


@pytest.mark.parametrize("logprobs", [True, False])
def test_what_is_chosen_is_mapped_back(logprobs: bool) -> None:
    answer = ask(OptionsModel(always(lambda option: option == "disagree"), logprobs=logprobs))
    assert answer.shares == (0, 0, 1, 0)
    assert answer.modes == (2,)
    assert (answer.draws, answer.invalid) == (4, 0)
    assert answer.method == ("logprobs" if logprobs else "sampling")


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_model_that_looks_at_places_alone_has_no_opinion(logprobs: bool) -> None:
    assert ask(OptionsModel(at_place(0), logprobs=logprobs), draws=8).shares == (0.25,) * 4


def test_options_that_differ_by_rounding_are_tied() -> None:
    assert Answer((0.5, 0.5), 2, 0.0, "logprobs").modes == (0, 1)
    assert Answer((0.49999999999, 0.50000000001), 2, 0.0, "logprobs").modes == (0, 1)
    assert Answer((0.4999999, 0.5000001), 2, 0.0, "logprobs").modes == (1,)
    assert Answer((0.4, 0.2, 0.4), 3, 0.0, "logprobs").modes == (0, 2)


def test_a_distribution_comes_through() -> None:
    def shares(text: str, options: list[str]) -> list[float]:
        return [(0.1, 0.2, 0.3, 0.4)[AGREE.index(option)] for option in options]

    assert ask(OptionsModel(shares)).shares == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert ask(OptionsModel(shares, logprobs=False), draws=40).shares == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_probability_of_other_words_is_invalid() -> None:
    answer = ask(OptionsModel(lambda text, options: [0.1 * (o == "agree") for o in options]))
    assert answer.shares == (0, 1, 0, 0)
    assert answer.invalid == pytest.approx(0.9)


def test_unreadable_replies_are_missing_and_counted() -> None:
    model = OptionsModel(always(lambda option: True), logprobs=False, words="I would rather not say")
    assert ask(model) == Answer(None, 4, 1.0, "sampling")
    silent = OptionsModel(always(lambda option: True), logprobs=False, words="")
    assert ask(silent).modes == ()
    refusing = FakeChat(lambda prompt, schema: ModelError("refused", "not me"))
    assert ask(refusing, method="sampling").invalid == 1


def test_an_endpoint_that_gives_out_is_no_figure() -> None:
    broken = FakeChat(lambda prompt, schema: ModelError("server", "HTTP 500"))
    with pytest.raises(EndpointError, match="HTTP 500"):
        ask(broken)


def test_an_endpoint_that_refuses_log_probabilities_is_sampled() -> None:
    model = FakeChat(lambda prompt, schema: "2")

    async def complete(prompt: Prompt, sampling: object, **rest: object) -> object:
        if getattr(sampling, "top_logprobs", 0):
            raise ModelError("bad_request", "logprobs are not supported")
        return await FakeChat.complete(model, prompt, sampling, **rest)  # type: ignore[arg-type]

    model.complete = complete  # type: ignore[assignment,method-assign]
    assert ask(model).method == "sampling"


def test_a_prompt_that_is_forbidden_is_no_answer_once_others_are_given() -> None:
    forbidden = ModelError("forbidden", "moderation")
    asked = 0

    async def complete(prompt: object, sampling: object, **rest: object) -> object:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise forbidden
        return await OptionsModel.complete(model, prompt, sampling, **rest)  # type: ignore[arg-type]

    model = OptionsModel(always(lambda option: True))
    model.complete = complete  # type: ignore[assignment,method-assign]
    assert ask(model, draws=4).invalid == pytest.approx(0.25)
    asked = 1
    with pytest.raises(EndpointError, match="forbidden"):
        ask(model, draws=4)


def test_more_options_than_digits_are_sampled() -> None:
    many = Question("q2", "", "Which?", tuple(f"the {word}" for word in "abcdefghijkl"))
    answer = ask(OptionsModel(always(lambda option: option == "the k")), draws=3, question=many)
    assert answer.method == "sampling"
    assert answer.modes == (10,)


def test_ten_options_are_single_digits() -> None:
    assert marks_of(10) == list("0123456789")
    assert marks_of(11)[-1] == "11"


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("2", 1),
        (" 2.\nBecause I say so, in 3 ways", 1),
        ("**3**", 2),
        ("Answer: 4", 3),
        ("My answer is option 1.", 0),
        ("2. agree", 1),
        ("agree", 1),
        ("Disagree a lot.", 3),
        ("1. agree a lot, since tea calms", 0),
        ("2. agree a lot", None),  # the words of another option
        ("1. disagree", None),
        ("1 or 2", None),
        ("5", None),
        ("10", None),
        ("1.5", None),
        ("2nd", None),
        ("20%", None),
        ("I agree", None),
        ("In 2 of 3 cases", None),
        ("", None),
    ],
)
def test_replies_are_read_strictly(reply: str, place: int | None) -> None:
    assert read_choice(reply, AGREE) == place


@given(st.text(max_size=40))
def test_no_reply_breaks_the_reader(reply: str) -> None:
    assert read_choice(reply, AGREE) in (None, 0, 1, 2, 3)
