"""Names and paths that cannot leave the run directory."""

from __future__ import annotations

import re
from pathlib import Path

from culturepark.errors import RunDirError

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def safe_name(text: str) -> str:
    """`text`, if it can be part of a file name anywhere.

    Lower-case letters, digits and hyphens, 1 to 64 of them, no hyphen first. Raises RunDirError.
    """
    # fullmatch, because `$` would let a line feed through at the end.
    if _NAME.fullmatch(text):
        return text
    raise RunDirError(
        ascii(text[:80]),
        "this cannot be used as a name",
        "Use up to 64 lower-case letters, digits and hyphens, and begin with a letter or a digit.",
    )


def inside(root: Path, path: str | Path) -> Path:
    """The resolved `path`, relative to `root` if it is not absolute, if it lies strictly below `root`.

    Symbolic links are followed before the check. Raises RunDirError.
    """
    try:
        base = root.resolve()
        full = (base / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, NUL in a name
        raise RunDirError(ascii(str(path)[:200]), f"this is not a usable path ({error})") from error
    if full == base or not full.is_relative_to(base):
        raise RunDirError(
            ascii(str(path)[:200]),
            f"this path leads out of {base}",
            "Files of a run stay inside its directory: use a relative path without `..`.",
        )
    return full
