"""Does each algorithm improve the embedded task? Real runs from one start, with one budget of sampled trajectories.

Every arm is a run of the product that pulls the weights once: the base model under the first harness, one training job
of the algorithm with its defaults, dev before and after. An arm that samples anew in every iteration and one that
trains from what is logged sample equally many train trajectories. The arms of an algorithm are its seeds; their dev
items are taken together in one paired test.

``python -m ops.bench algorithms [--home FOLDER]``: with a home, finished arms are kept and not made again.
"""

from __future__ import annotations

import asyncio
import copy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bascule.plugins.loader import plugins
from bascule.runtime.cli import configuration, launch
from bascule.runtime.cli.store import Store, open_store
from bascule.runtime.training.data import load_trajectories
from bascule.schemas import events as ev
from bascule.schemas.decision import Option
from bascule.schemas.envelope import Recorded
from bascule.schemas.trajectory import Scored
from bascule.trainers.base_model import resolve_model
from bascule.trainers.batch import micro_batches, probes
from bascule.trainers.forward import hidden_states
from bascule.trainers.loop import TrainJob
from bascule.verifiers.gate import paired_test, score
from ops.bench.report import Figure, figure

ALGORITHMS = ("ppo", "grpo", "entropic", "reinforce", "dpo", "best_of_n")
SEEDS = (1, 2, 3)
STEPS = 6
BATCH = 256  # train trajectories of an iteration
LANDSCAPE = 32  # train examples of 8 samples that an arm which samples anew is chosen by before it starts
BUDGET = LANDSCAPE * 8 + STEPS * BATCH
ALPHA = 0.05


@dataclass(frozen=True)
class Arm:
    """What one run came to.

    Attributes:
        before: reward of each dev item under the base model, None where it has no score.
        after: under the trained adapter; empty where the job failed.
        kl: mean exact KL divergence in nats of the trained policy from the base model at the tokens of its dev answers.
        tokens: that the job sampled and trained from.
        trajectories: train trajectories that were sampled.
        seconds: wall-clock of the run.
        failure: why there is no adapter.
    """

    before: tuple[float | None, ...]
    after: tuple[float | None, ...]
    kl: float
    tokens: int
    trajectories: int
    seconds: float
    failure: str = ""


def run(home: Path | None = None) -> tuple[dict[str, Figure], list[str]]:
    """Make all arms and judge each algorithm; a line of the notes begins with FAIL where it did not improve."""
    if home is None:
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(_run(Path(folder)))
    return asyncio.run(_run(home))


async def _run(home: Path) -> tuple[dict[str, Figure], list[str]]:
    figures: dict[str, Figure] = {}
    notes = [f"{BUDGET} train trajectories an arm; dev items of seeds {', '.join(map(str, SEEDS))} in one paired test"]
    async with open_store(home, exclusive=True) as store:
        arms: dict[str, list[Arm]] = {algorithm: [] for algorithm in ALGORITHMS}
        for seed in SEEDS:  # the first verdict on each algorithm comes after a third of the time
            for algorithm, made in arms.items():
                made.append(await _arm(store, algorithm, seed))
                print(f"seed {seed}: {verdict(algorithm, made[-1:])}", file=sys.stderr, flush=True)
    for algorithm, made in arms.items():
        figures |= _figures(algorithm, made)
        notes.append(verdict(algorithm, made))
    return figures, notes


def verdict(algorithm: str, arms: Sequence[Arm]) -> str:
    """One line: ``ok`` or ``FAIL``, the scores, and the paired test over all arms."""
    failures = [a.failure for a in arms if a.failure]
    if failures:
        return f"FAIL {algorithm}: {failures[0]}"
    before, after = [x for a in arms for x in a.before], [x for a in arms for x in a.after]
    test = paired_test(after, before, seed=0)
    ok = test.p < ALPHA and score(after) > score(before)
    scores = "; ".join(f"{score(a.before):.3f} -> {score(a.after):.3f}" for a in arms)
    counted = f"p = {test.p:.2g} ({test.wins} better, {test.losses} worse)"
    return f"{'ok' if ok else 'FAIL'} {algorithm}: dev {scores}; {counted}"


def _figures(algorithm: str, arms: Sequence[Arm]) -> dict[str, Figure]:
    done = [a for a in arms if a.after]
    if not done:
        return {}
    start, end = [score(a.before) for a in done], [score(a.after) for a in done]
    ratio = statistics.fmean(end) / max(statistics.fmean(start), 1e-9)
    return {
        f"{algorithm}: dev at the start": figure(start, "score"),
        f"{algorithm}: dev at the end": figure(end, "score", baseline="the start", ratio=ratio),
        f"{algorithm}: KL to the base": figure([a.kl for a in done], "nats"),
        f"{algorithm}: tokens trained from": figure([a.tokens for a in done], ""),
        f"{algorithm}: train trajectories": figure([a.trajectories for a in done], ""),
        f"{algorithm}: wall-clock": figure([a.seconds for a in done], "s"),
    }


