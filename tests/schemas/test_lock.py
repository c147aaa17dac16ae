"""The schema lock: whatever changes in a struct that an event holds, however deep, is seen."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import msgspec
import pytest

from bascule.schemas.events import TYPES

#: Puts a module with one line of its source changed in place of its own, and asks the lock.
PROGRAM = """
import importlib.util, sys
name, struct, old, new = sys.argv[1:]
spec = importlib.util.find_spec(name)
source = open(spec.origin).read()
at = source.index(old, source.index(f"class {struct}("))
module = sys.modules[name] = importlib.util.module_from_spec(spec)
exec(compile(source[:at] + new + source[at + len(old):], spec.origin, "exec"), module.__dict__)
from bascule.schemas import lock
print("\\n".join(lock.differences()))
"""


def holds(type_: Any, struct: str) -> bool:
    """Whether a struct of that name can stand in ``type_``."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return type_.__name__ == struct or any(holds(f.type, struct) for f in msgspec.structs.fields(type_))
    return any(holds(inner, struct) for inner in get_args(type_))


@pytest.mark.parametrize(
    ("module", "struct", "old", "new"),
    [
        ("trajectory", "Trajectory", "steps: tuple", "parts: tuple"),
        ("trajectory", "Output", "text: str", "text: str | None"),
        ("trajectory", "Scored", "reward: float", "reward: int"),
        ("trajectory", "Unscored", "reason: str", "reason: str\n    detail: str = ''"),
        ("trajectory", "Sampling", "le=1_000_000", "le=1_000"),
        ("trajectory", "ToolCall", 'tag="tool"', 'tag="use"'),
        ("trajectory", "EpisodeError", '"crash", ', ""),
        ("decision", "Option", "    feasible: bool = True\n", ""),
        ("decision", "Evidence", "value: float", "value: float = 0.0"),
        ("landscape", "RewardLandscape", "    skew: float\n", ""),
        ("landscape", "Interval", "low: float\n    high: float", "high: float\n    low: float"),
        ("run", "GateConfig", "= 0.05", "= 0.01"),
        ("run", "PluginPin", "hash: str", "digest: str"),
    ],
)
def test_a_changed_field_of_a_nested_struct_is_seen_in_every_event_that_holds_it(
    module: str, struct: str, old: str, new: str
) -> None:
    program = [sys.executable, "-c", PROGRAM, f"bascule.schemas.{module}", struct, old, new]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    changed = {line.removesuffix(": changed") for line in done.stdout.splitlines()}
    holders = {f"{type_}/{version}" for (type_, version), data in TYPES.items() if holds(data, struct)}
    assert holders
    assert holders <= changed
