"""A run on the terminal: its summary, one dialogue whole, one sample with where it came from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from culturepark.cli.views.terminal import VERDICT_STYLES, command, facts, heading, line_of, said, table
from culturepark.cultures import Persona, describe
from culturepark.plan import Brief
from culturepark.store import funnel as funnels
from culturepark.store.funnel import Funnel
from culturepark.store.lock import being_written
from culturepark.store.rundir import SHARD_DIRS
from culturepark.store.view import View
from culturepark.text import tidy
from culturepark.words import clock, count, money, plural

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

_STAGES = (
    ("no opinion", ("no_opinion", "too_short")),
    ("off stance", ("contradicts", "contradicts_after_rewrite", "off_topic_after_rewrite", "novel")),
    ("same as another", ("near_duplicate",)),
    ("similar", ("cluster",)),
)
_SPEAKERS = ("cyan", "magenta")
_SHARE_WIDTH = 24


# --- the run as a whole


def show_summary(console: Console, view: View) -> None:
    """What a run holds: how far it is, the funnel by culture, what it took, where the files are."""
    file, total = view.run.file, view.total
    heading(console, f"Run {file.run_id}")
    console.print(Padding(facts(_about(view)), (0, 0, 0, 1)))
    show_funnel(console, view)
    show_failures(console, view)
    heading(console, "Model calls")
    console.print(usage_table(total, view))
    show_files(console, view)
    look = view.telling_dialogue()
    if look is not None:
        root = shlex.quote(str(view.root))
        heading(console, "Look closer")
        console.print(command(f"culturepark show {root} --dialogue {look['id'][:9]}"))
        for sample in view.samples(1):
            console.print(command(f"culturepark show {root} --sample {short_id(sample['id'])}"))
        console.print(command(f"culturepark check {root}"))


def _about(view: View) -> list[tuple[str, Text | str]]:
    run, plan = view.run, view.plan
    planned, ended = len(plan), view.ended
    failed = view.total["failed"]
    if view.complete:
        state = Text(f"complete: all {plural(planned, 'dialogue')} have ended", "green")
    elif being_written(view.root):
        state = Text(f"going on now: {count(ended)} of {count(planned)} dialogues have ended", "cyan")
    else:
        state = Text(f"not complete: {count(ended)} of {count(planned)} dialogues have ended; ", "yellow")
        state.append("the command that began it goes on with it")
    if failed:
        state.append(f", {count(failed)} of them failed", "bold red")
    surveys = sorted({f"{seed.survey} {seed.wave}".strip() or "own questions" for seed in plan.seeds})
    names: dict[str, list[str]] = {}
    for role, name in run.file.models.items():
        names.setdefault(name, []).append(role)
    models = "\n".join(f"{name}  ({', '.join(roles)})" for name, roles in names.items())
    return [
        ("state", state),
        ("where", str(view.root)),
        ("questions", f"{count(len(plan.seeds))} from {', '.join(surveys)}"),
        ("cultures", ", ".join(culture.id for culture in plan.delegates)),
        ("dialogues", dialogue_facts(view)),
        ("models", models),
        ("made by", f"culturepark {run.file.code_version}, prompts {run.file.prompt_version}"),
        *([("never asked", never_asked(view))] if plan.unasked else []),
    ]


def dialogue_facts(view: View) -> str:
    """Kinds, styles and length of a plan's dialogues, in words."""
    plan = view.plan.settings
    turns = f"; {plan.utterances} turns each" if set(plan.kinds) != {"direct"} else ""
    styles = f"; {', '.join(plan.styles)}" if turns else ""
    return f"{', '.join(dict.fromkeys(plan.kinds))}{styles}{turns}; stances by {plan.stance}"


def never_asked(view: View) -> str:
    """Questions that get no dialogue with a culture, since they were not asked there."""
    by_culture: dict[str, list[str]] = {}
    for culture, seed in view.plan.unasked:
        by_culture.setdefault(culture, []).append(seed)
    return "\n".join(f"{culture}: {', '.join(seeds)}" for culture, seeds in by_culture.items())


