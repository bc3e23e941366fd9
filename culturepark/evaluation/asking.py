"""How a model under test is asked a multiple-choice question, and how strictly its reply is read.

Models favour places: the first option, or the last (position bias). So options come in another order at each
draw, and what is chosen is mapped back. Over as many draws as there are options each stands in each place
once (counterbalancing).

Where the endpoint reports log-probabilities, one draw gives a whole distribution: that of the reply's
first token over the options' marks. Elsewhere a draw is one sampled reply. What cannot be read is
invalid: it is counted, and is no answer to anything.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct, field

from culturepark.errors import EndpointError
from culturepark.evaluation.statistics import Floats
from culturepark.models.errors import ModelError
from culturepark.ports import ChatModel, Completion, Prompt, Sampling
from culturepark.prompts.training_rows import MOST_ONE_DIGIT, choice_of, marks_of

Method = Literal["logprobs", "sampling"]

ASKING_VERSION = 1
"""The version of how questions are worded and ordered and replies are read. It goes up with a change of
these, and cached answers of an earlier version are not used."""
_TOP_LOGPROBS = 20
"""The alternatives asked for at a token: as many as OpenAI's API reports at most."""
_BY_LOGPROBS = Sampling(temperature=0.0, max_tokens=2, top_logprobs=_TOP_LOGPROBS)
_BY_SAMPLING = Sampling(temperature=1.0, max_tokens=16)
_MIN_SAMPLED_DRAWS = 30
"""The number of sampled replies that make a distribution, rounded up to whole rounds of orders."""
_TIE_TOLERANCE = 1e-9
"""Shares that differ by less than this are tied: they differ by rounding alone."""
_LEAD_IN = r"^[^\w]*(?:(?:my|the)\s+)?(?:(?:answer|option|choice|number)\b[^\w]*(?:is\b[^\w]*)?)*"
_MARKED = re.compile(_LEAD_IN + r"(\d{1,2})(?![\w%]|[.,]\d)(.*)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,])\d{1,2}(?![\w%]|[.,]\d)")


class Question(Struct, frozen=True):
    """A question and its options, in the order in which shares are given. `system` may be empty.

    `order_key` seeds the orders of the options, or `id` if it is empty: questions that share it are asked in
    the same orders. `affinity`, or `id` if it is empty, chooses the replica: questions that share it go to
    the same one, whose prefix cache holds their beginning. `id` and `affinity` begin with the culture, where
    there is one, and a slash.
    """

    id: str
    system: str
    text: str
    options: tuple[str, ...]
    # Keys of cached answers are hashes of the encoded question, so the encoded names stay.
    order_key: str = field(default="", name="drawn_by")
    affinity: str = field(default="", name="begins_as")

    @property
    def routing_key(self) -> str:
        """The affinity of its calls."""
        return self.affinity or self.id


class Answer(Struct, frozen=True):
    """A model's answer to a question.

    `shares` runs beside the options and sums to 1; it is None when no draw could be read. `invalid` is
    the part of the draws that could not be read: of a sampled one all, of one by log-probabilities the
    probability of first words that mark no option.
    """

    shares: tuple[float, ...] | None
    draws: int
    invalid: float
    method: Method

    @property
    def modes(self) -> tuple[int, ...]:
        """Places of the likeliest option and of those tied with it; none if nothing could be read."""
        return tuple(place for place, credit in enumerate(self.credit or ()) if credit)

    @property
    def credit(self) -> tuple[float, ...] | None:
        """1 for the likeliest option, split evenly among tied ones; None if nothing could be read."""
        if self.shares is None:
            return None
        best = [share >= max(self.shares) - _TIE_TOLERANCE for share in self.shares]
        return tuple(is_best / sum(best) for is_best in best)


class Counts(Struct, frozen=True):
    """How much was asked: answers that could be read, draws, and the part of the draws that could not be read
    (invalid rate)."""

    n: int
    draws: int
    invalid_rate: float


def counts_of(answers: Sequence[Answer]) -> Counts:
    """The counts of these answers, for a measurement over them."""
    draws = sum(answer.draws for answer in answers)
    invalid = sum(answer.invalid * answer.draws for answer in answers)
    n = sum(answer.shares is not None for answer in answers)
    return Counts(n, draws, invalid / draws if draws else 0.0)


