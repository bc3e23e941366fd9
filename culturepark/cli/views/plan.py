"""A plan and seeds on the terminal, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from culturepark.cli.views.terminal import heading, key_values, safe_line, safe_text, table
from culturepark.plan import Plan
from culturepark.preflight.estimate import ASSUMPTIONS, Estimate
from culturepark.seeds import ImportResult, Seed
from culturepark.settings import Settings
from culturepark.words import count, money, plural

_MOST_LISTED = 20
"""How many ids or countries a list shows before it says how many more there are."""


def show_plan(console: Console, settings: Settings, plan: Plan, expected: Estimate) -> None:
    """What would run, and an estimate of its calls, tokens and cost."""
    heading(console, f"The plan: {plural(len(plan), 'dialogue')}")
    room = plan.settings
    kinds = ", ".join(f"{count(n)} {kind}" for kind, n in expected.kinds.items())
    rows: list[tuple[str, Text | str]] = [("kinds", kinds)]
    if set(expected.kinds) != {"direct"}:
        rows += [
            (
                "styles",
                " and ".join(dict.fromkeys(room.styles)) + (" in turn" if len(room.styles) > 1 else ""),
            ),
            ("length", f"{plural(room.utterances, 'turn')} each, {count(expected.turns)} in all"),
            ("main contact", plan.contact.name if "cross" in room.kinds else "none"),
        ]
    rows += [
        (
            "questions",
            f"{count(len(plan.seeds))}, {plural(room.dialogues_per_question, 'dialogue')} with each culture",
        ),
        ("stances", f"by {room.stance}, drawn with seed {room.seed}"),
        ("language", "English" if room.language == "english" else "each culture's own"),
    ]
    console.print(Padding(key_values(rows), (0, 0, 1, 1)))
    console.print(_by_culture(plan))
    show_unasked(console, plan)
    heading(console, "What it would cost, about")
    console.print(_by_role(expected))
    console.print()
    total = "none, all models are local" if all(r.local for r in expected.roles) else money(expected.money)
    rows = [("cost", total if total != "unknown" else "unknown: set the prices of every model to see it")]
    if settings.refine.enabled:
        rows += [
            ("opinions", f"about {count(expected.opinions)}"),
            ("samples", f"at most {count(expected.samples_at_most)}"),
        ]
    console.print(Padding(key_values(rows), (0, 0, 1, 1)))
    assumed = Text("An estimate; nothing was called. It takes that ", "dim")
    console.print(assumed.append("; ".join(ASSUMPTIONS), "dim").append(".", "dim"))


def _by_culture(plan: Plan) -> Table:
    unasked = [culture for culture, _ in plan.unasked]
    shown = bool(unasked)
    made = table("culture", "country", "questions", *(["never asked"] if shown else []), "dialogues", left=2)
    for culture in plan.delegates:
        missing = unasked.count(culture.id)
        counts = [count(plan.questions_of(culture.id)), *([count(missing)] if shown else [])]
        made.add_row(culture.id, culture.country, *counts, count(plan.planned()[culture.id]))
    return made


def show_unasked(console: Console, plan: Plan) -> None:
    """Questions without answers in a country: no dialogue is held on them there."""
    if not plan.unasked:
        return
    by_culture: dict[str, list[str]] = {}
    for culture, seed in plan.unasked:
        by_culture.setdefault(culture, []).append(seed)
    console.print(Text("\nNever asked there, so no dialogue is held:"))
    rows: list[tuple[str, str]] = []
    for culture, seeds in by_culture.items():
        more = f" and {len(seeds) - _MOST_LISTED} more" if len(seeds) > _MOST_LISTED else ""
        rows.append((culture, ", ".join(seeds[:_MOST_LISTED]) + more))
    console.print(Padding(key_values(rows), (0, 0, 0, 1)))


def _by_role(expected: Estimate) -> Table:
    made = table("role", "model", "calls", "prompt tokens", "completion tokens", "cost", left=2)
    for role in expected.roles:
        tokens = (count(role.prompt_tokens), count(role.completion_tokens))
        made.add_row(role.role, role.model, count(role.calls), *tokens, money(role.money, role.local))
    return made


def show_seeds(console: Console, seeds: Sequence[Seed], source: str) -> None:
    """A list of seeds: id, question, in how many countries it was asked."""
    heading(console, f"{plural(len(seeds), 'question')} from {source}")
    made = table("id", "question", "countries", left=2)
    for seed in seeds:
        asked = sum(answers.asked for answers in seed.answers.values())
        of = f"{asked} of {len(seed.answers)}" if asked < len(seed.answers) else str(asked)
        made.add_row(safe_line(seed.id), safe_line(seed.statement), of)
    console.print(made)


def show_import(console: Console, result: ImportResult, written_to: str) -> None:
    """What an import read, skipped and left out."""
    keys = sorted(result.countries)
    some = ", ".join(f"{key} ({count(result.countries[key])})" for key in keys[:_MOST_LISTED])
    more = f" and {len(keys) - _MOST_LISTED} more" if len(keys) > _MOST_LISTED else ""
    rows: list[tuple[str, Text | str]] = [
        ("read", plural(result.rows, "row")),
        ("questions", count(len(result.seeds))),
        ("countries", f"{len(keys)}: {some}{more}"),
    ]
    never = [(s.id, key) for s in result.seeds for key, answers in s.answers.items() if not answers.asked]
    if never:
        words = ", ".join(f"{seed} in {key}" for seed, key in never[:_MOST_LISTED])
        rows.append(
            (
                "never asked",
                words + (f" and {len(never) - _MOST_LISTED} more" if len(never) > _MOST_LISTED else ""),
            )
        )
    if result.skipped_items:
        rows.append(("not in the file", ", ".join(result.skipped_items)))
    for reason, number in sorted(result.left_out.items()):
        rows.append(("left out", f"{count(number)} {reason}"))
    if result.overlaps:
        words = f"{plural(len(result.overlaps), 'question')} from the World Values Survey"
        rows.append(("overlap", f"{words}, which built-in ones may ask too"))
    rows.append(("written to", safe_text(written_to, "bold")))
    console.print(key_values(rows))