def show_funnel(console: Console, view: View) -> None:
    """The refinement funnel: each row adds up from left to right."""
    heading(console, "From dialogues to samples")
    planned = view.plan.planned()
    console.print(funnel_table({c: funnels.view(f, planned[c]) for c, f in view.funnels.items()}))
    total = funnels.view(view.total, len(view.plan))
    if total["health"]:
        labels = sorted(total["health"].items(), key=lambda item: -item[1])
        words = ", ".join(f"{count(n)} {label.replace('_', ' ')}" for label, n in labels)
        console.print(Text(f"\nHealth of {plural(total['turns'], 'turn')}: {words}."))
    if not view.run.settings.refine.enabled:
        return
    text = Text("\nopinions = ", "dim")
    stages = [name for name, reasons in _STAGES if any(total["rejections"].get(r) for r in reasons)]
    if total["waiting"]:
        stages.append("waiting")
    text.append(" + ".join([*stages, "kept"]), "dim").append(". ", "dim")
    if total["waiting"]:
        text.append("Waiting opinions are chosen from once their question's dialogues have ended. ", "dim")
    console.print(text)
    verdicts = total["first_verdicts"]
    if verdicts:
        words = Text("First verdicts: ")
        for place, (verdict, style) in enumerate(VERDICT_STYLES.items()):
            words.append(", " if place else "").append(f"{count(verdicts.get(verdict, 0))} ", "bold")
            words.append(verdict, style)
        if total["rewritten"]:
            words.append(f" ({count(total['rewritten'])} rewritten and verified again)")
        console.print(words.append("."))
    if total["rejections"]:
        console.print()
        reasons = sorted(total["rejections"].items(), key=lambda item: -item[1])
        rows = [(count(n).rjust(7), REASONS.get(why) or str(why)) for why, n in reasons]
        console.print(Text("Why opinions are no samples:"))
        console.print(facts(rows))


def funnel_table(views: Mapping[str, Mapping[str, Any]]) -> Table:
    """The funnel by culture, of what `funnel.view` gives, with its total; columns of nothing but zeros
    are left out."""
    rows = [(culture, _funnel_row(seen)) for culture, seen in sorted(views.items())]
    names = list(_funnel_row(funnels.view({}, 0)))
    always = {"planned", "finished", "opinions", "kept"}
    names = [name for name in names if name in always or any(row[name] for _, row in rows)]
    made = table("culture", *names)
    for culture, row in rows:
        made.add_row(culture, *(_cell(name, row[name]) for name in names))
    if len(rows) > 1:
        made.add_section()
        totals = {name: sum(row[name] for _, row in rows) for name in names}
        made.add_row(Text("all", "bold"), *(_cell(name, totals[name], "bold") for name in names))
    return made


def _funnel_row(seen: Mapping[str, Any]) -> dict[str, int]:
    reasons: dict[str, int] = dict(seen["rejections"])
    stages = {name: sum(reasons.pop(r, 0) for r in of) for name, of in _STAGES}
    return {
        "planned": seen["planned"],
        "finished": seen["finished"],
        "failed": seen["failed"],
        "owed": seen["owed"],
        "opinions": seen["extracted"],
        **stages,
        "other": sum(reasons.values()),
        "waiting": seen["waiting"],
        "kept": seen["kept"],
    }


def _cell(name: str, number: int, style: str = "") -> Text:
    colour = {"kept": "green", "failed": "bold red" if number else "", "owed": "yellow"}.get(name, "")
    return Text(count(number), f"{style} {colour}".strip() if number else "dim")


