"""The command that trains again what a run trained. It imports what it needs when it runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from bascule.runtime.cli.command import Exit, Json, Run, app, make_console, on_store, print_json
from bascule.runtime.cli.processes import led
from bascule.schemas.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from bascule.runtime.audit.retrain import Iteration, Retraining, TrainingJob
    from bascule.runtime.cli.store import Store


@app.command()
@led
@on_store
async def train(
    store: Store,
    run: Run,
    request: Annotated[
        str,
        typer.Option(metavar="EVENT", help="The training job: its generation, or its request's subject or id."),
    ],
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute with so many threads; as many as recorded by default.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(metavar="NAME", help="Train the same samples with another algorithm.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Train again from the logged trajectories and compare the adapters; writes nothing.

    Exit 1 if they differ at the recorded numbers of threads and of processes and size of micro-batches. A launcher may
    start several processes.
    """
    from bascule.plugins.loader import plugins
    from bascule.runtime.audit.retrain import Kept, find_job, retrain
    from bascule.runtime.training.backend import TorchBackend

    cores = os.cpu_count() or 1
    if threads is not None and threads > 8 * cores:
        raise ConfigError(
            f"{threads} threads are asked for on {cores} cores.", next_step=f"Ask for {8 * cores} at the most."
        )
    job = await find_job(run, store.read(run), request)
    if algorithm is not None:
        plugins().registry.algorithms.get(algorithm)
    console = make_console()
    if not as_json:
        console.print(_header(run, job, algorithm), highlight=False, soft_wrap=True, markup=False)
    found = await retrain(
        job,
        Kept(run, store.log, store.blobs(run)),
        plugins().registry,
        TorchBackend(),
        threads=threads,
        algorithm=algorithm,
        listener=lambda i: None if as_json else _show_iteration(i, console),
    )
    if as_json:
        print_json(found)
    else:
        _show_result(found, console)
    promised = found.same_threads and found.same_processes and found.same_nodes
    differs = found.same is False or found.survived is not None
    return Exit.DIFFERS if differs and promised else Exit.SAME


def _header(run: str, job: TrainingJob, algorithm: str | None) -> str:
    r = job.request
    start = r.adapter or "the base model"
    text = f"{run}, generation {r.generation}: {r.iterations} update(s) with {r.algorithm} from {start}"
    if algorithm is None or algorithm == r.algorithm:
        return text
    return f"{text}; now with {algorithm}, on the samples of the recorded job's own adapters"


def _show_iteration(found: Iteration, console: Console) -> None:
    same = "" if found.recorded is None else "  same" if found.recorded == found.sha256 else f"  not {found.recorded}"
    text = f"  update {found.iteration}: {found.trajectories} trajectories, {found.sha256}{same}"
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _show_result(found: Retraining, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    for name, (then, now) in found.differing.items():
        say(f"{name}: {then} when it was recorded, {now} now")
    if found.same is not None and not found.same_threads:
        recorded = ", ".join(str(n) for n in sorted({i.recorded_threads for i in found.iterations}))
        say(
            f"{found.iterations[-1].threads} thread(s), where {recorded} are recorded: only at an equal count are "
            "adapters promised to be equal"
        )
    if found.same is not None and not found.same_processes:
        recorded = ", ".join(str(n) for n in sorted({i.recorded_processes for i in found.iterations}))
        say(
            f"{found.iterations[-1].processes} process(es), where {recorded} are recorded: adapters are promised to be "
            "the same to 1e-5, and equal only at an equal number"
        )
    if found.failed is not None:
        say(f"it fails as it is recorded to: {found.failed}")
    if found.survived is not None:
        say(f"it does not fail, and is recorded to have failed: {found.survived}")
    if not found.iterations:
        return
    last = found.last
    if last is None:
        made = found.iterations[-1]
        say(f"the adapter: {made.sha256}, of {found.algorithm}; there is none to compare it with")
    elif found.same:
        equal = found.same_threads and found.same_processes
        say(f"the same adapter: {last.sha256}{'' if equal else '; largest difference 0, relative L2 distance 0'}")
    else:
        d = found.distance
        how = (
            "the recorded one is not kept"
            if d is None
            else f"largest difference {d.max_abs:.3g}, relative L2 distance {d.relative_l2:.3g}"
        )
        say(f"another adapter: {last.sha256}, recorded {last.recorded}; {how}")
