"""The canaries: none gets out where the mechanisms are there, each gets out where nothing holds it."""

from __future__ import annotations

import os

import msgspec
import pytest

from bascule.schemas.errors import ConfigError
from bascule.schemas.sandbox import LAYERS, SandboxConfig, SandboxReport
from bascule.verifiers.sandbox.confine import kernel
from bascule.verifiers.sandbox.layered import LayeredSandbox
from bascule.verifiers.sandbox.probe import choose, probe, require, unsafe_report
from bascule.verifiers.sandbox.unsafe import UnsafeSandbox

# Outside, others may be stopped as well: by who one is, by a setting of the machine, or because they were not tried.
FREE = {
    "read-planted-secret",
    "read-through-symlink",
    "read-through-dots",
    "find-inherited-descriptor",
    "write-outside",
    "tcp",
    "udp",
    "dns",
    "unix-socket",
    "abstract-unix-socket",
    "signal-parent",
    "signal-other",
    "see-processes",
    "fork-where-forbidden",
    "outlive",
    "memory",
    "disk",
}


def test_all_layers_hold_where_landlock_and_seccomp_are_there(sandbox: LayeredSandbox) -> None:
    report = probe(sandbox)
    through = [canary.name for canary in report.canaries if not canary.held]
    if {"landlock", "seccomp"} <= set(sandbox.mechanisms.mechanisms):
        assert through == []
        assert report.holds == LAYERS
    # What is reported is what was found: a layer holds when all its canaries were held.
    assert report.holds == tuple(layer for layer in LAYERS if all(c.held for c in report.canaries if c.layer == layer))
    assert {canary.layer for canary in report.canaries} == set(LAYERS)
    assert report.kind == "layered"
    assert all(canary.by for canary in report.canaries if canary.held)


def test_every_canary_gets_out_where_nothing_holds_it(sandbox: LayeredSandbox) -> None:
    controls = {canary.name: canary.control for canary in probe(sandbox).canaries}
    assert {name for name in FREE if not controls[name]} == set()


def test_each_missing_mechanism_is_found_out() -> None:
    # Without seccomp and a network of its own, nothing but Landlock's TCP stands before the network.
    report = probe(LayeredSandbox(without=("namespaces", "seccomp")))
    through = {canary.name for canary in report.canaries if not canary.held}
    assert {"udp", "dns", "unix-socket", "fork-where-forbidden"} <= through
    assert not {"network", "processes"} & set(report.holds)
    assert any("seccomp" in line for line in report.missing)
    with pytest.raises(ConfigError) as caught:
        require(report, SandboxConfig(require=("files", "network")))
    assert "network (" in caught.value.message
    assert "udp" in caught.value.message
    assert "--unsafe-no-sandbox" in str(caught.value.next_step)
    assert "processes" not in caught.value.message


def test_without_landlock_files_are_open_and_seccomp_still_holds_the_rest() -> None:
    report = probe(LayeredSandbox(without=("namespaces", "landlock")))
    held = {canary.name for canary in report.canaries if canary.held}
    assert "files" not in report.holds
    # As root the program has another user id, and may be unable even to read the interpreter: then nothing is held.
    if not kernel.permitted_capabilities() and "seccomp" in report.mechanisms:
        assert {"network", "privileges", "memory", "disk", "time"} <= set(report.holds)
        assert {"signal-parent", "signal-other", "trace-other", "fork-where-forbidden", "outlive"} <= held


def test_what_is_not_required_may_be_missing() -> None:
    report = SandboxReport(kind="layered", mechanisms=(), missing=("seccomp: none",), holds=("files", "time"))
    require(report, SandboxConfig(require=("files",)))
    with pytest.raises(ConfigError, match=r"network \(not probed\).*seccomp: none"):
        require(report, SandboxConfig())


def test_a_run_gets_the_probed_sandbox_or_none_when_it_says_so() -> None:
    sandbox, report = choose(SandboxConfig(require=("time",)))
    assert isinstance(sandbox, LayeredSandbox)
    assert report == probe(sandbox)
    assert msgspec.json.decode(msgspec.json.encode(report), type=SandboxReport) == report
    unsafe, said = choose(SandboxConfig(unsafe=True))
    assert isinstance(unsafe, UnsafeSandbox)
    assert said == unsafe_report()
    assert (said.kind, said.holds, said.uid) == ("unsafe", (), os.getuid())
