"""How a seed's wording is put to models: statements as statements, questions as questions."""

from __future__ import annotations

import msgspec
import pytest

from culturepark.messages import Opinion
from culturepark.prompts.registry import profile_named
from culturepark.prompts.training_rows import training_messages
from tests import builders


@pytest.mark.parametrize("nominal", [True, False])
def test_a_nominal_seed_is_asked_as_the_question_it_is(nominal: bool) -> None:
    brief = builders.small_plan(kinds=["cross"]).brief(0)
    asked = "Which drink do you offer a guest?"
    scale = "nominal" if nominal else "agree4"
    brief = msgspec.structs.replace(
        brief, seed=msgspec.structs.replace(brief.seed, statement=asked, scale=scale)
    )
    speaker = brief.delegates[0]
    opinion = Opinion(
        id="o", turn=1, speaker=speaker, start=0, end=1, extracted="x", text="x", verdict="entails"
    )
    question = training_messages(brief, opinion, "Jordanian")[1]["content"]
    assert question.startswith(asked if nominal else f'How do you see this statement? "{asked}"')
    system = profile_named("full").system(brief, speaker, builders.cultures())
    assert f'The subject is this {"question" if nominal else "statement"}: "{asked}"' in system
