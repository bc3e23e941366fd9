"""An estimate of what a plan will cost: calls, tokens and money by role. Arithmetic only; no model is called.

Prompts are built as they will be, with filler where a model would speak, for one dialogue of each
kind; the others count as equally long. What no arithmetic can know is in the constants below.
"""

from __future__ import annotations

from msgspec import Struct

from culturepark.plan import Brief, Plan
from culturepark.ports import Sampling
from culturepark.prompts.profile import Profile, sampling_with
from culturepark.prompts.registry import profile_named
from culturepark.settings import Kind, Role, Settings

CHARACTERS_PER_TOKEN = 4.0
"""English has this many characters for each token on a large model's tokeniser; other scripts have fewer."""
REPLY_FILL = 0.85
"""A turn fills this share of its limit of tokens."""
OPINIONS_PER_TURN = 2.0
"""This many opinions are found in one turn of a delegate."""
TOKENS_PER_OPINION = 30
"""An opinion, one sentence, has this many tokens."""
TOKENS_PER_VERDICT = 40
"""The verifier's JSON with its reason has this many tokens."""
TOKENS_AROUND_OPINION = 30
"""In the extractor's reply, an opinion's quote and JSON add this many tokens."""
REWRITTEN = 0.1
"""This share of opinions contradicts the stance, and so is rewritten and verified again."""

ASSUMPTIONS = (
    f"a token is {CHARACTERS_PER_TOKEN:g} characters (English)",
    f"a turn fills {REPLY_FILL:.0%} of its limit",
    f"a turn of a delegate holds {OPINIONS_PER_TURN:g} opinions of {TOKENS_PER_OPINION} tokens",
    f"{REWRITTEN:.0%} of opinions are rewritten",
    "nothing is asked twice and nothing comes cheaper from a cache",
)
"""The assumptions, in words."""

_SAMPLING_OF: dict[Kind, str] = {"cross": "speaker", "in-culture": "in-culture", "direct": "direct"}


class RoleEstimate(Struct, frozen=True):
    """The calls, tokens and cost of one role. `money` is None if a price is unknown, 0 for local models."""

    role: Role
    model: str
    local: bool
    calls: int
    prompt_tokens: int
    completion_tokens: int
    money: float | None


class Estimate(Struct, frozen=True):
    """The calls, tokens and cost of a plan. `kinds` counts dialogues by kind; `money` is None if that of any
    role is unknown."""

    kinds: dict[Kind, int]
    turns: int
    opinions: int
    samples_at_most: int
    roles: tuple[RoleEstimate, ...]
    money: float | None


class _Sum:
    """Calls and tokens of a role so far; tokens as characters would be, so that rounding comes last."""

    def __init__(self) -> None:
        self.calls = self.prompt = self.completion = 0.0

    def add(self, times: float, prompt_tokens: float, completion_tokens: float) -> None:
        self.calls += times
        self.prompt += times * prompt_tokens
        self.completion += times * completion_tokens


def turns_planned(plan: Plan) -> int:
    """Turns of all dialogues together."""
    return sum(n * _turns(plan, kind) for kind, n in plan.kinds().items())


def estimate(settings: Settings, plan: Plan) -> Estimate:
    """The estimate for this plan, at most as good as the assumptions above."""
    kinds = plan.kinds()
    sums: dict[Role, _Sum] = {
        role: _Sum() for role in ("speaker", "extractor", "verifier", "rewriter", "embedder")
    }
    opinions = 0.0
    for kind, dialogues in kinds.items():
        brief = next(b for b in map(plan.brief, range(len(plan))) if b.kind == kind)
        reply_tokens = _talk(settings, plan, brief, dialogues, sums["speaker"])
        if settings.refine.enabled:
            opinions += _refinement(settings, plan, brief, dialogues, reply_tokens, sums)
    keeps = settings.refine.clusters * plan.n_cells if settings.refine.clusters else opinions
    roles = tuple(_role(settings, role, of) for role, of in sums.items() if of.calls)
    moneys = [role.money for role in roles]
    return Estimate(
        kinds=kinds,
        turns=turns_planned(plan),
        opinions=round(opinions),
        samples_at_most=round(min(keeps, opinions)),
        roles=roles,
        money=None if None in moneys else sum(m for m in moneys if m is not None),
    )


