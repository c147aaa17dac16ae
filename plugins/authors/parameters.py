"""What of a harness can be tuned: the parameters that it declares, in its manifest or beside them in a code file.

The manifest declares ``params`` in ``tunable``. A code file declares what stands in ``PARAMS = {...}`` in
``TUNABLE = {...}``, both literals at its top level, the latter with the fields of
:class:`~bascule.schemas.harness.Tunable`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import msgspec

from bascule.plugins.authors.dimensions import Dimension
from bascule.plugins.tasks.harness_files import literal, manifest_text, with_literal
from bascule.schemas.errors import HarnessError
from bascule.schemas.harness import Harness, Tunable

MANIFEST = "manifest.json"
VALUES, DECLARED = "PARAMS", "TUNABLE"


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter that may be set.

    Attributes:
        file: where it stands.
        present: its value in the harness as it is.
    """

    file: str
    name: str
    present: Any
    dimension: Dimension


def parameters(harness: Harness) -> tuple[Parameter, ...]:
    """Everything tunable of a harness, the manifest's first, then by file and name.

    Raises:
        HarnessError: a declaration is not usable; names the file and the parameter.
    """
    manifest = harness.manifest
    found = _declared(MANIFEST, manifest.params, manifest.tunable)
    for file, text in sorted(harness.files.items()):
        if not file.endswith(".py") or not _assigns(text, DECLARED):
            continue
        try:
            declared = msgspec.convert(literal(text, DECLARED), dict[str, Tunable])
        except msgspec.ValidationError as e:
            raise HarnessError(f"{DECLARED} of {file} is not usable: {e}.", next_step="Correct that field.") from e
        values = literal(text, VALUES)
        if not isinstance(values, dict):
            raise HarnessError(f"{VALUES} of {file} is no dictionary.", next_step="Give names and their values.")
        found += _declared(file, values, declared)
    return tuple(found)


def with_values(harness: Harness, values: Mapping[tuple[str, str], Any]) -> dict[str, str]:
    """The files that are other once parameters are set, by file and name, to ``values``.

    Raises:
        HarnessError: a value cannot be written.
    """
    changed = {}
    for file in sorted({file for file, _ in values}):
        new = {name: value for (f, name), value in values.items() if f == file}
        text = harness.files[file]
        if file == MANIFEST:
            manifest = harness.manifest
            if all(_same(manifest.params.get(name), value) for name, value in new.items()):
                continue
            text = manifest_text(msgspec.structs.replace(manifest, params={**manifest.params, **new}))
        else:
            text = with_literal(text, VALUES, {**literal(text, VALUES), **new})
        if text != harness.files[file]:
            changed[file] = text
    return changed


def _declared(file: str, values: Mapping[str, Any], tunable: Mapping[str, Tunable]) -> list[Parameter]:
    out = []
    for name, rule in sorted(tunable.items()):
        if name not in values:
            raise HarnessError(f"{file} declares {name!r} tunable and gives it no value.", next_step="Give it one.")
        dimension = Dimension(values=rule.values, low=rule.low, high=rule.high, log=rule.log, integer=rule.integer)
        fault = dimension.fault()
        if fault is not None:
            raise HarnessError(f"{file} declares {name!r} tunable {fault}.", next_step="Give values, or low and high.")
        out.append(Parameter(file=file, name=name, present=values[name], dimension=dimension))
    return out


def _assigns(text: str, name: str) -> bool:
    """Whether a code file assigns ``name`` at its top level; a string or a comment that says so does not count."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    targets = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
    targets += [s.target for s in body if isinstance(s, ast.AnnAssign)]
    return any(isinstance(t, ast.Name) and t.id == name for t in targets)


def _same(old: Any, new: Any) -> bool:
    """Whether two values are written the same way; True is no 1, and 1.0 neither."""
    return msgspec.json.encode(old, order="sorted") == msgspec.json.encode(new, order="sorted")
