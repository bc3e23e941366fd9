"""What is known of a run while it goes on, and the figures that follow: how fast, at what cost, how long.

Pure: a `FigureTracker` is fed with snapshots, which carry their own time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from culturepark.dialogue.conductor import Progress
from culturepark.preflight.estimate import turns_planned
from culturepark.pricing import cost
from culturepark.settings import Settings
from culturepark.store import funnel as funnels
from culturepark.store.funnel import Funnel
from culturepark.store.rundir import Run
from culturepark.usage import Usage, add, reports_usage, total

WINDOW_S = 30.0
"""A rate of "now" is the mean over this many seconds (sliding window)."""
_LEAST_WINDOW_S = 1.0
"""No rate follows from samples that span fewer seconds."""
_TURNS_BEFORE_GUESSING = 20
"""The time left is unknown until this many turns were said in this session."""


class Endpoint(Struct, frozen=True):
    """One replica of one model, all processes together. Counts are of this session.

    `limit` is requests at once; `weight`, 0 to 1, its share of the load beside other replicas, 0 while
    it is left alone. `refused` counts 429s, `broken` other faults of the server, `retried` requests
    that were further attempts at one call, `tokens` those read and written.
    """

    url: str
    model: str
    limit: int = 0
    in_flight: int = 0
    waiting: int = 0
    requests_s: float = 0.0
    tokens_s: float = 0.0
    latency_s: float = 0.0
    refused: int = 0
    broken: int = 0
    retried: int = 0
    tokens: int = 0
    weight: float = 1.0


class Snapshot(Struct):
    """One look at a run. `funnels` holds counts by culture; `replayed` outcomes read back on resume."""

    progress: Progress
    funnels: dict[str, dict[str, int]]
    set_aside: tuple[str, ...]
    replayed: int
    elapsed_s: float
    draining: bool = False
    endpoints: tuple[Endpoint, ...] = ()
    underway: dict[str, int] = {}
    """What dialogues under way have used, with a funnel's keys."""
    trainings: dict[str, str] = {}
    """How trainings that the run launched stand, by name."""


class Speed(Struct, frozen=True):
    """Turns and tokens a second; None where nothing is known yet."""

    turns_s: float | None = None
    tokens_s: float | None = None


class Tokens(Struct, frozen=True):
    """Tokens of the dialogues that have ended, all roles together. Those of `unreported` chat calls are
    unknown."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    unreported: int = 0

    @property
    def unknown(self) -> bool:
        """Whether nothing is known of them at all: over roles, whose endpoints differ in what they report, a
        majority (`usage.reports_usage`) says nothing."""
        return bool(self.unreported) and not self.prompt and not self.completion


class Cost(Struct, frozen=True):
    """Money of the dialogues that have ended, and of those that have not; None means unknown.

    `to_come` assumes that each dialogue still owed, those in flight included, costs the average so far.
    The usage of `unreported` calls is unknown (most of them broke off): then `so_far` is a lower bound.
    """

    so_far: float | None = None
    to_come: float | None = None
    local: bool = False
    unreported: int = msgspec.field(name="untold", default=0)


class Dialogues(Struct, frozen=True):
    """Where the planned dialogues are: planned = finished + failed + owed; those in flight are owed."""

    planned: int = 0
    finished: int = 0
    failed: int = 0
    owed: int = 0
    in_flight: int = 0
    refining: int = 0


class Figures(Struct, frozen=True):
    """What follows from the snapshots so far."""

    dialogues: Dialogues
    turns: int
    now: Speed
    overall: Speed
    """Of this session."""
    tokens: Tokens
    cost: Cost
    retries: int
    left_s: float | None


class RestartingCounter:
    """The sum over restarts of a counter that begins at zero anew when its process is restarted (a monotonic
    counter with resets)."""

    def __init__(self) -> None:
        self.value = 0
        self._last = 0

    def observe(self, seen: int) -> int:
        """The count over all restarts, now that the process reports `seen`."""
        self.value += seen - self._last if seen >= self._last else seen
        self._last = seen
        return self.value


class Rates:
    """Rates from samples of two counters, over a sliding window and since the first sample."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._turns, self._tokens = RestartingCounter(), RestartingCounter()
        self._first: tuple[float, int, int] | None = None
        self._recent: deque[tuple[float, int, int]] = deque()

    def add(self, now_s: float, turns: int, tokens: int) -> None:
        """Add a sample of both counters. One that falls began anew in a process that was restarted."""
        sample = (now_s, self._turns.observe(turns), self._tokens.observe(tokens))
        self._first = self._first or sample
        self._recent.append(sample)
        # The last sample before the window stays, so that the window is covered whole.
        while len(self._recent) > 1 and now_s - self._recent[1][0] >= self._window_s:
            self._recent.popleft()

    @property
    def now(self) -> Speed:
        """Over the window, or as much of it as there is."""
        return self._since(self._recent[0] if self._recent else None)

    @property
    def overall(self) -> Speed:
        """Since the first sample."""
        return self._since(self._first)

    def _since(self, start: tuple[float, int, int] | None) -> Speed:
        if start is None or self._recent[-1][0] - start[0] < _LEAST_WINDOW_S:
            return Speed()
        end = self._recent[-1]
        span_s = end[0] - start[0]
        return Speed((end[1] - start[1]) / span_s, (end[2] - start[2]) / span_s)


