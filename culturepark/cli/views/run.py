"""A run on the terminal: its summary, its funnel, and what is shown when it ends."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from culturepark.cli.views.dialogue import REASONS, messages_view, short_id, show_dialogue, show_opinions
from culturepark.cli.views.terminal import VERDICT_STYLES, command, heading, key_values, safe_line, table
from culturepark.store import funnel as funnels
from culturepark.store.funnel import Funnel
from culturepark.store.lock import being_written
from culturepark.store.rundir import SHARD_DIRS, Run
from culturepark.store.view import View
from culturepark.words import count, money, plural

_STAGES = (
    ("no opinion", ("no_opinion", "too_short")),
    ("off stance", ("contradicts", "contradicts_after_rewrite", "off_topic_after_rewrite", "novel")),
    ("same as another", ("near_duplicate",)),
    ("similar", ("cluster",)),
)


def show_start(console: Console, run: Run, done: int) -> None:
    """What begins: how many dialogues, where, with which model. `done` of them ended in earlier sessions."""
    plan = run.plan
    parts = ((len(plan), "dialogue"), (len(plan.delegates), "culture"), (len(plan.seeds), "question"))
    what = ", ".join(plural(number, noun) for number, noun in parts)
    console.print(safe_line(f"{what} -> {run.root}", "bold"))
    speaker = run.file.models.get("speaker", "")
    console.print(safe_line(f"Spoken by {speaker}", "dim"))
    if plan.unasked:
        pairs = plural(
            len(plan.unasked), "pair of culture and question was", "pairs of culture and question were"
        )
        console.print(f"{pairs} never asked: `culturepark plan` lists them.", style="dim", markup=False)
    if done:
        console.print(f"Resuming: {count(done)} of {count(len(plan))} done.", style="cyan")


def show_complete(console: Console, view: View) -> None:
    """Say that every planned dialogue has ended before."""
    planned, failed = len(view.plan), view.total["failed"]
    words = f"{view.root} is complete: all {plural(planned, 'dialogue')} have ended."
    console.print(safe_line(words, "bold green"))
    if failed:
        console.print(f"{count(failed)} of them failed.", style="bold red")
    console.print("Nothing to do.")


def show_summary(console: Console, view: View) -> None:
    """What a run holds: how far it is, the funnel by culture, what it took, where the files are."""
    file, total = view.run.file, view.total
    heading(console, f"Run {file.run_id}")
    console.print(Padding(key_values(_about(view)), (0, 0, 0, 1)))
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
        console.print(key_values(rows))


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
        (row["id"][:9], safe_line(f"{row['failure']}: {row['reason']}")) for row in view.some_failures(3)
    ]
    console.print(key_values(rows))


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
    console.print(Padding(key_values(rows), (0, 0, 0, 1)))


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