def usage_table(total: Funnel, view: View) -> Table:
    """Calls, tokens and money by role."""
    made = table("role", "calls", "prompt tokens", "from cache", "completion tokens", "cost")
    for role, used in funnels.usage_view(total, view.run.settings).items():
        name = view.run.settings.roles.of(role) if role in ("speaker", "embedder") else ""
        name = name or view.run.settings.roles.speaker
        local = used["money"] == 0 and view.run.settings.models[name].engine != "openai"
        unknown = used["unreported"] and not used["prompt_tokens"]
        tokens = [
            "unknown" if unknown else count(used[f"{kind}_tokens"])
            for kind in ("prompt", "cached", "completion")
        ]
        made.add_row(role, count(used["calls"]), *tokens, money(used["money"], local))
    return made


def show_failures(console: Console, view: View) -> None:
    """Say loudly that dialogues failed, and why."""
    total = view.total
    if not total["failed"]:
        return
    kinds = funnels.view(total, len(view.plan))["failures"]
    words = Text(f"\n{plural(total['failed'], 'dialogue')} failed: ", "bold red")
    words.append(", ".join(f"{count(n)} {kind}" for kind, n in kinds.items()), "red")
    words.append(". Each is a row in dialogues/ with its reason.")
    console.print(words)
    rows: list[tuple[str, Text | str]] = [
        (row["id"][:9], line_of(f"{row['failure']}: {row['reason']}")) for row in view.some_failures(3)
    ]
    console.print(facts(rows))


def show_files(console: Console, view: View) -> None:
    """Where the results lie."""
    root, total = view.root, view.total
    heading(console, f"Files in {root}")
    shards = {kind: sum(shard.rows for shard in view.manifest.shards(kind)) for kind in SHARD_DIRS}
    rows: list[tuple[str, Text | str]] = [
        (
            "datasets/<culture>/",
            f"chat.jsonl and prompt-completion.jsonl to tune with: {plural(total['kept'], 'sample')}",
        ),
        ("samples/", f"the same with their whole provenance, Parquet: {plural(shards['samples'], 'row')}"),
        ("rejected/", f"opinions that were not kept, and why: {plural(shards['rejected'], 'row')}"),
        ("dialogues/", f"the transcripts: {plural(shards['dialogues'], 'row')}"),
        ("summary.json", "these counts; README.md is the dataset card"),
        ("logs/", "what happened, one JSON object a line"),
    ]
    if not (root / "summary.json").exists():
        rows = [row for row in rows if not row[0].startswith(("datasets", "summary"))]
    if view.logged:
        rows.append(("log/", f"{plural(len(view.logged), 'dialogue')} that ended and are not in shards yet"))
    console.print(Padding(facts(rows), (0, 0, 0, 1)))


# --- one dialogue


def show_dialogue(console: Console, view: View, row: dict[str, Any], reasons: bool = True) -> None:
    """One dialogue whole: who speaks, what they hold and how many hold it, every turn."""
    brief = view.plan.brief(row["number"])
    heading(console, f"Dialogue {row['id']}")
    console.print(said(f'"{row["statement"]}"', "bold"))
    told = [row["survey"] and f"{row['survey']} {row['wave']}", row["seed_id"], row["kind"]]
    told += [row["style"]] if row["kind"] != "direct" else []
    console.print(said("; ".join(part for part in (*told, row["language"]) if part), "dim"))
    console.print()
    console.print(Padding(_people(view, brief), (0, 0, 0, 1)))
    console.print(Padding(_distribution(brief), (1, 0, 1, 1)))
    turns = Table.grid(padding=(0, 2))
    turns.add_column(justify="right", style="dim", no_wrap=True)
    turns.add_column(no_wrap=True)
    turns.add_column(overflow="fold")
    for turn in row["turns"]:
        name = line_of(turn["name"], f"bold {_SPEAKERS[turn['speaker'] % 2]}")
        words = said(turn["text"])
        if turn.get("health"):
            words.append(f"  [{', '.join(turn['health'])}]".replace("_", " "), "yellow")
        turns.add_row(str(turn["number"]), name, words)
    console.print(turns)
    if row["status"] == "failed":
        words = Text(f"It failed here: {row['failure']}. ", "bold red").append_text(said(row["reason"]))
        console.print(words)
    for note in row["notes"]:
        console.print(said(f"Note: {note}.", "yellow"))
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
        name = line_of(persona.name, f"bold {_SPEAKERS[place % 2]}")
        who = said(_described(view, persona))
        if stance is None:
            who.append("\nthe main contact: holds no drawn answer", "dim")
        else:
            who.append("\nholds: ", "dim").append_text(said(stance.label, "bold"))
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
            held.setdefault(stance.code, []).append(line_of(persona.name, f"bold {_SPEAKERS[place % 2]}"))
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
        grid.add_row(said(option.label, style), bar, Text(f"{share:.1%}", style), who)
    return Group(said(f"The answers{asked} in {answers.country}:", "dim"), grid)


