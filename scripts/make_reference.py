"""Write docs/configuration.md from the docstrings in culturepark/settings.py.

    python scripts/make_reference.py [--check]

`--check` writes nothing and exits 1 if the page is not what the code says.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "culturepark" / "settings.py"
PAGE = ROOT / "docs" / "configuration.md"

# Rooms in the order of a configuration file, with the table they are.
ROOMS = {
    "ModelSettings": "[models.NAME]",
    "RoleSettings": "[roles]",
    "PlanSettings": "[plan]",
    "SamplingSettings": "[sampling.ROLE]",
    "RefineSettings": "[refine]",
    "PaperFaults": "[refine.faults]",
    "HealthSettings": "[health]",
    "LimitSettings": "[limits]",
    "BudgetSettings": "[budget]",
    "ActorSettings": "[actors]",
    "StoreSettings": "[store]",
    "TrainingSettings": "[training]",
}

INTRO = """# Configuration

A configuration is a TOML file. Copy one from `config/` and change it; every key has a default but
`[models]` and `[roles]`. An unknown key is refused with its path. `--set a.b=value` overrides a key from the
command line. Paths are relative to the file they stand in, those given by `--set` to the working directory.
The resolved settings are saved in `run.json`.

`[models]`, `[roles]`, `[plan]`, `[sampling]`, `[refine]` and `[health]` decide what is generated: a run
directory can only be resumed with the same ones (where models, seeds and cultures are found may change). The
other tables may change at any time.

This page is made from `culturepark/settings.py` by `scripts/make_reference.py`.
"""


def page() -> str:
    """The page's text."""
    tree = ast.parse(SOURCE.read_text("utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    aliases = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    parts = [INTRO]
    for name, table in ROOMS.items():
        node = classes[name]
        parts.append(f"\n## `{table}`\n\n{_flat(ast.get_docstring(node) or '')}\n")
        parts.append("| key | type | default | |\n|---|---|---|---|")
        body = node.body
        for at, item in enumerate(body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                after = body[at + 1] if at + 1 < len(body) else None
                said = _said(after)
                default = f"`{ast.unparse(item.value)}`" if item.value else "required"
                kind = _kind(item.annotation, aliases)
                parts.append(f"| `{item.target.id}` | {kind} | {default} | {said} |")
    return "\n".join(parts) + "\n"


_PLAIN = {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}


def _kind(node: ast.expr, aliases: dict[str, ast.expr]) -> str:
    """A type in words."""
    if isinstance(node, ast.Name):
        return _PLAIN.get(node.id) or (_kind(aliases[node.id], aliases) if node.id in aliases else "table")
    if isinstance(node, ast.BinOp):  # X | None
        return _kind(node.left, aliases)
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return ast.unparse(node)
    inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    match node.value.id:
        case "Literal":
            return ", ".join(f"`{ast.literal_eval(one)}`" for one in inside)
        case "tuple":
            return f"list of: {_kind(inside[0], aliases)}"
        case "dict":
            return "table of text"
        case _:  # Annotated[number, Meta(...)]
            limits = {k.arg: eval_number(k.value) for k in inside[1].keywords}  # type: ignore[attr-defined]
            low = limits.get("ge", limits.get("gt"))
            over = "over " if "gt" in limits else ""
            return f"{_kind(inside[0], aliases)}, {over}{low:,} to {limits['le']:,}"


def eval_number(node: ast.expr) -> float:
    """A number written as a number, or as shifts and signs of numbers."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -eval_number(operand)
        case ast.BinOp(left=left, op=ast.LShift(), right=right):
            return int(eval_number(left)) << int(eval_number(right))
        case _:
            raise ValueError(ast.unparse(node))


def _said(node: ast.stmt | None) -> str:
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return _flat(node.value.value)
    return ""


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write or check the page."""
    text = page()
    if "--check" in sys.argv:
        return 0 if PAGE.exists() and PAGE.read_text("utf-8") == text else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
