"""The task rooms: worlds that need many turns, tools that depend on the place, a scorer that plays the record again."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bascule.plugins.engine import EngineInfo, Sampled, SampleRequest
from bascule.plugins.task import PublicFace
from bascule.plugins.tasks.rooms import SIZES, Rooms, RoomsPrivate, items, parsed, played, progress
from bascule.plugins.tasks.rooms_harness import action
from bascule.plugins.tasks.rooms_players import explorer
from bascule.plugins.tasks.rooms_world import (
    FEATS,
    MOST_CALLS,
    TOOLS,
    NotPossible,
    State,
    act,
    line,
    make_world,
    solution,
    view,
)
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import (
    EpisodeError,
    ModelCall,
    Output,
    Sampling,
    Scored,
    Step,
    ToolCall,
    Trajectory,
    pack_floats,
    pack_ids,
)
from bascule.trainers.batch import trajectory_rows

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")


@pytest.fixture(scope="module")
def task() -> Rooms:
    return Rooms({})


@pytest.fixture(scope="module")
def public(task: Rooms) -> PublicFace:
    return task.public()


@pytest.fixture(scope="module")
def private(task: Rooms) -> RoomsPrivate:
    return task.private()


def asked() -> ModelCall:
    output = Output(token_ids=b"", logprobs=b"", text="")
    return ModelCall(kind="chat", asked="", prompt_ids=b"", outputs=(output,), sampling=Sampling())


def called(text: str, error: str | None = None) -> ToolCall:
    tool, arguments = parsed(text)
    return ToolCall(name=tool, arguments=json.dumps(arguments), error=error)


def turns(lines: list[str]) -> tuple[Step, ...]:
    return tuple(step for text in lines for step in (asked(), called(text)))


def test_families_stay_in_one_split_and_their_worlds_differ(public: PublicFace) -> None:
    groups = [{e.group for e in public.split(s)} for s in SPLITS]
    assert [len(g) for g in groups] == [SIZES[s][0] for s in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups))
    maps = {s: {json.dumps(i.world().exits, sort_keys=True) for i in found} for s, found in items(0).items()}
    assert not maps["train"] & maps["dev"]
    assert not maps["train"] & maps["sealed"]
    assert not maps["dev"] & maps["sealed"]
    variants = {str(make_world("s0-train00", v)) for v in range(4)}
    assert len(variants) == 4


def test_every_world_can_be_solved_and_takes_twenty_calls() -> None:
    for found in items(0).values():
        for item in found:
            world = item.world()
            way = solution(world)
            states = played(world, way)
            assert 20 <= len(way) <= 48
            assert states[-1].done
            assert sorted(states[-1].feats) == sorted(FEATS)


def test_whoever_always_does_the_same_achieves_nothing(public: PublicFace, private: RoomsPrivate) -> None:
    actions = ["look", "place", *(f"go {d}" for d in "nesw"), *(f"unlock {d}" for d in "nesw")]
    actions += ["take red key", "take blue key", "take idol"]
    for split in SPLITS:
        for e in public.split(split)[::10]:
            for text in actions:
                assert private.score(split, e.id, "\n".join([text] * MOST_CALLS)) == Scored(reward=0.0, passed=False)


def test_a_tool_that_is_not_to_be_had_here_says_which_are(task: Rooms, public: PublicFace) -> None:
    masks = set()
    for e in public.dev:
        tools = task.tools(e)
        assert tuple(tools) == TOOLS
        seen = asyncio.run(tools["look"]({}))
        offered = seen.partition("tools: ")[2].split(", ")
        masks.add(tuple(offered))
        with pytest.raises(NotPossible, match=r"place is not possible here\. Possible: look"):
            asyncio.run(tools["place"]({}))
    for item in items(0)["dev"]:
        world = item.world()
        masks |= {view(world, s).tools for s in played(world, solution(world)) if not s.done}
    assert {("look", "go"), ("look", "go", "take"), ("look", "go", "unlock"), ("look", "go", "place")} <= masks


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("go", {"direction": "up"}),
        ("go", {}),
        ("go", {"direction": ["n"]}),
        ("go", {"direction": None}),
        ("fly", {}),
        ("unlock", {"direction": {"n": 1}}),
        ("take", {"thing": "idol"}),
    ],
)
def test_an_action_that_names_nothing_is_refused_and_changes_nothing(tool: str, arguments: dict[str, Any]) -> None:
    world = make_world("s0-dev00", 0)
    with pytest.raises(NotPossible):
        act(world, State(world.start), tool, arguments)
    assert played(world, [(tool, arguments)]) == [State(world.start)]


def test_episodes_of_one_world_have_a_state_each(task: Rooms, public: PublicFace) -> None:
    one, other = task.tools(public.dev[0]), task.tools(public.dev[0])
    before = asyncio.run(other["look"]({}))
    way = before.partition("exits: ")[2][0]
    assert asyncio.run(one["go"]({"direction": way})) != before
    assert asyncio.run(other["look"]({})) == before


def test_the_record_is_played_again_and_each_call_of_the_model_gets_its_progress(private: RoomsPrivate) -> None:
    item = items(0)["dev"][0]
    lines = [line(*a) for a in solution(item.world())]
    verdict = private.score_episode("dev", item.id, Trajectory(steps=turns(lines), answer="done"))
    assert isinstance(verdict, Scored)
    assert (verdict.reward, verdict.passed, len(verdict.steps)) == (1.0, True, len(lines))
    assert sum(verdict.steps) == pytest.approx(1.0)
    gains = [text for text, gain in zip(lines, verdict.steps, strict=True) if gain > 0]
    assert all(text.split()[0] in ("take", "unlock", "place") for text in gains)
    assert len(gains) == len(FEATS)
    half = private.score_episode("dev", item.id, Trajectory(steps=turns(lines[: len(lines) // 2]), answer="gave up"))
    assert isinstance(half, Scored)
    assert 0 < half.reward < 1
    assert half.passed is False


def test_what_was_said_and_not_done_does_not_count(private: RoomsPrivate) -> None:
    item = items(0)["dev"][0]
    lines = [line(*a) for a in solution(item.world())]
    script = "\n".join(lines)
    boast = Trajectory(steps=(asked(), called("look")), answer=script)
    refused = Trajectory(steps=tuple(called(text, error="There is no tool") for text in lines), answer="done")
    for episode in (boast, refused):
        verdict = private.score_episode("dev", item.id, episode)
        assert isinstance(verdict, Scored)
        assert (verdict.reward, verdict.passed) == (0.0, False)


def test_an_episode_that_ended_in_an_error_has_achieved_nothing(private: RoomsPrivate) -> None:
    item = items(0)["dev"][0]
    steps = turns([line(*a) for a in solution(item.world())])
    crashed = Trajectory(steps=steps, error=EpisodeError(kind="crash", message="x"))
    verdict = private.score_episode("dev", item.id, crashed)
    assert verdict == Scored(reward=0.0, passed=False, well_formed=False, steps=(0.0,) * (len(steps) // 2))


def test_only_the_first_calls_count(task: Rooms, private: RoomsPrivate) -> None:
    item = items(0)["dev"][0]
    late = ["look"] * MOST_CALLS + [line(*a) for a in solution(item.world())]
    verdict = private.score_episode("dev", item.id, Trajectory(steps=turns(late), answer="done"))
    assert isinstance(verdict, Scored)
    assert verdict.reward == 0.0
    assert len(verdict.steps) == len(late)
    tools = task.tools(next(e for e in task.public().dev if e.id == item.id))
    for _ in range(MOST_CALLS):
        asyncio.run(tools["look"]({}))
    with pytest.raises(NotPossible, match="used up"):
        asyncio.run(tools["look"]({}))


@pytest.mark.parametrize("answer", [None, "", "done", "go n; take red key", "x" * 10_000, "go\u0000n", "\ud800"])
def test_an_answer_that_is_no_script_is_ill_formed(private: RoomsPrivate, answer: str | None) -> None:
    item = items(0)["dev"][0]
    found = private.score("dev", item.id, answer)
    assert found == private.score_episode("dev", item.id, Trajectory(answer=answer))
    assert found == Scored(reward=0.0, passed=False, well_formed=answer == "go n; take red key")


def test_the_baselines_are_what_they_say(task: Rooms, public: PublicFace, private: RoomsPrivate) -> None:
    found = {b.name: b.answers["sealed"] for b in task.baselines(public)}

    def mean(name: str) -> float:
        verdicts = [private.score("sealed", i, a) for i, a in found[name].items()]
        return sum(v.reward for v in verdicts if isinstance(v, Scored)) / len(verdicts)

    assert mean("depth-first") == 1.0
    assert mean("always-north") == 0.0
    assert 0.2 < mean("random-walk") < 0.6
    assert progress(State("x")) == 0.0


def test_train_answers_are_shortest_solutions_and_no_other_split_has_any(
    public: PublicFace, private: RoomsPrivate
) -> None:
    assert set(public.answers) == {e.id for e in public.train}
    for e in public.train[::16]:
        assert private.score("train", e.id, public.answers[e.id]) == Scored(reward=1.0, passed=True)
        assert set(e.input) == {"question"}


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("go n", ("go", {"direction": "n"})),
        ("I will go north.", ("go", {"direction": "n"})),
        ("Take the red key!", ("take", {"thing": "red key"})),
        ("unlock e\nthen go e", ("unlock", {"direction": "e"})),
        ("place", ("place", {})),
        ("Look around", ("look", {})),
        ("go", ("go", {"direction": ""})),
        ("forgo it", None),
        ("", None),
    ],
)
def test_the_harness_finds_the_action_in_a_reply(reply: str, found: Any) -> None:
    assert action(reply) == found


class Script:
    """An engine that says prepared lines; its tokens are the bytes of the conversation."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    async def start(self) -> EngineInfo:
        return EngineInfo(name="script", model="script", model_digest="")

    async def close(self) -> None: ...

    async def load_adapter(self, name: str, folder: Path) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def sample(self, request: SampleRequest) -> Sampled:
        assert not isinstance(request.prompt, str)
        prompt = "".join(f"<{m.role}>{m.content}\n" for m in request.prompt) + "<assistant>"
        text = self.lines[request.call]
        ids = list(f"{text}\n".encode())
        output = Output(token_ids=pack_ids(ids), logprobs=pack_floats([-0.5] * len(ids)), text=text)
        return Sampled(prompt_ids=tuple(prompt.encode()), outputs=(output,))


