"""Runs of the bench ``selector``: generations in which a policy chooses, and jobs of the real algorithms.

A job is the product's: K iterations of sampling, credit and update, or one update on what the parent sampled. What the
parent sampled is as much as K iterations sample, as where a run's landscapes over train are as large as its jobs.

A candidate is known by the jobs that made it, and samples and seeds of a job depend on nothing else; so arms that
choose alike share their jobs, and what differs between arms are their choices alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import msgspec

from bascule.plugins.algorithm import Algorithm, Group, Sample, Turn
from bascule.plugins.loader import plugins
from bascule.plugins.policy import AlgorithmInfo, Generation, Policy, PolicyInput
from bascule.schemas.decision import LeverDecision
from bascule.schemas.errors import TrainError
from bascule.schemas.events import GateFigures
from bascule.schemas.landscape import RewardLandscape
from bascule.schemas.run import GateConfig
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Trajectory, pack_floats, pack_ids
from bascule.trainers.base_model import load_model
from bascule.trainers.feasible import unmet
from bascule.trainers.loop import TrainJob, UpdateMetrics
from bascule.verifiers.gate import gate
from bascule.verifiers.landscape import SampleFigures, landscape
from ops.bench.selector_model import LENGTH, PROMPT, Floats, Ints, Prompt, make_model, probabilities, sample
from ops.bench.selector_tasks import (
    PROMPT_KINDS,
    Kind,
    Split,
    Task,
    draw_parameters,
    make_task,
    prompts,
    true_value,
    verdict,
)

ALGORITHMS = ("ppo", "grpo", "entropic", "reinforce", "dpo", "best_of_n")
OTHERS = 8  # other prompts that are asked for the exact reward on them
SAMPLES = 8  # of each example in a landscape over train
#: Times the learning rates of all algorithms' defaults, which are those of a model of 10,000 times the size.
RATES = 40.0


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        generations: choices.
        iterations: of a job that samples anew.
        batch: trajectories of an iteration.
        groups: of 8 samples, which the landscape over train is taken over.
        dev: examples of dev; each is asked once, at temperature 1, for the objective is an expectation.
        regression: examples of the regression set, asked in the same way.
    """

    generations: int = 3
    iterations: int = 4
    batch: int = 256
    groups: int = 48
    dev: int = 840
    regression: int = 60


#: The jobs that made a candidate: generation and algorithm of each, from the base model on.
Key = tuple[tuple[int, str], ...]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter and what was measured of it.

    Attributes:
        files: of the adapter; None for the base model.
        value: what it is truly worth, exactly; 0 as long as it is not promoted.
    """

    files: Mapping[str, bytes] | None
    train: RewardLandscape
    dev: tuple[float, ...]
    regression: tuple[float, ...]
    value: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """What came of a job; ``candidate`` is None where it failed."""

    candidate: Candidate | None
    gate: GateFigures | None
    outcome: Literal["promoted", "rejected", "failed"]
    reason: str


@dataclass(frozen=True)
class Cell:
    """One task of a landscape under one seed, and what was computed of it.

    Attributes:
        others: the base model's expected reward on the other prompts; 0 without any.
        attempts: by the parent's jobs, the generation and the algorithm.
    """

    task: Task
    folder: Path
    seed: int
    size: Size
    base: Candidate
    others: float
    algorithms: Mapping[str, Algorithm]
    infos: tuple[AlgorithmInfo, ...]
    loaded: Any
    attempts: dict[tuple[Key, int, str], Attempt] = field(default_factory=dict)


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """A run: its promoted candidate's true value, and what was chosen in each generation with what came of it."""

    value: float
    choices: tuple[str, ...]


@contextmanager
def open_cell(kind: Kind, draw: int, seed: int, size: Size) -> Iterator[Cell]:
    """A task of a draw of a landscape, with its base model measured."""
    registry = plugins().registry.algorithms
    algorithms: dict[str, Algorithm] = {name: registry.get(name) for name in ALGORITHMS}
    infos = tuple(
        AlgorithmInfo(name=name, version=a.version, requires=a.requires, params=job_params(a, size))
        for name, a in sorted(algorithms.items())
    )
    with TemporaryDirectory() as name:
        folder = make_model(Path(name), _seed(draw, kind, seed, "model"))
        loaded: Any = load_model(folder)
        asked = [(k, a, b) for k in range(PROMPT_KINDS) for a, b in ((0, 5), (3, 1), (6, 2), (7, 7))]
        base = probabilities(loaded, asked).reshape(PROMPT_KINDS, 4, -1).mean(1)
        task = make_task(kind, draw_parameters(kind, draw), _seed(draw, kind, seed, "task"), base)
        value, others = _worth(task, loaded, None)
        first = msgspec.structs.replace(_measured(task, loaded, size, seed, None, None), value=value)
        yield Cell(task, folder, seed, size, first, others, algorithms, infos, loaded)


