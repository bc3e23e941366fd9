"""How a seed's wording is put to models, and which of what they say is mere courtesy."""

from __future__ import annotations

import msgspec
import pytest

from culturepark.messages import Opinion
from culturepark.prompts.registry import profile_named
from culturepark.prompts.training_rows import training_messages
from culturepark.text import is_courtesy
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


@pytest.mark.parametrize(
    "clause",
    [
        # greetings
        "Hello Omar",
        "Good evening, everyone.",
        "Welcome to this talk",
        "¡Hola, Emma!",
        "Guten Tag Frau Weber",
        "Boa noite, Inês",
        "Merhaba Elif",
        "مرحبا يا ليلى",
        "你好",
        "안녕하세요, 지민 씨",
        # thanks
        "Thank you so much for sharing your thoughts with me today",
        "Thank you for listening to my story",
        "Thank you my dear friend",
        "I just want to say thank you",
        "No, thank you.",
        "Muchas gracias por la charla",
        "Vielen herzlichen Dank für das Gespräch",
        "Ich danke dir",
        "Muito obrigado pela conversa",
        "Çok teşekkür ederim",
        "Anlattığın için teşekkür ederim",
        "شكرًا جزيلا لك على هذا الحديث",
        "আপনাকে অনেক ধন্যবাদ",
        "非常感谢你的分享",
        "이야기해 주셔서 감사합니다",
        # farewells and wishes
        "Goodbye and take care",
        "Take care of yourself",
        "See you next week",
        "I wish you all the best",
        "Have a wonderful day",
        "God bless you and your family",
        "Hasta luego",
        "Auf Wiedersehen und alles Gute",
        "Até logo",
        "Görüşürüz",
        "مع السلامة",
        "再见，祝你一切顺利",
        "안녕히 계세요",
        # kind words
        "I'm glad you're on board and listening to my insights",
        "I enjoyed our talk",
        "It was a great pleasure.",
        "It has been lovely talking with you",
        "Es war schön, mit dir zu sprechen",
        "很高兴认识你",
    ],
)
def test_what_is_courtesy_is_so_for_a_turn_and_for_an_opinion(clause: str) -> None:
    assert is_courtesy(clause)


@pytest.mark.parametrize(
    "clause",
    [
        # A view, whatever comes before it.
        "I agree",
        "Thank you, I think so too",
        "Thank you for saying so because it is true",
        "Gracias, pero en mi casa cenamos juntos",
        "谢谢你，但是家人最重要",
        # Words of thanks and farewell that are told of.
        "We always thank our elders before we eat",
        "guests say goodbye three times at the door",
        "Goodbye kisses are common here",
        "Take care of elders and children first",
        "Thanks to hard work a family lives well",
        "Gracias a mis padres aprendí a trabajar",
        "Danke sagen gehört zum Essen",
        "Dank meiner Eltern kann ich lesen",
        "Teşekkür etmek önemlidir",
        "感谢父母是孩子的责任",
        "我们感谢长辈",
        # What begins like kind words and is about something else.
        "I am happy to see women at work",
        "I appreciate hard work",
        "It was good for children to help",
        "Have a child early in life",
        "Until we marry we live at home",
        "For the family one gives up a job",
        "For everything there is a season",
        "All the best families send sons to the army",
        "I wish you could see how we live",
        "很高兴女人能工作",
        # All of these begin as a wish or a farewell does.
        "All the best in life comes from family.",
        "For sharing with neighbours is what God wants.",
        "For taking the time to pray is holy.",
        "For listening to elders is a duty.",
        "For being here on earth is a gift of God.",
        "See you in church every Sunday is how families live.",
        "Have a good night prayer with the children.",
        "Until we meet the needs of the poor we are not free.",
        "Best wishes for couples come from both families.",
        "Gracias por todo se dice a los padres",
        "Muchas gracias no llenan la mesa",
        "Agradeço a Deus cada dia de trabalho",
        "Tudo de bom vem da família",
        "Vielen Dank hört man von Kindern selten",
        "Alles Gute kommt von oben",
        "Teşekkürler yetmez",
        "İyi günler aileyle gelir",
        "شكرا لله على نعمة العمل",
        "ধন্যবাদ দেওয়া ভালো অভ্যাস",
        "再见难，家人最重要",
        "감사합니다라는 말은 아이가 먼저 배웁니다",
        # Thanks that run on.
        "谢谢你，在我家大家一起吃饭",
        # Short clauses can be opinions.
        "Family first",
    ],
)
def test_what_says_more_is_no_courtesy(clause: str) -> None:
    assert not is_courtesy(clause)
