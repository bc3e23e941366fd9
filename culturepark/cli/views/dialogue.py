"""One dialogue on the terminal, its opinions, and one sample with where it came from."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from culturepark.cli.views.terminal import VERDICT_STYLES, heading, key_values, safe_line, safe_text
from culturepark.cultures import Persona, describe
from culturepark.plan import Brief
from culturepark.store.view import View
from culturepark.text import tidy
from culturepark.words import clock, count

REASONS = {
    "no_opinion": "no opinion: a question or a courtesy",
    "too_short": "too short to say much",
    "unreadable_verdict": "the verifier's reply could not be read",
    "contradicts": "contradicts the stance",
    "contradicts_after_rewrite": "still contradicts the stance once rewritten",
    "off_topic_after_rewrite": "lost the subject when it was rewritten",
    "novel": "neither for nor against, and this run keeps no such opinions",
    "near_duplicate": "says the same as another",
    "cluster": "close to another, which stands for both",
}
"""Why an opinion is no sample, in words."""

_SPEAKERS = ("cyan", "magenta")
_SHARE_WIDTH = 24
"""Columns of the longest bar."""


def show_dialogue(console: Console, view: View, row: dict[str, Any], reasons: bool = True) -> None:
    """One dialogue whole: who speaks, what they hold and how many hold it, every turn."""
    brief = view.plan.brief(row["number"])
    heading(console, f"Dialogue {row['id']}")
    console.print(safe_text(f'"{row["statement"]}"', "bold"))
    parts = [row["survey"] and f"{row['survey']} {row['wave']}", row["seed_id"], row["kind"]]
    parts += [row["style"]] if row["kind"] != "direct" else []
    console.print(safe_text("; ".join(part for part in (*parts, row["language"]) if part), "dim"))
    console.print()
    console.print(Padding(_people(view, brief), (0, 0, 0, 1)))
    console.print(Padding(_distribution(brief), (1, 0, 1, 1)))
    turns = Table.grid(padding=(0, 2))
    turns.add_column(justify="right", style="dim", no_wrap=True)
    turns.add_column(no_wrap=True)
    turns.add_column(overflow="fold")
    for turn in row["turns"]:
        name = safe_line(turn["name"], f"bold {_SPEAKERS[turn['speaker'] % 2]}")
        words = safe_text(turn["text"])
        if turn.get("health"):
            words.append(f"  [{', '.join(turn['health'])}]".replace("_", " "), "yellow")
        turns.add_row(str(turn["number"]), name, words)
    console.print(turns)
    if row["status"] == "failed":
        words = Text(f"It failed here: {row['failure']}. ", "bold red").append_text(safe_text(row["reason"]))
        console.print(words)
    for note in row["notes"]:
        console.print(safe_text(f"Note: {note}.", "yellow"))
    if reasons:
        console.print()
        console.print(_made_by(row))


def show_opinions(
    console: Console, opinions: list[dict[str, Any]], limit: int = 0, reasons: bool = True
) -> None:
    """The opinions taken from a dialogue: verdicts, and what became of each."""
    kept = sum(row["kept"] for row in opinions)
    heading(console, f"Opinions taken from it: {count(len(opinions))}, of which {count(kept)} kept")
    if not opinions:
        console.print(Text("None.", "dim"))
    shown = opinions[:limit] if limit else opinions
    for place, row in enumerate(shown):
        console.print(_opinion(row, reasons), end="\n" if place == len(shown) - 1 else "\n\n")
    if len(shown) < len(opinions):
        console.print(Text(f"... and {count(len(opinions) - len(shown))} more.", "dim"))


def _people(view: View, brief: Brief) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for place, (persona, stance) in enumerate(zip(brief.speakers, brief.stances, strict=True)):
        name = safe_line(persona.name, f"bold {_SPEAKERS[place % 2]}")
        who = safe_text(_described(view, persona))
        if stance is None:
            who.append("\nthe main contact: holds no drawn answer", "dim")
        else:
            who.append("\nholds: ", "dim").append_text(safe_text(stance.label, "bold"))
        grid.add_row(name, who)
    return grid


def _described(view: View, persona: Persona) -> str:
    """A persona without its name in front, which stands beside it."""
    words = describe(persona, view.plan.cultures[persona.culture])
    return words.removeprefix(f"{persona.name}, ")


def _distribution(brief: Brief) -> Group:
    """How the people of the country answered, and who of the dialogue holds which answer."""
    answers = brief.answers
    asked = f" of {count(answers.n_valid)} people" if answers.n_valid else ""
    held: dict[int, list[Text]] = {}
    for place, (persona, stance) in enumerate(zip(brief.speakers, brief.stances, strict=True)):
        if stance is not None:
            held.setdefault(stance.code, []).append(safe_line(persona.name, f"bold {_SPEAKERS[place % 2]}"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold", max_width=36)
    grid.add_column(width=_SHARE_WIDTH, no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    top = max(answers.shares.values(), default=0.0) or 1.0
    for option in sorted(brief.seed.options, key=lambda option: option.code):
        share = answers.shares.get(option.code, 0.0)
        style = "bold" if option.code in held else ""
        bar = Text("█" * round(_SHARE_WIDTH * share / top), "blue" if option.code in held else "dim")
        who = Text(", ").join(held.get(option.code, []))
        grid.add_row(safe_text(option.label, style), bar, Text(f"{share:.1%}", style), who)
    return Group(safe_text(f"The answers{asked} in {answers.country}:", "dim"), grid)


def _made_by(row: dict[str, Any]) -> Table:
    models = ", ".join(sorted({turn["model"] for turn in row["turns"] if turn["model"]})) or "nobody"
    took = max(0.0, row["ended_s"] - row["started_s"])
    used = {use["role"]: use for use in row["usage"]}
    calls = ", ".join(f"{role} {count(use['calls'])}" for role, use in used.items())
    return key_values([("spoken by", models), ("took", clock(took)), ("calls", calls or "none")])


def _opinion(row: dict[str, Any], reasons: bool) -> Group:
    head = Text(f"turn {row['turn']:<4}")
    head.append_text(verdict_chain(row)).append("  ")
    head.append_text(fate(row))
    lines = [head, Padding(safe_text(row["text"]), (0, 0, 0, 4))]
    if row["text"] != row["extracted"]:
        was = Text("said as: ", "dim").append_text(safe_text(row["extracted"], "dim"))
        lines.append(Padding(was, (0, 0, 0, 4)))
    if reasons and row["verdict_reason"]:
        why = Text("verifier: ", "dim").append_text(safe_line(row["verdict_reason"], "dim"))
        lines.append(Padding(why, (0, 0, 0, 4)))
    return Group(*lines)


def verdict_chain(row: dict[str, Any]) -> Text:
    """What was found of an opinion, before and after a rewrite."""
    if not row["first_verdict"]:
        return Text("not verified", "dim")
    chain = Text(row["first_verdict"], VERDICT_STYLES[row["first_verdict"]])
    if row["rewritten"]:
        chain.append(", rewritten: ", "dim")
        last = row["verdict"] or "unread"
        chain.append(last, VERDICT_STYLES.get(last, "dim"))
    return chain


def fate(row: dict[str, Any]) -> Text:
    """What became of an opinion: kept, or why not."""
    if row["kept"]:
        return Text("kept", "bold green")
    if not row["rejected"]:
        return Text("waits to be chosen from", "cyan")
    words = Text("not kept: ", "dim")
    if not row["instead"]:
        return words.append(REASONS.get(row["rejected"], tidy(row["rejected"])))
    if row["rejected"] == "near_duplicate":
        return words.append("says the same as ").append(short_id(row["instead"]), "cyan")
    return words.append(short_id(row["instead"]), "cyan").append(" stands for it")


def short_id(opinion_id: str) -> str:
    """An opinion's id as it can be typed: `d265f4fe8-t4-o1`."""
    dialogue, dash, rest = tidy(opinion_id).partition("-")
    return f"{dialogue[:9]}{dash}{rest}"