def _turns(plan: Plan, kind: Kind) -> int:
    return 1 if kind == "direct" else plan.settings.utterances


def _talk(settings: Settings, plan: Plan, brief: Brief, dialogues: int, into: _Sum) -> float:
    """Add the speakers' calls of dialogues like this one; returns the tokens of one turn."""
    profile = profile_named(settings.model_of("speaker").profile)
    limit = _sampling(settings, profile, "speaker", _SAMPLING_OF[brief.kind]).max_tokens
    reply_tokens = REPLY_FILL * limit
    if brief.kind == "direct":
        reply_tokens = min(reply_tokens, float(brief.direct_reasons * TOKENS_PER_OPINION))
    reply = _filler(reply_tokens)
    # Each speaker's prompt grows by what it hears and by what it says.
    sizes = [len(profile.system(brief, speaker, plan.cultures)) for speaker in range(len(brief.speakers))]
    heard = ""
    for turn in range(1, brief.utterances + 1):
        speaker = (turn - 1) % len(sizes)
        cue = profile.cue(brief, turn, heard, plan.cultures)
        sizes[speaker] += len(cue.text)
        into.add(dialogues, (sizes[speaker] + len(cue.prefill)) / CHARACTERS_PER_TOKEN, reply_tokens)
        sizes[speaker] += len(reply)
        heard = reply
    return reply_tokens


def _refinement(
    settings: Settings, plan: Plan, brief: Brief, dialogues: int, reply_tokens: float, sums: dict[Role, _Sum]
) -> float:
    """Add the calls that refine dialogues like this one; returns how many opinions they give."""
    per_dialogue = brief.utterances * len(brief.delegates) / len(brief.speakers)
    per_turn = float(brief.direct_reasons) if brief.kind == "direct" else OPINIONS_PER_TURN
    turns = dialogues * per_dialogue
    opinions = turns * per_turn
    rewritten = opinions * REWRITTEN if settings.refine.rewrite else 0.0
    speaker, opinion = brief.delegates[0], _filler(TOKENS_PER_OPINION)

    extractor = profile_named(settings.model_of("extractor").profile)
    if extractor.judges:
        prompt, _ = extractor.extraction(brief, speaker, _filler(reply_tokens))
        answer = per_turn * (TOKENS_PER_OPINION + TOKENS_AROUND_OPINION)
        sums["extractor"].add(turns, len(prompt.encoded()) / CHARACTERS_PER_TOKEN, answer)
    verifier = profile_named(settings.model_of("verifier").profile)
    embedded = opinions  # each text once, be it for a verdict or to be kept
    if verifier.judges:
        prompt, _ = verifier.verification(brief, speaker, opinion)
        size = len(prompt.encoded()) / CHARACTERS_PER_TOKEN
        sums["verifier"].add(opinions + rewritten, size, TOKENS_PER_VERDICT)
    else:  # verdicts come from embeddings
        embedded += rewritten
    if rewritten:
        prompt, cue = profile_named(settings.model_of("rewriter").profile).rewriting(brief, speaker, opinion)
        size = (len(prompt.encoded()) + len(cue.prefill)) / CHARACTERS_PER_TOKEN
        sums["rewriter"].add(rewritten, size, TOKENS_PER_OPINION)
    requests = dialogues * (1 if verifier.judges else 1 + (rewritten > 0))
    sums["embedder"].add(requests, embedded * TOKENS_PER_OPINION / requests, 0)
    return opinions


def _role(settings: Settings, role: Role, of: _Sum) -> RoleEstimate:
    prices = settings.prices_of(role)
    return RoleEstimate(
        role=role,
        model=settings.roles.of(role),
        local=prices.local,
        calls=round(of.calls),
        prompt_tokens=round(of.prompt),
        completion_tokens=round(of.completion),
        money=prices.of_tokens(of.prompt, of.completion),
    )


def _sampling(settings: Settings, profile: Profile, role: Role, name: str) -> Sampling:
    return sampling_with(profile.sampling(name), settings, role)


def _filler(tokens: float) -> str:
    return "x" * round(tokens * CHARACTERS_PER_TOKEN)