def _made_by(row: dict[str, Any]) -> Table:
    models = ", ".join(sorted({turn["model"] for turn in row["turns"] if turn["model"]})) or "nobody"
    took = max(0.0, row["ended_s"] - row["started_s"])
    used = {use["role"]: use for use in row["usage"]}
    calls = ", ".join(f"{role} {count(use['calls'])}" for role, use in used.items())
    return facts([("spoken by", models), ("took", clock(took)), ("calls", calls or "none")])


def _opinion(row: dict[str, Any], reasons: bool) -> Group:
    head = Text(f"turn {row['turn']:<4}")
    head.append_text(verdict_chain(row)).append("  ")
    head.append_text(fate(row))
    lines = [head, Padding(said(row["text"]), (0, 0, 0, 4))]
    if row["text"] != row["extracted"]:
        was = Text("said as: ", "dim").append_text(said(row["extracted"], "dim"))
        lines.append(Padding(was, (0, 0, 0, 4)))
    if reasons and row["verdict_reason"]:
        why = Text("verifier: ", "dim").append_text(line_of(row["verdict_reason"], "dim"))
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
    console.print(Text(where, "dim").append_text(line_of(turn["name"], "bold")))
    console.print(Padding(_with_span(turn["text"], row["start"], row["end"]), (0, 0, 1, 1)))
    console.print(Padding(_people(view, brief), (0, 0, 0, 1)))
    console.print(Padding(_distribution(brief), (1, 0, 0, 1)))
    heading(console, "What was done with it")
    console.print(facts([*_steps(row)]))
    heading(console, "Provenance")
    console.print(facts(_provenance(row)))


def messages_view(row: dict[str, Any]) -> Table:
    """A sample's chat messages, as a tuned model will read them."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for message in row["messages"]:
        style = "green" if message["role"] == "assistant" else ""
        grid.add_row(line_of(message["role"]), said(message["content"], style))
    return grid


def _with_span(text: str, start: int, end: int) -> Text:
    """A turn's text with the span of the opinion marked."""
    if tidy(text) != text:  # then what is printed is not what the span counts in
        return said(text)
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


# --- what closes a run


def show_closing(console: Console, view: View) -> None:
    """What a newcomer should see at the end: one dialogue, its opinions, samples, the funnel."""
    dialogue = view.telling_dialogue()
    if dialogue is not None:
        show_dialogue(console, view, dialogue, reasons=False)
        if view.run.settings.refine.enabled:
            show_opinions(console, view.opinions_of(dialogue), limit=12, reasons=False)
    samples = view.samples(3)
    if samples:
        heading(console, "Samples kept, as a model will be tuned on them")
        for sample in samples:
            console.print(Text(f"{sample['culture']}  ", "bold").append(short_id(sample["id"]), "dim"))
            console.print(Padding(messages_view(sample), (0, 0, 1, 2)))
    show_funnel(console, view)
    show_failures(console, view)
    show_files(console, view)
    root = shlex.quote(str(view.root))
    heading(console, "What next")
    console.print(command(f"culturepark show {root}"))
    if dialogue is not None:
        console.print(command(f"culturepark show {root} --dialogue {dialogue['id'][:9]}"))
    for sample in samples[:1]:
        console.print(command(f"culturepark show {root} --sample {short_id(sample['id'])}"))
    console.print(command(f"culturepark check {root}"))