# --- one sample


def show_sample(console: Console, view: View, row: dict[str, Any]) -> None:
    """One opinion, kept or not, with everything that is known of where it came from."""
    brief = view.plan.brief(row["number"])
    dialogue = view.dialogue(row["dialogue_id"])
    heading(console, f"{'Sample' if row['kept'] else 'Opinion'} {row['id']}")
    head = verdict_chain(row).append("  ")
    console.print(head.append_text(fate(row)))
    if row["messages"]:
        console.print()
        console.print(messages_view(row))
    heading(console, "Where it was said")
    turn = next(turn for turn in dialogue["turns"] if turn["number"] == row["turn"])
    where = f"turn {row['turn']} of dialogue {row['dialogue_id'][:9]}, by "
    console.print(Text(where, "dim").append_text(safe_line(turn["name"], "bold")))
    console.print(Padding(_with_span(turn["text"], row["start"], row["end"]), (0, 0, 1, 1)))
    console.print(Padding(_people(view, brief), (0, 0, 0, 1)))
    console.print(Padding(_distribution(brief), (1, 0, 0, 1)))
    heading(console, "What was done with it")
    console.print(key_values([*_steps(row)]))
    heading(console, "Provenance")
    console.print(key_values(_provenance(row)))


def messages_view(row: dict[str, Any]) -> Table:
    """A sample's chat messages, as a tuned model will read them."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for message in row["messages"]:
        style = "green" if message["role"] == "assistant" else ""
        grid.add_row(safe_line(message["role"]), safe_text(message["content"], style))
    return grid


def _with_span(text: str, start: int, end: int) -> Text:
    """A turn's text with the span of the opinion marked."""
    if tidy(text) != text:  # then what is printed is not what the span counts in
        return safe_text(text)
    marked = Text(text)
    marked.stylize("bold reverse", start, end)
    return marked


