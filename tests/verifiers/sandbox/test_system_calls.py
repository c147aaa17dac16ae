"""The seccomp filters, run by an interpreter of their language, for both machines."""

from __future__ import annotations

import errno
import struct

import pytest

from bascule.verifiers.sandbox.confine import syscalls

ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
THREAD = 0x3D0F00  # what glibc asks of clone for a thread
FORK = 0x01200011


def verdict(filter_: bytes, machine: int, number: int, first: int = 0) -> int:
    """What a filter returns for a call (``linux/filter.h``, ``struct seccomp_data``)."""
    data = struct.pack("=IIQ6Q", number, machine, 0, first, 0, 0, 0, 0, 0)
    steps = list(struct.iter_unpack("HBBI", filter_))
    at = accumulator = 0
    while True:
        code, yes, no, value = steps[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == 0x06:
            return int(value)
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += yes if holds else no


@pytest.mark.parametrize("machine", MACHINES)
def test_each_named_call_is_refused_and_others_are_not(machine: str) -> None:
    column, audit = MACHINES[machine]
    filter_ = syscalls.program(machine=machine)
    refused = {n[column] for n in syscalls.NUMBERS.values()} - {-1}
    absent = {n[column] for n in syscalls.UNCOUNTED_MEMORY.values()} | {syscalls.CLONE3[column]}
    for number in range(600):
        expected = ALLOW
        if number in refused:
            expected = ERROR | errno.EPERM
        elif number in absent:
            expected = ERROR | errno.ENOSYS
        assert verdict(filter_, audit, number) == expected, number


@pytest.mark.parametrize("machine", MACHINES)
def test_another_machines_calls_end_the_program(machine: str) -> None:
    column, audit = MACHINES[machine]
    for filter_ in (syscalls.program(machine=machine), syscalls.only_threads(machine)):
        assert verdict(filter_, 0x40000003, 1) == KILL
        assert verdict(filter_, audit, 1) == ALLOW
        assert (verdict(filter_, audit, 0x40000001) == KILL) == (column == 0)


@pytest.mark.parametrize("machine", MACHINES)
def test_clone_makes_no_namespace_and_where_forbidden_no_process(machine: str) -> None:
    column, audit = MACHINES[machine]
    clone = syscalls.CLONE[column]
    first, second = syscalls.program(machine=machine), syscalls.only_threads(machine)
    for flag in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x80):
        assert verdict(first, audit, clone, FORK | flag) == ERROR | errno.EPERM
    assert verdict(first, audit, clone, FORK) == verdict(first, audit, clone, THREAD) == ALLOW
    assert verdict(second, audit, clone, FORK) == ERROR | errno.EPERM
    assert verdict(second, audit, clone, 0x4111) == ERROR | errno.EPERM  # vfork by clone
    assert verdict(second, audit, clone, THREAD) == ALLOW
    for number in [n[column] for n in syscalls.FORKS.values() if n[column] >= 0]:
        assert verdict(second, audit, number) == ERROR | errno.EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_signals_go_to_the_process_and_its_group_alone_where_that_is_asked(machine: str) -> None:
    column, audit = MACHINES[machine]
    filter_ = syscalls.program(machine=machine, signals_to=4711)
    for name in syscalls.SIGNALS:
        number = syscalls.SIGNALS[name][column]
        assert verdict(filter_, audit, number, 4711) == verdict(filter_, audit, number, 0) == ALLOW
        for other in (1, 4712, 2**32 - 1):
            assert verdict(filter_, audit, number, other) == ERROR | errno.EPERM
    for numbers in syscalls.BLIND_SIGNALS.values():
        assert verdict(filter_, audit, numbers[column], 4711) == ERROR | errno.EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_group_and_core_are_held_where_that_is_asked(machine: str) -> None:
    column, audit = MACHINES[machine]
    for asked, group in (("own_group", syscalls.NEW_GROUPS), ("pinned", syscalls.AFFINITY)):
        for numbers in group.values():
            held = verdict(syscalls.program(machine=machine, **{asked: True}), audit, numbers[column])
            assert (held, verdict(syscalls.program(machine=machine), audit, numbers[column])) == (
                ERROR | errno.EPERM,
                ALLOW,
            )
