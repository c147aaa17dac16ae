"""The run that is simulated: a tiny task, a policy, an author, an algorithm, an engine and a trainer that compute
nothing, whose every answer follows from what they are asked.

The author's edit is promoted, then an adapter of two iterations is, then the author has nothing more, and the run
stops.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.algorithm import Algorithm as AlgorithmProtocol
from bascule.plugins.algorithm import Credit, Group, Requires
from bascule.plugins.engine import EngineInfo, Sampled, SampleRequest
from bascule.plugins.loader import Plugins
from bascule.plugins.policy import AuthorInput, CallModel, CallResult, CallTool, HarnessEdit, NoEdit, PolicyInput
from bascule.plugins.registry import Registry
from bascule.plugins.task import Example, PublicFace
from bascule.runtime.world import task_digest
from bascule.schemas.decision import LeverDecision
from bascule.schemas.envelope import Producer
from bascule.schemas.events import RunStarted, TrainRequested
from bascule.schemas.run import EvaluationConfig, GateConfig, PluginChoice, PluginPin, RunConfig
from bascule.schemas.trajectory import ModelCall, Output, Sampling, Scored, Trajectory, pack_floats, pack_ids
from bascule.trainers.jobs import Update

RUN = "sim"
NAME = "sim"
ITERATIONS = 2
TRAIN, DEV, SEALED = 4, 2, 1


def _examples(split: str, count: int) -> tuple[Example, ...]:
    return tuple(
        Example(id=f"{split}-{i}", group=f"{split}-{i}", input={"question": f"{split} {i}"}) for i in range(count)
    )


PUBLIC = PublicFace(
    name=NAME,
    version="1",
    description="Say yes.",
    train=_examples("train", TRAIN),
    answers={f"train-{i}": "yes" for i in range(TRAIN)},
    dev=_examples("dev", DEV),
    sealed=_examples("sealed", SEALED),
    max_answer_tokens=4,
    source="made here",
    licence="MIT",
)

FIRST = {"harness.py": "", "manifest.json": '{"name": "sim"}', "system_prompt.md": "plain"}
EDITED = {**FIRST, "system_prompt.md": "better"}


class Task:
    """Every right answer is yes."""

    name = NAME
    summary = ""

    def public(self) -> PublicFace:
        return PUBLIC

    def harness(self) -> dict[str, str]:
        return FIRST

    def tools(self, example: Example) -> Mapping[str, Any]:
        return {}


def said(prompt: str, adapter: str | None, question: str, sample: int) -> str:
    """What an episode answers. On dev the first harness knows nothing, the edited one half, and an adapter all."""
    split, position = question.split()
    place = int(position)
    if split == "train":
        return "yes" if (place + sample) % (2 if prompt == "better" else 3) == 0 else f"no {adapter}"
    if prompt == "plain":
        return "no"
    return "yes" if adapter is not None or place != 0 else "maybe"


def episode(answer: str) -> Trajectory:
    """One call of the model, which answered so."""
    output = Output(token_ids=pack_ids([len(answer)]), logprobs=pack_floats([-0.5]), text=answer)
    call = ModelCall(kind="completion", asked="", prompt_ids=pack_ids([1]), outputs=(output,), sampling=Sampling())
    return Trajectory(steps=(call,), answer=answer)


class Policy:
    """Follows the script; asks a model before it chooses the weights."""

    name = NAME
    version = "1"
    script = (None, "harness", "weights", "harness", "stop")

    def step(self, given: PolicyInput, results: Sequence[CallResult]) -> CallModel | LeverDecision:
        if given.generation == 2 and not results:
            return CallModel(model="m", request={"generation": given.generation, "best": given.best})
        lever = self.script[given.generation]
        heard = [r.answer["text"] for r in results if hasattr(r, "answer")]
        return LeverDecision(lever=lever, algorithm=NAME if lever == "weights" else None, reasons=("script", *heard))  # type: ignore[arg-type]


class Author:
    """Edits once, after a model and a tool were asked."""

    name = NAME
    version = "1"

    def step(self, given: AuthorInput, results: Sequence[CallResult]) -> CallModel | CallTool | HarnessEdit | NoEdit:
        if given.generation != 1:
            return NoEdit(reason="nothing more")
        rewards = [e.reward for e in given.evidence]
        if not results:
            return CallModel(model="m", request={"rewards": rewards})
        if len(results) == 1:
            return CallTool(name="t", arguments={"rewards": rewards})
        return HarnessEdit(files=EDITED, edit="better")

    def edits_left(self, harness: Any, tried: Sequence[str]) -> int:
        return 1 - len(tried)


class Algorithm:
    """The reward is the credit."""

    name = NAME
    version = "1"
    requires = Requires(on_policy=True)
    streams = frozenset()

    def defaults(self) -> dict[str, Any]:
        return {"steps": ITERATIONS, "groups": 1, "num_generations": 2}

    def credit(self, groups: Sequence[Group], params: dict[str, Any]) -> list[Credit]:
        return [
            Credit(trajectory=s.trajectory, component="policy", advantage=s.reward or 0.0)
            for g in groups
            for s in g.samples
        ]


class Engine:
    """Serves adapters, and is asked nothing: the episodes answer by themselves."""

    def __init__(self) -> None:
        self.adapters: set[str] = set()

    async def start(self) -> EngineInfo:
        return EngineInfo(name=NAME, model="none", model_digest="")

    async def close(self) -> None:
        pass

    async def load_adapter(self, name: str, folder: Path) -> None:
        self.adapters.add(name)

    async def unload_adapter(self, name: str) -> None:
        self.adapters.discard(name)

    async def sample(self, request: SampleRequest) -> Sampled:
        raise AssertionError("episodes are played here, none asks the engine")


class Job:
    """An update's bytes follow from those before it and from what it was trained on."""

    def __init__(
        self, algorithm: AlgorithmProtocol, request: TrainRequested, state: bytes, begin: Callable[[int, int], None]
    ) -> None:
        self._algorithm = algorithm
        self._request = request
        self._state = state
        self._begin = begin

    def update(
        self, groups: Sequence[Group], trajectories: Mapping[str, Trajectory], iteration: int, progress: Any
    ) -> Update:
        self._begin(self._request.generation, iteration)
        credit = self._algorithm.credit(groups, self._request.params)
        h = hashlib.sha256(self._state + str(iteration).encode())
        h.update(msgspec.json.encode([trajectories, credit], order="sorted"))
        self._state = h.digest()
        files = {"adapter.bin": b"adapter" + self._state}
        return Update(files, h.hexdigest(), b"state" + self._state, {"loss": 1.0})