def job_params(algorithm: Algorithm, size: Size) -> dict[str, Any]:
    """An algorithm's defaults for a job of this size and a model this small."""
    given = algorithm.defaults()
    names: tuple[str, ...] = ("learning_rate", "critic_learning_rate")
    rates = {name: given[name] * RATES for name in names if name in given}
    steps = size.iterations if algorithm.requires.on_policy else 1
    groups = size.batch * (size.iterations // steps) // given["num_generations"]
    return {**given, **rates, "steps": steps, "groups": groups, "lora_r": 8, "lora_alpha": 16}


def play(cell: Cell, policy: Policy, levers: tuple[Literal["harness", "weights"], ...] = ("weights",)) -> Played:
    """A run under a policy.

    There is nothing that an edit of the harness could do here: a generation that is spent on one is rejected.
    """
    best, best_generation = cell.base, 0
    best_key: Key = ()
    history = [_generation(0, None, None, Attempt(cell.base, None, "promoted", ""))]
    choices: list[str] = []
    for number in range(1, cell.size.generations + 1):
        decision = policy.step(
            PolicyInput(
                generation=number,
                max_generations=cell.size.generations,
                levers=levers,
                history=tuple(history),
                best=best_generation,
                algorithms=cell.infos,
                ordinal=cell.task.kind == "ordinal",
            ),
            [],
        )
        assert isinstance(decision, LeverDecision)
        if decision.lever == "stop":
            choices.append("stop")
            break
        if decision.lever == "harness":
            choices.append("harness rejected")
            history.append(_generation(number, best_generation, None, Attempt(None, None, "rejected", "no better")))
            continue
        assert decision.algorithm is not None
        made = attempt(cell, best_key, best, number, decision.algorithm)
        choices.append(f"{decision.algorithm} {made.outcome}: {made.reason}")
        history.append(_generation(number, best_generation, decision.algorithm, made))
        if made.outcome == "promoted" and made.candidate is not None:
            best, best_generation = made.candidate, number
            best_key = (*best_key, (number, decision.algorithm))
    return Played(value=best.value, choices=tuple(choices))


def attempt(cell: Cell, parent_key: Key, parent: Candidate, generation: int, algorithm: str) -> Attempt:
    """A job from a parent and the gate's verdict on what it made; made once."""
    key = (parent_key, generation, algorithm)
    if key not in cell.attempts:
        cell.attempts[key] = _attempt(cell, key, parent)
    return cell.attempts[key]


def _attempt(cell: Cell, key: tuple[Key, int, str], parent: Candidate) -> Attempt:
    generation = key[1]
    try:
        job, last = _trained(cell, key, parent)
    except TrainError as error:
        return Attempt(None, None, "failed", error.message)
    made = _measured(cell.task, job.model, cell.size, cell.seed, job.adapter_files(), last)
    config, seed = GateConfig(), _seed(cell.seed, "gate", generation)
    promote, figures = gate(made.dev, parent.dev, config=config, seed=seed)
    if promote and made.regression:
        both = (made.regression, parent.regression)
        promote, figures = gate(made.dev, parent.dev, config=config, seed=seed, regression=both)
    if promote:
        made = msgspec.structs.replace(made, value=_worth(cell.task, job.model, cell.others)[0])
    return Attempt(made, figures, "promoted" if promote else "rejected", str(figures.reason))


def _trained(cell: Cell, key: tuple[Key, int, str], parent: Candidate) -> tuple[TrainJob, UpdateMetrics]:
    """A finished job, and the figures of its last update.

    Raises:
        TrainError: the data do not allow it, or an update fails.
    """
    algorithm = cell.algorithms[key[2]]
    params = next(i.params for i in cell.infos if i.name == key[2])
    job = TrainJob(cell.folder, algorithm, params, _seed(cell.seed, "job", key[1]), parent.files)
    asked = itertools.cycle(prompts(cell.task, "train"))
    for i in range(params["steps"]):
        drawn = list(itertools.islice(asked, params["groups"]))
        repeated = [prompt for prompt in drawn for _ in range(params["num_generations"])]
        answers, logprobs = sample(job.model, repeated, _seed(cell.seed, key[1], i))
        groups, trajectories = logged(cell.task, repeated, answers, logprobs, params["num_generations"])
        if not i and (reasons := unmet(algorithm.requires, groups)):
            raise TrainError("; ".join(reasons))
        last = job.update(groups, trajectories, i)
        if not i and not last.optimizer_steps:
            raise TrainError("No sample got credit.")
    return job, last


def logged(
    task: Task, asked: Sequence[Prompt], answers: Ints, logprobs: Floats, samples: int
) -> tuple[list[Group], dict[str, Trajectory]]:
    """Answers as scored groups and as trajectories, a group for every ``samples`` of them."""
    groups, trajectories = [], {}
    calls = LENGTH if task.steps is not None else 1
    each = LENGTH // calls
    for start in range(0, len(asked), samples):
        members = []
        for row in range(start, start + samples):
            name, tokens, behaviour = f"e{row:05d}", answers[row].tolist(), logprobs[row].tolist()
            scored = verdict(task, asked[row], tokens)
            parts = [slice(i * each, (i + 1) * each) for i in range(calls)]
            rewards: Sequence[float | None] = scored.steps or (None,)
            turns = tuple(
                Turn(token_ids=tuple(tokens[p]), behaviour=tuple(behaviour[p]), reward=r)
                for p, r in zip(parts, rewards, strict=True)
            )
            members.append(
                Sample(trajectory=name, reward=scored.reward, passed=scored.passed, tokens=LENGTH, turns=turns)
            )
            trajectories[name] = Trajectory(
                steps=tuple(
                    ModelCall(
                        kind="completion",
                        asked="",
                        prompt_ids=pack_ids([*asked[row], *tokens[: p.start]]),
                        outputs=(Output(token_ids=pack_ids(tokens[p]), logprobs=pack_floats(behaviour[p]), text=""),),
                        sampling=Sampling(temperature=1.0, max_tokens=each),
                    )
                    for p in parts
                )
            )
        groups.append(Group(example=f"g{start // samples:04d}", samples=tuple(members)))
    return groups, trajectories


def _measured(
    task: Task, model: Any, size: Size, seed: int, files: Mapping[str, bytes] | None, last: UpdateMetrics | None
) -> Candidate:
    """What is sampled of an adapter; the same prompts and the same seed for all of them."""
    train = [p for p in _cycled(task, "train", size.groups) for _ in range(SAMPLES)]
    dev, others = _cycled(task, "dev", size.dev), _cycled(task, "regression", size.regression)
    asked = [*train, *dev, *others]
    answers, _ = sample(model, asked, _seed(seed, "measured"))
    verdicts = [verdict(task, prompt, answer) for prompt, answer in zip(asked, answers.tolist(), strict=True)]
    figures = [SampleFigures(verdict=v, prompt_tokens=PROMPT, output_tokens=LENGTH) for v in verdicts[: len(train)]]
    land = landscape([figures[i : i + SAMPLES] for i in range(0, len(figures), SAMPLES)])
    if last is not None:  # as the verifier notes them of the job's last update
        land = msgspec.structs.replace(land, ess=last.ess, kl_to_base=last.kl_reference or None)
    rewards = [v.reward for v in verdicts[len(train) :]]
    return Candidate(files=files, train=land, dev=tuple(rewards[: len(dev)]), regression=tuple(rewards[len(dev) :]))


def _cycled(task: Task, split: Split, count: int) -> list[Prompt]:
    found = prompts(task, split)
    return list(itertools.islice(itertools.cycle(found), count)) if found else []


def _worth(task: Task, model: Any, others: float | None) -> tuple[float, float]:
    """What a policy is truly worth, and its expected reward on the other prompts; both exact.

    Args:
        others: the base model's expected reward on the other prompts; None for the base model itself.
    """
    asked = prompts(task, "sealed")
    value = true_value(task, probabilities(model, asked), asked)
    if not task.others:
        return value, 0.0
    regression = prompts(task, "regression")[:OTHERS]
    rewards = task.rewards[[prompt[0] for prompt in regression]]
    mean = float((rewards * probabilities(model, regression)).sum(1).mean())
    return value - (0.0 if others is None else max(0.0, others - mean)), mean


def _generation(
    number: int,
    parent: int | None,
    algorithm: str | None,
    made: Attempt,
) -> Generation:
    """How a policy sees a generation; one without an algorithm, but the first, is an edit of the harness."""
    lever: Literal["harness", "weights"] | None = "weights" if algorithm else "harness" if number else None
    return Generation(
        generation=number,
        parent=parent,
        lever=lever,
        algorithm=algorithm,
        edit=None if lever != "harness" else "nothing",
        outcome=made.outcome,
        reason=made.reason,
        gate=made.gate,
        gate_event=f"g{number:02d}-gate",
        train=None if made.candidate is None else made.candidate.train,
        train_event=f"g{number:02d}-train",
    )


def _seed(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1
