"""All tasks of one evaluation, put to one model after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from culturepark.cultures import Culture
from culturepark.evaluation import forgetting, moderation, opinions, vsm
from culturepark.evaluation.asking import AnswerStore, Asker, Method
from culturepark.evaluation.labelled import LabelledSet
from culturepark.evaluation.measure import Measurement
from culturepark.ports import ChatModel


class Suite(Struct, frozen=True):
    """What is asked; what is empty is left out. `draws` None means as many as each method needs.

    Of a target with one model for each culture (`per_culture` in `evaluate_model`), `model_cultures` names
    the cultures whose models are each asked every item of forgetting.
    """

    cultures: Mapping[str, Culture]
    survey: tuple[opinions.SurveyQuestion, ...] = ()
    groups: tuple[vsm.Group, ...] = ()
    items: tuple[vsm.Item, ...] = ()
    labelled: tuple[LabelledSet, ...] = ()
    abilities: tuple[forgetting.Item, ...] = ()
    model_cultures: tuple[str, ...] = ()
    draws: int | None = None
    method: Method | None = None
    rng_seed: int = 0

    @property
    def questions(self) -> int:
        """How many questions one model is asked."""
        values = sum(len(places) for group in self.groups for places in group.asked)
        texts = sum(len(one.rows) for one in self.labelled)
        return len(self.survey) + len(self.abilities) + values + texts


async def evaluate_model(
    suite: Suite,
    model: ChatModel,
    name: str,
    on_answer: Callable[[], None] | None = None,
    *,
    per_culture: bool = False,
    cache: AnswerStore | None = None,
) -> list[Measurement]:
    """All measurements of one model; `on_answer` is called after each question. `per_culture`: the target is
    one model for each culture. Raises EndpointError."""
    asker = Asker(
        model, name=name, method=suite.method, rng_seed=suite.rng_seed, on_answer=on_answer, cache=cache
    )
    found: list[Measurement] = []
    if suite.survey:
        found += await opinions.evaluate(asker, suite.survey, suite.cultures, suite.draws)
    if suite.groups:
        found += await vsm.evaluate(asker, suite.groups, suite.items)
    if suite.labelled:
        found += await moderation.evaluate(asker, suite.labelled, suite.cultures)
    if suite.abilities:
        found += await forgetting.evaluate(asker, suite.abilities, suite.model_cultures, per_culture)
    return found


def unique_names(names: Sequence[str]) -> list[str]:
    """Names of models; equal ones get their place as a suffix."""
    return [name if names.count(name) == 1 else f"{name} #{place + 1}" for place, name in enumerate(names)]
