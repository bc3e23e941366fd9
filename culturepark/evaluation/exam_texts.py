"""The texts that evaluations use: no training row should contain them (data contamination)."""

from __future__ import annotations

from collections.abc import Collection

from culturepark.evaluation import forgetting, vsm
from culturepark.evaluation.labelled import LabelledSet, read_labelled
from culturepark.evaluation.labelled_tasks import SYNTHETIC, find_labelled
from culturepark.seeds.builtin import builtin_seeds
from culturepark.store.rundir import Run


def exam_texts(run: Run, held_out: Collection[str]) -> dict[str, list[str]]:
    """By set: the run's questions with the ids `held_out`, and the sets that come with the project.

    Of the built-in questions only those that the run does not talk about: those in its plan are meant to be
    learned.
    """
    planned = {seed.id for seed in run.plan.seeds}
    synthetic = read_labelled(*find_labelled(SYNTHETIC))
    return {
        "held-out questions": [seed.statement for seed in run.plan.seeds if seed.id in held_out],
        "built-in questions": [seed.statement for seed in builtin_seeds() if seed.id not in planned],
        "values survey": [item.question for item in vsm.read_items()],
        "general ability": [item.question for item in forgetting.read_items()],
    } | dict([labelled_texts(synthetic)])


def labelled_texts(labelled: LabelledSet) -> tuple[str, list[str]]:
    """The name of a labelled set among all sets, and its texts."""
    return f"moderation ({labelled.task.name})", [row.text for row in labelled.rows]
