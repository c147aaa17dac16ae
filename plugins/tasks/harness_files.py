"""The files of a harness: reference code with a task's prompt and parameters, and literals in code files."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from bascule.schemas.errors import HarnessError
from bascule.schemas.harness import HarnessManifest, parse_manifest

#: Fields that every manifest shows.
ALWAYS = ("name", "timeout_seconds", "max_model_calls", "max_tool_calls", "max_output_bytes", "tools", "params")
REFERENCE = Path(__file__).with_name("reference_harness.py")
WIDENED = Path(__file__).with_name("widened_harness.py")
#: What ``harness.py`` is called once that of :data:`WIDENED` stands in front of it.
ANSWERING = "answering.py"
_LINE_END = re.compile("\r\n|\r|\n")


def manifest_text(manifest: HarnessManifest) -> str:
    """``manifest.json`` with sorted parameters, so that equal manifests have equal bytes."""
    ordered = msgspec.to_builtins(manifest, order="sorted")
    # Harnesses of recorded runs are known by their bytes: what came later is left out where it is as it was then.
    usual = msgspec.to_builtins(HarnessManifest(name=""))
    ordered = {k: v for k, v in ordered.items() if k in ALWAYS or v != usual[k]}
    return msgspec.json.format(msgspec.json.encode(ordered, order="sorted"), indent=2).decode() + "\n"


def reference_files(*, name: str, system_prompt: str, params: dict[str, Any]) -> dict[str, str]:
    """The harness directory of ``reference_harness.py`` under ``params``; see that module for what they mean."""
    return {
        "harness.py": REFERENCE.read_text(encoding="utf-8"),
        "manifest.json": manifest_text(HarnessManifest(name=name, params=params)),
        "system_prompt.md": system_prompt.strip() + "\n",
    }


def can_widen(files: Mapping[str, str]) -> bool:
    """Whether the parameters of ``widened_harness.py`` can be had: they are there, or it can be put in front."""
    if files["harness.py"] == WIDENED.read_text(encoding="utf-8"):
        return True
    manifest = parse_manifest(files["manifest.json"])
    own = {"nearest", "after"} & set(manifest.params)  # which mean another thing there
    return ANSWERING not in files and manifest.isolation == "episode" and not own


def widened(files: Mapping[str, str]) -> dict[str, str]:
    """The files with ``widened_harness.py`` in front of ``harness.py``, once."""
    code = WIDENED.read_text(encoding="utf-8")
    if files["harness.py"] == code:
        return dict(files)
    return {**files, ANSWERING: files["harness.py"], "harness.py": code}


def literal(text: str, name: str) -> Any:
    """The value of ``name = ...`` at the top level of a code file.

    Raises:
        HarnessError: the file does not parse, has no such assignment or several, or its value is no literal.
    """
    node = _assigned(text, name)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as e:
        raise HarnessError(
            f"{name} in line {node.lineno} is no literal.", next_step="Write its value without names and calls."
        ) from e


def with_literal(text: str, name: str, value: Any) -> str:
    """``text`` with ``name = value``; nothing else moves, of a dictionary only the values that are other.

    Raises:
        HarnessError: as :func:`literal`, or ``value`` is nothing that a literal can say.
    """
    old = literal(text, name)
    changed = text
    # From behind, so that the places of those before stay true.
    for start, end, new in reversed(_replaced(text, _assigned(text, name), old, value)):
        changed = changed[:start] + new + changed[end:]
    if repr(literal(changed, name)) != repr(value):
        raise HarnessError(
            f"{name} cannot be set to {value!r:.200}.", next_step="Use numbers, text, None, lists and dictionaries."
        )
    return changed


def _assigned(text: str, name: str) -> ast.expr:
    """What is assigned to ``name``, once, at the top level."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as e:
        raise HarnessError(f"The code file of {name} does not parse: {e}.", next_step="Correct it.") from e
    found: list[ast.expr] = []
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.expr() as value) if target == name:
                found.append(value)
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                found.append(value)
    if len(found) != 1:
        raise HarnessError(
            f"The code file assigns {name} at its top level {len(found)} times.", next_step="Assign it once."
        )
    return found[0]


def _replaced(text: str, node: ast.expr, old: Any, new: Any) -> list[tuple[int, int, str]]:
    """What to put where (start, end, text), in order, so that ``node`` says ``new`` instead of ``old``."""
    if repr(old) == repr(new):  # which tells 1 from 1.0 and True
        return []
    if isinstance(node, ast.Dict) and isinstance(new, dict) and list(new) == list(old) and len(node.keys) == len(old):
        pairs = zip(node.values, old, strict=True)
        return [place for value, key in pairs for place in _replaced(text, value, old[key], new[key])]
    start = _offset(text, node.lineno, node.col_offset)
    end = _offset(text, node.end_lineno or node.lineno, node.end_col_offset or 0)
    return [(start, end, repr(new))]


def _offset(text: str, line: int, column: int) -> int:
    """The index of a place that the parser gives as a line from 1 and a column in bytes."""
    starts = [0, *(m.end() for m in _LINE_END.finditer(text))]
    start = starts[line - 1]
    return start + len(text[start:].encode()[:column].decode())