def settings(algorithm: str, seed: int) -> list[str]:
    """The arm's configuration, as ``--set`` has it."""
    defaults = plugins().registry.algorithms.get(algorithm).defaults()
    on_policy = plugins().registry.algorithms.get(algorithm).requires.on_policy
    samples = int(defaults["num_generations"])
    out = [
        f"seed={seed}",
        f"task.split_seed={seed}",  # other dev items, so that the arms' pairs are independent
        f"policy.algorithm={algorithm}",
        "evaluation.train_samples=8",
        f"evaluation.train_groups={LANDSCAPE if on_policy else BUDGET // 8}",
        "evaluation.sealed_examples=1",
    ]
    if on_policy:
        out += [f"algorithms.{algorithm}.steps={STEPS}", f"algorithms.{algorithm}.groups={BATCH // samples}"]
    return out


async def _arm(store: Store, algorithm: str, seed: int) -> Arm:
    name = f"{algorithm.replace('_', '-')}-{seed}"
    given: dict[str, Any] = {"task": {"name": "arith"}, "levers": ["weights"], "max_generations": 1}
    if name not in [known async for known in store.runs()]:
        config = configuration.configure(given, settings(algorithm, seed), plugins())
        await launch.start(store, name, configuration.preflight(config, plugins()))
    await launch.work(store, name, [])
    events = await store.events(name)
    asked = next((e.data for e in events if isinstance(e.data, ev.TrainRequested)), None)
    failure = next((e.data.reason for e in events if isinstance(e.data, ev.TrainFailed)), "")
    if asked is None:
        failure = next("; ".join(o.reasons) for o in _options(events) if o.algorithm == algorithm)
    times = [datetime.fromisoformat(events[i].envelope.time).timestamp() for i in (0, -1)]
    train = [
        e.data
        for e in events
        if isinstance(e.data, ev.TrajectoryLogged) and _split(e.data.trajectory) in ("train", "job")
    ]
    used = [t for t in train if asked is None or asked.logged is not None or _split(t.trajectory) == "job"]
    return Arm(
        before=_rewards(events, "g00-dev"),
        after=_rewards(events, "g01-dev"),
        kl=await _divergence(store, name, events) if not failure else 0.0,
        tokens=sum(t.output_tokens for t in used),
        trajectories=len([t for t in train if not t.trajectory.startswith("g01-train")]),
        seconds=times[1] - times[0],
        failure=failure,
    )


def _options(events: Sequence[Recorded]) -> list[Option]:
    return [o for e in events if isinstance(e.data, ev.LeverChosen) for o in e.data.options]


def _split(trajectory: str) -> str:
    """``job`` for an iteration's episodes (g01-i000-...), else the split in the name (g00-train-...)."""
    part = trajectory.split("-")[1]
    return "job" if part.startswith("i") else part


def _rewards(events: Sequence[Recorded], evaluation: str) -> tuple[float | None, ...]:
    scored = {
        e.data.trajectory: e.data.verdict
        for e in events
        if isinstance(e.data, ev.TrajectoryScored) and e.data.trajectory.startswith(f"{evaluation}-")
    }
    return tuple(v.reward if isinstance(v, Scored) else None for _, v in sorted(scored.items()))


async def _divergence(store: Store, run_name: str, events: Sequence[Recorded]) -> float:
    published = next(e.data for e in events if isinstance(e.data, ev.AdapterPublished))
    asked = next(e.data for e in events if isinstance(e.data, ev.TrainRequested))
    view = launch.view_of(store, run_name)
    dev = None
    for event in events:
        view.state.apply(event)
        if isinstance(event.data, ev.EvaluationCompleted) and event.data.evaluation == "g01-dev":
            dev = copy.copy(view.state.evaluations["g01-dev"])  # later the state forgets it
    assert dev is not None
    files = {name: await view.blobs.get(ref) for name, ref in published.files.items()}
    trajectories = await load_trajectories(view, dev)
    algorithm = plugins().registry.algorithms.get(asked.algorithm)
    job = TrainJob(resolve_model(view.state.config.model), algorithm, asked.params, asked.seed, files)
    return exact_divergence(job, trajectories)


@torch.no_grad()
def exact_divergence(job: TrainJob, trajectories: Any) -> float:
    """Mean over the sampled tokens of KL(policy || base), in nats, summed over the whole vocabulary."""
    base: Any = job.model.get_base_model()
    total, count = 0.0, 0
    for batch in micro_batches(probes(trajectories), 1024):
        policy = hidden_states(base, batch)
        with job.model.disable_adapter():
            plain = hidden_states(base, batch)
        head = base.get_output_embeddings()
        for i in range(0, len(policy), 64):
            p = torch.log_softmax(head(policy[i : i + 64]).float(), -1)
            q = torch.log_softmax(head(plain[i : i + 64]).float(), -1)
            weight = torch.from_numpy(np.bincount(batch.source, minlength=len(policy))[i : i + 64])
            total += float(((p.exp() * (p - q)).sum(-1) * weight).sum())
        count += len(batch.target)
    return total / max(count, 1)