class Backend:
    """Trains without a model; ``begin(generation, iteration)`` is called at the start of each update."""

    def __init__(self, begin: Callable[[int, int], None]) -> None:
        self._begin = begin

    def check(self, started: RunStarted) -> None:
        pass

    def threads(self, wanted: int) -> int:
        return 1

    def versions(self) -> dict[str, str]:
        return {}

    def open(
        self,
        started: RunStarted,
        algorithm: AlgorithmProtocol,
        request: TrainRequested,
        parent: Mapping[str, bytes] | None,
        state: bytes | None,
    ) -> Job:
        start = str(request.seed).encode() if state is None else state.removeprefix(b"state")
        return Job(algorithm, request, start, self._begin)


class Private:
    """The scoring."""

    def score(self, answer: str | None) -> Scored:
        return Scored(reward=float(answer == "yes"), passed=answer == "yes")


def plugins_with(policy: Callable[[], Any], author: Callable[[], Any]) -> Plugins:
    """The plugins of the simulated run; policy and author are given, since they are what makes calls."""
    registry = Registry()
    registry.task(NAME, lambda params: Task(), version="1")  # type: ignore[arg-type, return-value]
    registry.policy(NAME, lambda params: policy(), version="1")
    registry.author(NAME, lambda params: author(), version="1")
    registry.algorithm(Algorithm())  # type: ignore[arg-type]
    registry.engine(NAME, lambda model, params: Engine(), version="1")
    return Plugins(registry, ())


def producer(service: str) -> Producer:
    return Producer(service=service, version="0", hash="sim")


def _started() -> RunStarted:
    choice = PluginChoice(name=NAME)
    config = RunConfig(
        task=choice,
        model="none",
        engine=choice,
        policy=choice,
        author=choice,
        max_generations=3,
        evaluation=EvaluationConfig(train_groups=1, train_samples=1),
        gate=GateConfig(alpha=0.6, guard="none"),
        shard_size=1,
    )
    pin = PluginPin(kind="algorithm", name=NAME, version="1", distribution="sim 0", hash="sim")
    return RunStarted(
        config=config,
        task_version="1",
        task_digest=task_digest(PUBLIC),
        train=TRAIN,
        dev=DEV,
        sealed=SEALED,
        model_digest="",
        plugins=(pin,),
    )


STARTED = _started()


def answered(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a model or a tool answers."""
    return {"text": hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8], "result": "fine"}
