"""All tasks of one evaluation, put to one model after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from culturepark.cultures import Culture
from culturepark.evaluation import forgetting, moderation, opinions, vsm
from culturepark.evaluation.asking import Asker, Kept, Method
from culturepark.evaluation.labelled import LabelledSet
from culturepark.evaluation.measure import Measurement
from culturepark.ports import ChatModel


class Suite(Struct, frozen=True):
    """What is asked; what is empty is left out. `draws` None means as many as each method needs. `apart` are
    the cultures of models that are one for each: of forgetting each of them is asked everything."""

    cultures: Mapping[str, Culture]
    asked: tuple[opinions.Asked, ...] = ()
    groups: tuple[vsm.Group, ...] = ()
    items: tuple[vsm.Item, ...] = ()
    labelled: tuple[LabelledSet, ...] = ()
    abilities: tuple[forgetting.Item, ...] = ()
    apart: tuple[str, ...] = ()
    draws: int | None = None
    method: Method | None = None
    rng_seed: int = 0

    @property
    def questions(self) -> int:
        """How many questions one model is asked."""
        values = sum(len(places) for group in self.groups for places in group.asked)
        texts = sum(len(one.rows) for one in self.labelled)
        return len(self.asked) + len(self.abilities) + values + texts


async def put_to(
    suite: Suite,
    model: ChatModel,
    name: str,
    told: Callable[[], None] | None = None,
    *,
    apart: bool = False,
    kept: Kept | None = None,
) -> list[Measurement]:
    """All measurements of one model; `told` is called after each question. `apart`: it is one model for
    each culture. Raises EndpointError."""
    asker = Asker(model, name=name, method=suite.method, rng_seed=suite.rng_seed, told=told, kept=kept)
    found: list[Measurement] = []
    if suite.asked:
        found += await opinions.evaluate(asker, suite.asked, suite.cultures, suite.draws)
    if suite.groups:
        found += await vsm.evaluate(asker, suite.groups, suite.items)
    if suite.labelled:
        found += await moderation.evaluate(asker, suite.labelled, suite.cultures)
    if suite.abilities:
        found += await forgetting.evaluate(asker, suite.abilities, suite.apart, apart)
    return found


def names_apart(names: Sequence[str]) -> list[str]:
    """Names of models, those that are equal told apart by their place."""
    return [name if names.count(name) == 1 else f"{name} #{place + 1}" for place, name in enumerate(names)]