async def test_a_real_episode_is_one_growing_conversation_of_twenty_turns(
    task: Rooms, public: PublicFace, private: RoomsPrivate
) -> None:
    """The reference harness in its process, the tools here, and the record as the trainer reads it."""
    example = public.dev[0]
    item = items(0)["dev"][0]
    assert example.id == item.id
    files = task.harness()
    manifest = json.loads(files["manifest.json"])
    manifest["params"]["turns"] = 48
    harness = make_harness({**files, "manifest.json": json.dumps(manifest)})
    lines = ["hm", "fly away", *explorer(item.world())]
    spec = EpisodeSpec(trajectory="t", harness=harness, example=example.input, sampling=Sampling(), seed=1)
    pool = HarnessPool(children=1)
    try:
        trajectory = await run_episode(spec, Script(lines), pool, lambda: task.tools(example))
    finally:
        await pool.close()
    assert trajectory.error is None
    calls = [s for s in trajectory.steps if isinstance(s, ModelCall)]
    assert len(calls) == len(lines) >= 22
    assert all(s.error is None for s in trajectory.steps if isinstance(s, ToolCall))
    prompts = [c.prompt_ids + c.outputs[0].token_ids for c in calls]
    assert all(later.startswith(earlier) for earlier, later in pairwise(prompts))
    (row,) = trajectory_rows("t", trajectory)
    assert len(row.trained) == sum(len(text) + 1 for text in lines)
    verdict = private.score_episode("dev", example.id, trajectory)
    assert isinstance(verdict, Scored)
    assert (verdict.reward, verdict.passed, len(verdict.steps)) == (1.0, True, len(lines))


def test_its_harness_and_defaults_are_valid(task: Rooms) -> None:
    manifest = make_harness(task.harness()).manifest
    assert manifest.tools == TOOLS
    assert manifest.max_tool_calls == MOST_CALLS
    assert set(manifest.tunable) <= set(manifest.params)
    assert parse_config({"task": {"name": "rooms"}, **task.defaults()}).task.name == "rooms"