class AnswerStore(Protocol):
    """Answers of an earlier, interrupted evaluation, so that no question is asked twice (cache)."""

    def get(self, question: Question, draws: int, method: Method) -> Answer | None:
        """The answer to this question, asked with so many draws and by this method; None if there is none."""
        ...

    def add(self, question: Question, answer: Answer) -> None:
        """Store an answer."""
        ...


class Asker:
    """Asks one model. Made for one event loop.

    With `method` None the first question finds out whether the endpoint reports log-probabilities. The same
    `rng_seed` gives the same orders of options. `on_answer` is called after each question. Raises
    EndpointError when the endpoint fails: figures from a part of the questions are no figures. What it
    answered until then is in `cache`.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        name: str = "model",
        method: Method | None = None,
        rng_seed: int = 0,
        on_answer: Callable[[], None] | None = None,
        cache: AnswerStore | None = None,
    ) -> None:
        self.name = name
        self._cache = cache
        self._model = model
        self._method: Method | None = method
        self._probing = asyncio.Lock()
        self._has_answered = False
        self._forbidden: set[str] = set()
        """Questions that met a 403: should it have been the key's, they are asked again another time."""
        self._rng_seed = rng_seed
        self._on_answer = on_answer or (lambda: None)

    async def ask_all(
        self, questions: Sequence[Question], draws: int | None = None, *, sampled_draws: int | None = None
    ) -> list[Answer]:
        """One answer a question, in order; the model's own limits say how many are asked at once."""
        return await self._ask(questions, [draws] * len(questions), sampled_draws)

    async def ask_balanced(self, questions: Sequence[Question]) -> list[Answer]:
        """As `ask_all`, with as many draws as a question has options: so each option stands in each place
        once (counterbalancing)."""
        return await self._ask(questions, [len(one.options) for one in questions])

    async def _ask(
        self, questions: Sequence[Question], draws: Sequence[int | None], sampled_draws: int | None = None
    ) -> list[Answer]:
        """All of a culture, then all of the next one: a server with an adapter for each batches only requests
        for the same adapter."""
        order = sorted(range(len(questions)), key=lambda place: culture_of(questions[place].routing_key))
        answers = await asyncio.gather(
            *(self.ask(questions[place], draws[place], sampled_draws=sampled_draws) for place in order)
        )
        by_place = dict(zip(order, answers, strict=True))
        return [by_place[place] for place in range(len(questions))]

    async def ask(
        self, question: Question, draws: int | None = None, *, sampled_draws: int | None = None
    ) -> Answer:
        """Ask a question `draws` times; None: as often as a distribution needs, or, where replies are
        sampled, `sampled_draws` times. Raises EndpointError."""
        n = len(question.options)
        method = await self._method_for(question)
        if draws is None:
            draws = n if method == "logprobs" else sampled_draws or -(-_MIN_SAMPLED_DRAWS // n) * n
        if self._cache is not None and (cached := self._cache.get(question, draws, method)):
            self._has_answered |= cached.shares is not None
            self._on_answer()
            return cached
        orders = orders_of(n, draws, random.Random(f"{self._rng_seed}:{question.order_key or question.id}"))
        draw = self._by_logprobs if method == "logprobs" else self._by_sampling
        masses = await asyncio.gather(*(draw(question, order) for order in orders))
        self._on_answer()
        total = np.sum(masses, axis=0)
        valid = float(total.sum())
        shares = tuple(float(share) for share in total / valid) if valid > 0 else None
        answer = Answer(shares, draws, max(0.0, 1 - valid / draws), method)
        if self._cache is not None and question.id not in self._forbidden:
            self._cache.add(question, answer)
        return answer

    async def _method_for(self, question: Question) -> Method:
        if len(question.options) > MOST_ONE_DIGIT:
            return "sampling"
        if self._method is None:
            async with self._probing:
                if self._method is None:
                    self._method = await self._probe(question)
        return self._method

    async def _probe(self, question: Question) -> Method:
        """Whether the endpoint reports log-probabilities, by one request."""
        prompt = prompt_of(question, range(len(question.options)))
        try:
            completion = await self._complete(prompt, _BY_LOGPROBS, question, strictly=True)
        except ModelError:
            return "sampling"  # this endpoint refuses the very request
        return "logprobs" if completion is not None and completion.first_tokens else "sampling"

    async def _by_logprobs(self, question: Question, order: Sequence[int]) -> Floats:
        mass = np.zeros(len(order))
        completion = await self._complete(prompt_of(question, order), _BY_LOGPROBS, question)
        marks = {mark: place for place, mark in enumerate(marks_of(len(order)))}
        for token, logprob in completion.first_tokens if completion is not None else ():
            place = marks.get(token.strip())
            if place is not None and logprob <= 0:
                mass[order[place]] += math.exp(logprob)
        return mass / max(1.0, mass.sum())

    async def _by_sampling(self, question: Question, order: Sequence[int]) -> Floats:
        mass = np.zeros(len(order))
        completion = await self._complete(prompt_of(question, order), _BY_SAMPLING, question)
        if completion is not None:
            place = read_choice(completion.text, [question.options[one] for one in order])
            if place is not None:
                mass[order[place]] = 1.0
        return mass

    async def _complete(
        self, prompt: Prompt, sampling: Sampling, question: Question, *, strictly: bool = False
    ) -> Completion | None:
        """A reply; None where the model has none to this prompt, be it empty or a refusal."""
        try:
            completion = await self._model.complete(prompt, sampling, affinity=question.routing_key)
            self._has_answered = True
            return completion
        except ModelError as error:
            if strictly and error.kind == "bad_request":
                raise
            # A 403 may be the key's; of an endpoint that answers other prompts it is this one's.
            if error.kind == "forbidden" and self._has_answered:
                self._forbidden.add(question.id)
                return None
            if error.kind in ("empty_reply", "refused"):
                return None
            fix = (
                "See to the endpoint, then give the same command again (without --force): what it answered "
                "is not asked twice."
            )
            raise EndpointError(self.name, f"it gave out: {error.kind}: {error.reason}", fix) from error


def culture_of(affinity: str) -> str:
    """The culture that a question is asked of, by the affinity of its calls; empty if it is of none."""
    culture, slash, _ = affinity.partition("/")
    return culture if slash else ""


def orders_of(n: int, draws: int, rng: random.Random) -> list[tuple[int, ...]]:
    """`draws` orders of n options: rotations of a drawn order, a new one after each n.

    So over each n draws every option stands in every place once (Latin square).
    """
    orders: list[tuple[int, ...]] = []
    while len(orders) < draws:
        drawn = rng.sample(range(n), n)
        orders += [tuple(drawn[turn:] + drawn[:turn]) for turn in rng.sample(range(n), n)]
    return orders[:draws]


def prompt_of(question: Question, order: Sequence[int]) -> Prompt:
    """The question with its options in this order, worded as training rows are."""
    marked = [(mark, question.options[one]) for mark, one in zip(marks_of(len(order)), order, strict=True)]
    prompt = Prompt()
    if question.system:
        prompt.add("system", question.system)
    return prompt.add("user", choice_of(question.text, marked))


def read_choice(reply: str, options: Sequence[str]) -> int | None:
    """The place of the option that a reply names, options in the order that was shown; None if unclear.

    The first line has to begin with one option's number, or to be one option's words. A second number,
    a number that no option has, and another option's words behind the number are unclear.
    """
    line = next((line.strip() for line in reply.splitlines() if line.strip()), "")
    plain = [_plain(option) for option in options]
    said = _plain(line)
    if said and plain.count(said) == 1:
        return plain.index(said)
    match = _MARKED.match(line)
    marks = marks_of(len(options))
    if match is None or match[1] not in marks:
        return None
    place = marks.index(match[1])
    rest = _plain(match[2])
    if rest.startswith(plain[place]):
        longer = [o for o in plain if len(o) > len(plain[place]) and o.startswith(plain[place])]
        return None if any(rest.startswith(other) for other in longer) else place
    if any(rest.startswith(other) for other in plain if other) or _NUMBER.search(match[2]):
        return None
    return place


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text).casefold().split())