def _steps(row: dict[str, Any]) -> list[tuple[str, Text | str]]:
    steps: list[tuple[str, Text | str]] = [("extracted", row["extracted"])]
    if row["text"] != row["extracted"]:
        steps.append(("rewritten" if row["rewritten"] else "as kept", row["text"]))
    steps.append(("verdict", verdict_chain(row)))
    if row["verdict_reason"]:
        steps.append(("reason", row["verdict_reason"]))
    became = fate(row)
    if row["kept"] and row["cluster"] >= 0:
        became.append(f", standing for cluster {row['cluster']} of its question", "dim")
    steps.append(("became", became))
    if row["detail"] and row["detail"] != row["verdict_reason"]:
        steps.append(("detail", row["detail"]))
    return steps


def _provenance(row: dict[str, Any]) -> list[tuple[str, Text | str]]:
    share = row["persona"]["stance_share"]
    people = f"{share:.1%} of {count(row['n_valid'])} people" if row["n_valid"] else f"{share:.1%} of people"
    models: dict[str, list[str]] = {}
    for role in ("speaker", "extractor", "verifier", "rewriter", "embedder"):
        if row[f"{role}_model"]:
            models.setdefault(row[f"{role}_model"], []).append(role)
    return [
        ("survey", f"{row['survey']} {row['wave']}".strip() or "own question"),
        ("question", f"{row['seed_id']}: {row['statement']}"),
        ("answer held", f"{row['persona']['stance_label']}, as {people} in {row['country']}"),
        ("distribution", row["distribution_hash"]),
        ("dialogue", f"{row['dialogue_id']} ({row['kind']}, {row['style']}, {row['language']})"),
        ("models", "\n".join(f"{name}  ({', '.join(roles)})" for name, roles in models.items())),
        ("sampling", row["sampling"] if row["sampling"] not in ("", "{}") else "the prompt profile's own"),
        (
            "made by",
            f"run {row['run_id']}, culturepark {row['code_version']}, prompts {row['prompt_version']}",
        ),
    ]
