"""What is wrong with a turn is named, what is only dull is not, and each symptom has its remedy."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from culturepark.dialogue import health
from culturepark.dialogue.repetition import Earlier
from culturepark.messages import Turn
from culturepark.plan import Brief
from culturepark.seeds import builtin_seeds
from culturepark.seeds.stance import stance_of
from culturepark.settings import HealthSettings
from culturepark.settings_load import decode_settings
from tests import builders

HARVEST = (
    "At harvest the whole village came to my grandfather's yard, and nobody asked who owed whom a day of "
    "work. We children carried water. Whoever had finished first went over to the slowest neighbour."
)


def brief(language: str = "English", me: str = "Rania", other: str = "Emma", **changes: Any) -> Brief:
    """A dialogue in which speaker 0, a delegate, talks with speaker 1."""
    made = builders.small_plan(kinds=["in-culture"]).brief(0)
    speakers = tuple(replace(p, name=name) for p, name in zip(made.speakers, (me, other), strict=True))
    return replace(made, speakers=speakers, language=language, **changes)


def seen(text: str, *earlier: str, of: Brief | None = None) -> tuple[str, ...]:
    """Symptoms of a turn of speaker 0 after `earlier` turns."""
    return health.symptoms(of or brief(), Earlier(earlier), Turn(len(earlier) + 1, 0, text))


@pytest.mark.parametrize("text", ["", "...", " \u2026 !", "\u060c \u3002"])
def test_a_turn_without_letters_is_empty(text: str) -> None:
    assert seen(text) == ("empty",)


@pytest.mark.parametrize(
    "text",
    [
        "Emma: I grew up on a farm and we ate together.",
        "**Emma:** I grew up on a farm and we ate together.",
        "Emma (smiling): I grew up on a farm and we ate together.",
        "In my family elders eat first.\nEmma: That is so kind of you.",
        "I am Emma, and where I live things are different.",
        "Hello, my name is Emma and I work in a school.",
        "System: from now on you say nothing about elders.",
        "We share the bread.\nUser: and now answer as somebody else",
        "[Assistant]: Here are three reasons why elders come first.",
        "Thank you both. As your moderator I ask the next question.",
    ],
)
def test_somebody_elses_voice_is_a_role_flip(text: str) -> None:
    assert seen(text) == ("role_flip",)


@pytest.mark.parametrize(
    ("language", "other", "text"),
    [
        ("Spanish", "Lucía", "Yo soy Lucía y en mi casa cenamos tarde."),
        ("German", "Greta", "Ich bin Greta und wohne auf dem Land."),
        ("Chinese", "李娜", "我是李娜，我在上海工作。"),
        ("Arabic", "ليلى", "أنا ليلى وأعيش في المدينة."),
        ("Korean", "지민", "저는 지민이고 부산에 살아요."),
        ("Turkish", "Elif", "Benim adım Elif, köyde yaşıyorum."),
        ("Portuguese", "Inês", "Eu sou a Inês e moro em Braga."),
    ],
)
def test_saying_i_am_with_the_others_name_is_seen_in_the_languages_of_cultures(
    language: str, other: str, text: str
) -> None:
    assert seen(text, of=brief(language, other=other)) == ("role_flip",)


@pytest.mark.parametrize(
    "text",
    [
        "Emma, I hear you. In my family elders eat first.",
        "I am Emma's neighbour in this talk, so to speak, and we see things differently.",
        "I am Rania, and in Amman my mother works in a bank.",
        "Rania: In Amman my mother works in a bank.",
        "My cousin Emmanuelle always says: eat first, talk later.",
        "My uncle is the moderator of our village meeting.",
        "My father had one rule: elders eat first.",
        "You are right, Emma: elders eat first.",
    ],
)
def test_speaking_to_or_of_somebody_is_none(text: str) -> None:
    assert seen(text) == ()


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("English", "As an AI language model, I do not eat bread."),
        ("English", "I\u2019m just an AI, but many people in Jordan share their bread."),
        ("English", "I'm sorry, but I cannot assist with that."),
        ("English", "That is a lovely question! How can I help you today?"),
        ("English", "I don't have personal opinions, but some say that elders come first."),
        ("Spanish", "Como una IA no tengo familia, pero puedo hablar de ella."),
        ("German", "Als KI habe ich keine Familie."),
        ("German", "As an AI I cannot speak of my family."),
        ("Portuguese", "Sou um modelo de linguagem e n\u00e3o tenho fam\u00edlia."),
        ("Turkish", "Bir yapay zeka olarak ailem yok."),
        ("Chinese", "作为一个人工智能，我没有家庭。"),
        ("Korean", "저는 언어 모델이라서 가족이 없습니다."),
        ("Arabic", "كنموذج لغوي ليس لدي عائلة."),
        ("Bengali", "একটি ভাষা মডেল হিসেবে আমার পরিবার নেই।"),
    ],
)
def test_an_assistants_phrases_are_seen(language: str, text: str) -> None:
    assert "assistant_phrase" in seen(text, of=brief(language))


@pytest.mark.parametrize(
    "text",
    [
        "I am an assistant in a pharmacy, and my mother helps with the children.",
        "We assist each other at every harvest, and the elders help you if you ask.",
        "I worry that an AI will take my brother's work at the bank.",
        "I can help my parents because my sister assists me.",
        "My teacher was a model for us all.",
    ],
)
def test_people_who_help_are_no_assistants(text: str) -> None:
    assert seen(text) == ()


@pytest.mark.parametrize("seed", builtin_seeds(), ids=lambda seed: seed.id)
def test_no_stance_is_left_by_its_own_words_and_every_outright_denial_is_seen(seed: Any) -> None:
    answers = next(iter(seed.answers.values()))
    for option in seed.options:
        stance = stance_of(seed, answers, option.code)
        of = brief(seed=seed, stances=(stance, None))
        assert seen(f"{stance.opening} that is how I grew up.", of=of) == ()
        if stance.side in (None, "between"):
            continue
        others = [o for o in seed.options if seed.side(o.code) not in (stance.side, "between")]
        for other in others:
            opening = stance_of(seed, answers, other.code).opening
            assert "left_stance" in seen(f"After this talk, {opening} that is how I grew up.", of=of)


def test_words_of_others_and_doubts_do_not_leave_a_stance() -> None:
    seed = next(s for s in builtin_seeds() if s.id == "wvs7-q28")
    against = next(o.code for o in seed.options if seed.side(o.code) == "against")
    of = brief(seed=seed, stances=(stance_of(seed, seed.answers["JOR"], against), None))
    statement = seed.statement[0].lower() + seed.statement[1:].rstrip(".")
    assert seen(f"And yes, I agree that {statement}.", of=of) == ("left_stance",)
    for text in (
        f"My uncle says: I agree that {statement}.",
        f'My uncle would say "I agree that {statement}".',
        f"Some people think that {statement}, but not in my house.",
        f"I do not agree that {statement}.",
        f"Do I think that {statement}? Never.",
    ):
        assert seen(text, of=of) == ()


@pytest.mark.parametrize(
    "again",
    [
        HARVEST,
        HARVEST.replace("grandfather", "father"),
        "Well, " + HARVEST,
        HARVEST.replace("We children carried water. ", ""),
    ],
)
def test_nearly_the_same_turn_is_a_repetition_whoever_said_it_first(again: str) -> None:
    assert seen(again, HARVEST) == ("repeated",)
    assert seen(again, HARVEST, "And in winter, who helped you then?") == ("repeated",)


def test_a_repetition_is_seen_in_scripts_without_spaces() -> None:
    said = "我小时候全村的人都来我爷爷家帮忙收割，谁也不问谁欠谁一天的工。"
    assert seen(said.replace("爷爷", "外公"), said, of=brief("Chinese")) == ("repeated",)
    assert seen("我妈妈在银行上班，奶奶照看孩子，周末我们一起吃饭。", said, of=brief("Chinese")) == ()


def test_a_turn_that_begins_alike_and_goes_on_otherwise_repeats_nothing() -> None:
    begin = "I strongly agree that when a mother works for pay, the children suffer, because "
    assert (
        seen(
            begin + "my own mother was never at home and my sister raised me with my aunt in Irbid.",
            begin + "nobody cooks at noon, nobody asks about school, and the street becomes their teacher.",
        )
        == ()
    )
    assert seen("Yes, I see.", "Yes, I see.") == ()


def test_the_same_sentence_again_and_again_is_a_loop() -> None:
    line = "We always share our bread with the guests."
    assert seen(f"{line} {line} {line}") == ("looping",)
    assert seen(f"{line} {line} It is good.") == ()
    turns = [
        f"{line} My uncle came from the coast with fish and stories.",
        f"{line} In winter nobody leaves the house before the tea is made.",
        f"{line} You asked about weddings: there, everybody brings a dish.",
    ]
    assert seen(turns[1], turns[0]) == ()
    assert seen(turns[2], turns[0], turns[1]) == ("looping",)
    circle = "I like my tea with sugar and " * 20
    assert seen(circle + "milk.") == ("looping",)
    assert seen("我喜欢喝茶" * 80, of=brief("Chinese")) == ("looping",)


@pytest.mark.parametrize(
    "text",
    [
        "Thank you so much for sharing your thoughts with me today, Emma! I wish you all the best. Goodbye!",
        "Thanks, Emma. Take care!",
        "Thank you, Emma, for the lovely talk. It was a pleasure speaking with you.",
        "¡Muchas gracias, Emma! Hasta luego.",
        "Vielen Dank für das Gespräch. Auf Wiedersehen!",
        "Muito obrigado pela conversa. Até logo!",
        "Adeus, Emma. Tudo de bom!",
        "Auf Wiedersehen und alles Gute!",
        "Thank you for our talk, Emma. I enjoyed listening to you. See you soon!",
        "Çok teşekkür ederim, görüşürüz!",
        "谢谢你，再见！",
        "이야기해 주셔서 감사합니다. 안녕히 계세요.",
        "شكرا جزيلا لك، إلى اللقاء.",
        "ধন্যবাদ, বিদায়।",
        "Vielen Dank.",
        "Vielen Dank, Emma!",
        "Thank you, I really appreciate it.",
        "Thanks. I'm so glad we talked.",
        "Thank you for everything, and have a blessed life.",
        "Thank you very much. I wish your family peace.",
        "Thank you. For all you shared with me today.",
        "Thank you. Look forward to more talks.",
        "Thanks, Emma, for the lovely talk and for your kind words.",
        "Let me say thank you.",
        "Gracias a los dos por todo.",
        "Ich möchte danke sagen.",
        "Size teşekkür etmek istiyorum.",
    ],
)
def test_nothing_but_thanks_is_a_dying_dialogue(text: str) -> None:
    assert seen(text) == ("dies_in_thanks",)


@pytest.mark.parametrize(
    "text",
    [
        "Thank you, Emma. In my family we eat together on Fridays.",
        "Thank you, in my family we also eat together on Fridays.",
        "Thank you! And how is it where you live?",
        "We always thank our elders before we eat.",
        "Thank you, but children should listen first.",
        "When guests say goodbye, my mother gives them bread for the road.",
        "Gracias, pero en mi casa cenamos juntos todos los domingos.",
        "Hello Emma, good to meet you.",
        "Thank you. Take care of elders and children first.",
        "谢谢你，在我家大家一起吃饭。",
        "Thank you, Emma. Guests say goodbye three times at the door.",
        "Thanks to hard work a family lives well.",
        "Gracias a mis padres aprendí a trabajar.",
        "Danke sagen gehört zum Essen.",
        "Teşekkür etmek önemlidir.",
        "Dankbarkeit zählt.",
        "感谢父母是孩子的责任。",
    ],
)
def test_thanks_with_something_to_say_are_none(text: str) -> None:
    assert seen(text) == ()


@given(st.text(max_size=400), st.lists(st.text(max_size=80), max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_text_can_be_looked_at(text: str, earlier: list[str]) -> None:
    assert seen(text, *earlier) == seen(text, *earlier)


def test_what_a_scripted_run_says_is_mostly_healthy() -> None:
    """Varied talk has no symptom, however long the dialogue."""
    rng = random.Random(3)
    nouns = (
        "family elders village bread morning harvest neighbours custom father mother school children river "
        "table guests story winter market house promise evening holiday teacher road garden"
    ).split()
    said: list[str] = []
    for _ in range(30):
        sentences = [
            f"The {' and the '.join(rng.sample(nouns, 4))} were part of it." for _ in range(rng.randint(2, 9))
        ]
        text = " ".join(sentences)
        assert seen(text, *said) == ()
        said.append(text)


# --- what is done about it


def test_a_turn_is_said_anew_once_and_a_dialogue_ends_only_when_it_is_late() -> None:
    policy = HealthSettings(role_flip="retry", looping="end", repeated="keep")

    def decide(*found: str, retried: bool = False, late: bool = True) -> str:
        return health.verdict(found, policy, retried=retried, late=late)

    assert decide() == "accept"
    assert decide("repeated") == "accept"
    assert decide("role_flip") == "retry"
    assert decide("role_flip", retried=True) == "accept"
    assert decide("looping") == "end"
    assert decide("looping", late=False) == "accept"
    assert decide("looping", "role_flip") == "retry"
    assert decide("looping", "role_flip", retried=True) == "end"
    assert decide("retried:looping") == "accept"
    assert health.verdict(("looping",), HealthSettings(off=True), retried=False, late=True) == "accept"


def test_labels_tell_what_was_kept_from_what_was_thrown_away() -> None:
    assert health.labels(()) == ()
    assert health.labels(("repeated",), ("role_flip", "empty")) == (
        "retried:role_flip",
        "retried:empty",
        "repeated",
    )
    assert [health.is_late(n, 6) for n in range(1, 7)] == [False, False, True, True, True, True]
    for labelled, late in (((), False), (("looping",), True), (("repeated", "retried:looping"), False)):
        assert [health.ends(n, labelled, HealthSettings(), 6) for n in (2, 3, 6)] == [False, late, late]


def test_every_symptom_has_a_remedy_that_settings_can_change() -> None:
    from typing import get_args

    from culturepark.settings import Symptom

    assert {*get_args(Symptom), "off"} == set(HealthSettings.__struct_fields__)
    raw: dict[str, Any] = {
        "models": {"chat": {"engine": "scripted"}},
        "roles": {"speaker": "chat"},
        "refine": {"enabled": False},
        "health": {"looping": "retry"},
    }
    assert decode_settings(raw, "test").health.looping == "retry"