class FigureTracker:
    """Turns the snapshots of one session into figures. `turns_before` were said in earlier sessions."""

    def __init__(self, run: Run, turns_before: int) -> None:
        self._run = run
        self._turns_before = turns_before
        self._turns_planned = turns_planned(run.plan)
        self._rates = Rates()
        self._retries = RestartingCounter()
        self._tokens_before: int | None = None

    def figures(self, snapshot: Snapshot) -> Figures:
        """The figures at this snapshot; call it for each, in order."""
        funnel, progress = total_of(snapshot.funnels), snapshot.progress
        tokens = tokens_of(funnel)
        in_all = tokens.prompt + tokens.completion
        if self._tokens_before is None:
            self._tokens_before = in_all
        # Endpoints know of each call, funnels of ended dialogues only, but also where there is no endpoint.
        session = max(sum(e.tokens for e in snapshot.endpoints), in_all - self._tokens_before)
        self._rates.add(snapshot.elapsed_s, progress.turns, session)
        now, overall = self._rates.now, self._rates.overall
        if tokens.unknown and not session:
            now, overall = Speed(now.turns_s), Speed(overall.turns_s)
        # The moderator counts its own session and forgets when it is restarted; the funnel counts ended ones.
        turns = max(funnel["turns"], self._turns_before + progress.turns)
        dialogues = dialogues_of(funnel, progress.planned, progress.in_flight, progress.refining)
        return Figures(
            dialogues=dialogues,
            turns=turns,
            now=now,
            overall=overall,
            tokens=tokens,
            cost=cost_of(funnel, self._run.settings, dialogues.owed, snapshot.underway),
            retries=self._retries.observe(sum(e.retried for e in snapshot.endpoints)),
            left_s=self._left_s(dialogues, turns - funnel["turns"], progress.turns, now),
        )

    def _left_s(self, dialogues: Dialogues, turns_in_flight: int, said: int, now: Speed) -> float | None:
        if not dialogues.owed:
            return 0.0
        if said < _TURNS_BEFORE_GUESSING or not now.turns_s:
            return None
        # By dialogues, since a failed one never says its remaining turns.
        owed = self._turns_planned * dialogues.owed / dialogues.planned - turns_in_flight
        return max(0.0, owed / now.turns_s)


def total_of(by_culture: Mapping[str, Mapping[str, int]]) -> Funnel:
    """The counts of all cultures together."""
    whole: Funnel = Counter()
    for funnel in by_culture.values():
        funnels.add(whole, funnel)
    return whole


def dialogues_of(funnel: Mapping[str, int], planned: int, in_flight: int = 0, refining: int = 0) -> Dialogues:
    """Where the dialogues are, by these counts."""
    finished, failed = funnel.get("finished", 0), funnel.get("failed", 0)
    return Dialogues(planned, finished, failed, planned - finished - failed, in_flight, refining)


def tokens_of(funnel: Mapping[str, int]) -> Tokens:
    """Tokens of all roles together."""
    by_role = funnels.usage_of(funnel)
    whole, embedder = total(by_role), by_role.get("embedder", Usage())
    unreported = whole.unreported - embedder.unreported
    return Tokens(whole.prompt_tokens, whole.cached_tokens, whole.completion_tokens, unreported)


def cost_of(
    funnel: Mapping[str, int], settings: Settings, owed: int, underway: Mapping[str, int] | None = None
) -> Cost:
    """Money so far, what is spent on dialogues `underway` included, and to come for `owed` dialogues."""
    if all(model.prices.local for model in settings.models.values()):
        return Cost(0.0, 0.0, local=True)
    of_ended, of_underway = funnels.usage_of(funnel), funnels.usage_of(underway or {})
    whole = add(of_ended, of_underway)
    # Judged together: calls under way would drop out once most of them are unreported.
    metered = {role for role, usage in whole.items() if _is_metered(usage)}
    costs = [_least_cost(role, usage, role in metered, settings) for role, usage in of_ended.items()]
    underway_costs = [
        _least_cost(role, usage, role in metered, settings) for role, usage in of_underway.items()
    ]
    ended = funnel.get("finished", 0) + funnel.get("failed", 0)
    priced = all(settings.prices_of(role).known for role in settings.roles_used)
    if None in costs or None in underway_costs or not (ended or priced):
        return Cost()
    spent = sum(one for one in costs if one is not None)
    spent_underway = sum(one for one in underway_costs if one is not None)
    unreported = total(whole).unreported
    if not owed:
        return Cost(spent + spent_underway, 0.0, unreported=unreported)
    to_come = max(0.0, spent / ended * owed - spent_underway) if ended else None
    return Cost(spent + spent_underway, to_come, unreported=unreported)


def _is_metered(usage: Usage) -> bool:
    return reports_usage(usage) and usage.tokens > 0


def _least_cost(role: str, usage: Usage, metered: bool, settings: Settings) -> float | None:
    """The cost of those of a role's calls whose tokens are known, the least that all of them cost; None if
    the prices are unknown, or the role is not `metered`: the tokens of most of its calls are unknown."""
    return cost(replace(usage, unreported=0) if metered else usage, settings.prices_of(role))
