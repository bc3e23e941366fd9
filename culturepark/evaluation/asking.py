"""How a model under test is asked a question with options, and how strictly its reply is read.

Models favour places: the first option, or the last. So options come in another order at each draw, and
what is chosen is mapped back. Over as many draws as there are options each stands in each place once.

Where the endpoint tells log-probabilities, one draw gives a whole distribution: that of the reply's
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
from msgspec import Struct

from culturepark.errors import EndpointError
from culturepark.evaluation.statistics import Floats
from culturepark.models.errors import ModelError
from culturepark.ports import ChatModel, Completion, Prompt, Sampling
from culturepark.prompts.training_rows import MOST_ONE_DIGIT, choice_of, marks_of

Method = Literal["logprobs", "sampling"]

ASKED_AS = 1
"""Goes up when questions are put in other words or orders, or replies are read in another way: answers that
were kept do not count any more."""
_TOP = 20
"""As many alternatives as OpenAI's API tells at most."""
_BY_LOGPROBS = Sampling(temperature=0.0, max_tokens=2, top_logprobs=_TOP)
_BY_SAMPLING = Sampling(temperature=1.0, max_tokens=16)
_LEAST_SAMPLED = 30
"""Sampled replies that make a distribution, rounded up to whole rounds of orders."""
_LEVEL = 1e-9
"""Shares that differ by less differ by rounding."""
_LED_IN = r"^[^\w]*(?:(?:my|the)\s+)?(?:(?:answer|option|choice|number)\b[^\w]*(?:is\b[^\w]*)?)*"
_MARKED = re.compile(_LED_IN + r"(\d{1,2})(?![\w%]|[.,]\d)(.*)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,])\d{1,2}(?![\w%]|[.,]\d)")


class Question(Struct, frozen=True):
    """A question and its options, in the order in which shares are given. `system` may be empty.

    Orders are drawn by `drawn_by`, or by `id` if it is empty: questions that have it in common are asked
    alike. Those that have `begins_as` in common, `id` if it is empty, go to one replica, whose cache knows
    how they begin. Both begin with the culture, where there is one, and a slash.
    """

    id: str
    system: str
    text: str
    options: tuple[str, ...]
    drawn_by: str = ""
    begins_as: str = ""


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
    def likeliest(self) -> tuple[int, ...]:
        """Places of the likeliest option and of those that are level with it; none if nothing could be
        read."""
        return tuple(place for place, part in enumerate(self.parts or ()) if part)

    @property
    def parts(self) -> tuple[float, ...] | None:
        """1 for the likeliest option, shared by those that are level; None if nothing could be read."""
        if self.shares is None:
            return None
        best = [share >= max(self.shares) - _LEVEL for share in self.shares]
        return tuple(is_best / sum(best) for is_best in best)


class Kept(Protocol):
    """Answers that were given before, so that nobody asks twice."""

    def get(self, question: Question, draws: int, method: Method) -> Answer | None:
        """The answer to this question, asked so often and in this way."""
        ...

    def add(self, question: Question, answer: Answer) -> None:
        """Keep an answer."""
        ...


class Asker:
    """Asks one model. Made for one event loop.

    `method` None finds out by the first question whether the endpoint tells log-probabilities. The same
    `rng_seed` gives the same orders of options. `told` is called after each question. Raises
    EndpointError when the endpoint gives out: figures from a part of the questions are no figures. What it
    answered until then is `kept`.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        name: str = "model",
        method: Method | None = None,
        rng_seed: int = 0,
        told: Callable[[], None] | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.name = name
        self._kept = kept
        self._model = model
        self._method: Method | None = method
        self._finding_out = asyncio.Lock()
        self._answers = False
        self._forbidden: set[str] = set()
        """Questions that met a 403: should it have been the key's, they are asked again another time."""
        self._rng_seed = rng_seed
        self._told = told or (lambda: None)

    async def ask_all(
        self, questions: Sequence[Question], draws: int | None = None, *, sampled: int | None = None
    ) -> list[Answer]:
        """One answer a question, in order; the model's own limits say how many are asked at once."""
        return await self._ask(questions, [draws] * len(questions), sampled)

    async def ask_each(self, questions: Sequence[Question]) -> list[Answer]:
        """As `ask_all`, each as often as it has options: so each option stands in each place once."""
        return await self._ask(questions, [len(one.options) for one in questions])

    async def _ask(
        self, questions: Sequence[Question], draws: Sequence[int | None], sampled: int | None = None
    ) -> list[Answer]:
        """All of a culture, then all of the next one: a server with an adapter for each works on many
        requests at once only where they are for the same."""
        first = sorted(range(len(questions)), key=lambda place: culture_of(_begins(questions[place])))
        found = await asyncio.gather(*(self.ask(questions[at], draws[at], sampled=sampled) for at in first))
        by_place = dict(zip(first, found, strict=True))
        return [by_place[place] for place in range(len(questions))]

    async def ask(
        self, question: Question, draws: int | None = None, *, sampled: int | None = None
    ) -> Answer:
        """Ask a question `draws` times; None: as often as a distribution takes, or, where replies are
        sampled, `sampled` times. Raises EndpointError."""
        n = len(question.options)
        method = await self._method_for(question)
        if draws is None:
            draws = n if method == "logprobs" else sampled or -(-_LEAST_SAMPLED // n) * n
        if self._kept is not None and (known := self._kept.get(question, draws, method)):
            self._answers |= known.shares is not None
            self._told()
            return known
        orders = orders_of(n, draws, random.Random(f"{self._rng_seed}:{question.drawn_by or question.id}"))
        draw = self._by_logprobs if method == "logprobs" else self._by_sampling
        found = await asyncio.gather(*(draw(question, order) for order in orders))
        self._told()
        total = np.sum(found, axis=0)
        read = float(total.sum())
        shares = tuple(float(share) for share in total / read) if read > 0 else None
        answer = Answer(shares, draws, max(0.0, 1 - read / draws), method)
        if self._kept is not None and question.id not in self._forbidden:
            self._kept.add(question, answer)
        return answer

    async def _method_for(self, question: Question) -> Method:
        if len(question.options) > MOST_ONE_DIGIT:
            return "sampling"
        if self._method is None:
            async with self._finding_out:
                if self._method is None:
                    self._method = await self._found_out(question)
        return self._method

    async def _found_out(self, question: Question) -> Method:
        prompt = prompt_of(question, range(len(question.options)))
        try:
            told = await self._complete(prompt, _BY_LOGPROBS, question, strictly=True)
        except ModelError:
            return "sampling"  # this endpoint refuses the very request
        return "logprobs" if told is not None and told.first_tokens else "sampling"

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
        affinity = _begins(question)
        try:
            completion = await self._model.complete(prompt, sampling, affinity=affinity)
            self._answers = True
            return completion
        except ModelError as error:
            if strictly and error.kind == "bad_request":
                raise
            # A 403 may be the key's; of an endpoint that answers other prompts it is this one's.
            if error.kind == "forbidden" and self._answers:
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
    """The culture that a question is asked of, by what its calls have in common; empty if it is nobody's."""
    culture, slash, _ = affinity.partition("/")
    return culture if slash else ""


def _begins(question: Question) -> str:
    return question.begins_as or question.id


def orders_of(n: int, draws: int, rng: random.Random) -> list[tuple[int, ...]]:
    """`draws` orders of n options: rotations of a drawn order, a new one after each n.

    So over each n draws every option stands in every place once.
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
