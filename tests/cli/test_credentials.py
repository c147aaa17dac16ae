"""Whoever logs in with a file can do so with every command that reaches a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from bascule.runtime.cli.app import app
from bascule.schemas.errors import ConfigError

WHAT = {"run": "r1", "service": "rollout", "what": "1", "a": "r1", "b": "r2", "sha256": "ab" * 32, "exports": "out.tar"}


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(group, "commands"):
        yield path, group
        return
    for name, command in group.commands.items():
        yield from commands(command, (*path, name))


REMOTE = {
    path: command
    for path, command in commands(typer.main.get_command(app))
    if any(parameter.name == "url" for parameter in command.params)
}


def test_there_are_commands_that_reach_a_server() -> None:
    assert {("run",), ("status",), ("verify",), ("dlq", "retry"), ("blobs", "gc"), ("ops", "init")} <= set(REMOTE)


@pytest.mark.parametrize("path", REMOTE, ids="-".join)
def test_every_command_that_reaches_a_server_logs_in_with_the_file_that_is_named(
    path: tuple[str, ...], tmp_path: Path
) -> None:
    given: list[str] = []
    for parameter in REMOTE[path].params:
        if parameter.param_type_name == "argument":
            given.append(WHAT[parameter.name])
        elif parameter.required and parameter.name != "url":
            given += [parameter.opts[0], "1"]
    if path == ("export",):
        given += ["-o", str(tmp_path / "out.tar")]
    if path == ("run",):
        given += ["--engine", "constant", "--levers", "harness", "--set", "engine.text=yes"]
    named = tmp_path / "none.json"
    to = ["--url", "nats://127.0.0.1:1", "--credentials", str(named)]
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        CliRunner().invoke(app, [*path, *given, *to], env={"BASCULE_HOME": str(tmp_path)}, catch_exceptions=False)
