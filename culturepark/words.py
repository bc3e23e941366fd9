"""Numbers, amounts and durations in words, as all output says them."""

from __future__ import annotations


def count(number: float) -> str:
    """A count with thousands apart: `12,345`."""
    return f"{round(number):,}"


def money(amount: float | None, local: bool = False) -> str:
    """Money in the currency of the configured prices; `unknown` where nothing is known."""
    if local:
        return "none (local)"
    if amount is None:
        return "unknown"
    return f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.4f}"


def clock(seconds: float) -> str:
    """A duration as `4:05` or `1:04:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plural(number: int, one: str, many: str = "") -> str:
    """`1 dialogue`, `2 dialogues`."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"
