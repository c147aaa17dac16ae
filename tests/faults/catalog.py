"""Every fault that is injected. A new one is a function of a module here, and an entry."""

from __future__ import annotations

from tests.faults.corruption import corrupt_store
from tests.faults.disk import fill_disk, fill_store
from tests.faults.endless import run_on
from tests.faults.fault import Fault
from tests.faults.kills import kill_services
from tests.faults.network import disturb_network
from tests.faults.power import lose_power
from tests.faults.redelivery import redeliver_work
from tests.faults.server_kill import kill_server
from tests.faults.stale_writer import wake_stale_writer
from tests.faults.whole_runs import (
    disturb_deliveries,
    fill_disk_of_run,
    kill_server_of_run,
    pause_services,
    poison_run,
    skew_clocks,
)

#: Faults of the log itself.
LOG = (
    Fault(
        name="server-kill",
        does="SIGKILL of the server under 8 writers: singles, batches, contended and abandoned appends",
        inject=kill_server,
        full=40,
        quick=5,
    ),
    Fault(
        name="network",
        does="delays, cuts, silence, lost and repeated acknowledgements before 4 writers, a follower and a worker",
        inject=disturb_network,
        full=30,
        quick=2,
    ),
    Fault(
        name="power-loss",
        does="the store as it lies on the disk after an acknowledgement",
        inject=lose_power,
        full=50,
        quick=5,
    ),
    Fault(
        name="store-full",
        does="the server's room for the log is used up, and raised",
        inject=fill_store,
        full=4,
        quick=1,
    ),
    Fault(name="disk-full", does="the disk is full, and grows", inject=fill_disk, full=3, quick=1),
    Fault(
        name="redelivery",
        does="every trigger goes to three workers, who answer in a shuffled order",
        inject=redeliver_work,
        full=200,
        quick=20,
    ),
    Fault(
        name="stale-writer",
        does="a process is paused for longer than its lease and wakes up after another took its job",
        inject=wake_stale_writer,
        full=10,
        quick=2,
    ),
    Fault(
        name="corruption",
        does="flipped bits and cut files: the server's store, blobs, the anchor, an export",
        inject=corrupt_store,
        full=200,
        quick=14,
    ),
)

#: Faults of whole runs, which also compare the runs' decisions.
RUNS = (
    Fault(
        name="run-kills",
        does="SIGKILL of every service and command before, in and after the append of every type of event, in two runs",
        inject=kill_services,
        full=1000,
        quick=3,
    ),
    Fault(
        name="run-pauses",
        does="a trainer, rollout, verifier and feedback paused in their work, which a second one does, and woken",
        inject=pause_services,
        full=4,
        quick=1,
    ),
    Fault(
        name="run-server-kill",
        does="SIGKILL of the server during a run of five services, and its restart",
        inject=kill_server_of_run,
        full=5,
        quick=0,
    ),
    Fault(
        name="run-clocks",
        does="services whose clocks are a day ahead or behind",
        inject=skew_clocks,
        full=2,
        quick=0,
    ),
    Fault(
        name="run-deliveries",
        does="work that is handed out late, twice and in any order, to two rollouts and two verifiers",
        inject=disturb_deliveries,
        full=2,
        quick=0,
    ),
    Fault(
        name="run-poison",
        does="an event with which no verifier can do anything",
        inject=poison_run,
        full=1,
        quick=1,
    ),
    Fault(
        name="run-disk-full",
        does="a run on a disk that is full, and grows",
        inject=fill_disk_of_run,
        full=1,
        quick=0,
    ),
    Fault(
        name="run-endless",
        does="300 generations: the memory of the serving process, replay, status and verify",
        inject=run_on,
        full=300,
        quick=0,
    ),
)

FAULTS = (*LOG, *RUNS)
