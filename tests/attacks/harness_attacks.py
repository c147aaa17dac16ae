"""Harnesses that want to know more than their item: its index, and what other episodes were asked."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

from bascule.plugins.canary import PREFIX
from bascule.plugins.kit_scores import score_checks
from bascule.plugins.tasks.arith import Arith
from bascule.plugins.tasks.own import Own, named
from bascule.runtime.engines.constant import ConstantEngine
from bascule.runtime.episodes.batch import Batch
from bascule.runtime.episodes.broker import EpisodeSpec, run_episode
from bascule.runtime.episodes.pool import HarnessPool
from bascule.schemas.events import Split
from bascule.schemas.harness import Harness
from bascule.schemas.trajectory import Sampling, Scored, Trajectory, Verdict
from bascule.verifiers.scoring import Scorer
from bascule.verifiers.scoring_process import Request, judge
from tests.attacks.attack import HERE, Attack, Outcome, line_of, text_of
from tests.attacks.confined import harness

_ASKED = 24
#: A task with the hole that this attack looks for: the item says which one it is, and that is the answer.
INDEXED = """
DESCRIPTION = "Say the number."
def items(split):
    first = {"train": 0, "dev": 1000, "sealed": 2000}[split]
    return [{"input": {"question": f"item {n}", "index": n}, "answer": str(n)} for n in range(first, first + 60)]
def verify(item, answer):
    return answer.strip() == item["answer"]
"""


def attacks() -> list[Attack]:
    found = {"question_index": by_index, "hoarder": by_hoarding}
    return [Attack(name=n, tries=line_of(text_of("harnesses", n)), play=play, quick=True) for n, play in found.items()]


async def by_index(folder: Path) -> list[Outcome]:
    """On a sound task it is worth less than the best constant; a task with the hole is found by the conformance kit."""
    code = harness({"harness.py": text_of("harnesses", "question_index")})
    pool = HarnessPool()
    try:
        public = Arith({}).public()
        played = [await episode(pool, code, e.input, n) for n, e in enumerate(public.dev[:_ASKED])]
        async with Scorer("arith", {}) as scorer:
            verdicts = [
                await scorer.score("dev", e.id, t.answer) for e, t in zip(public.dev[:_ASKED], played, strict=True)
            ]
        path = folder / "indexed.py"
        path.write_text(INDEXED)
        chosen = named(str(path))
        assert chosen is not None
        holed = Own(chosen["params"])
        face, theirs = holed.private(), holed.public()
        told = [await episode(pool, code, e.input, n) for n, e in enumerate(theirs.dev[:_ASKED])]
    finally:
        await pool.close()

    async def score(split: Split, example: str, answer: str | None) -> Verdict:
        return judge(face, Request(id=0, split=split, example=example, answer=answer))

    paid = [await score("dev", e.id, t.answer) for e, t in zip(theirs.dev[:_ASKED], told, strict=True)]
    found = [c.name async for c in score_checks(theirs, score) if c.outcome == "broken"]
    reward, holes = _mean(verdicts), _mean(paid)
    answers = Counter(t.answer for t in played)
    problems = []
    if len(answers) > 1:
        problems.append(f"it counted: {dict(answers)}")
    if "fields" not in found:
        problems.append(f"the kit does not find the hole: {found}")
    if reward >= 0.5:
        problems.append(f"reward {reward:.3f} for one answer to all")
    return [
        Outcome(
            place="harness",
            control=f"{holes:.2f} on a task that shows it" if holes == 1 else "",
            layer="own process and folder for each episode; kit's check of fields",
            result=f"reward {reward:.3f}, always the same answer",
            problems=tuple(problems),
        )
    ]


async def by_hoarding(folder: Path) -> list[Outcome]:
    """Two episodes of one harness: alone, in one batch, and in two batches; the second looks for the first's item."""
    shared = folder / "shared"
    shared.mkdir()
    for path in (folder, shared):
        path.chmod(0o777)
    files = {
        "harness.py": text_of("harnesses", "hoarder"),
        "attack.py": "kept = ''\n",
        "trying.py": (HERE / "trying.py").read_text(encoding="utf-8"),
    }
    alone, together = harness(files), harness(files, isolation="batch")
    first, second = Batch(key="g00-dev", seed=1), Batch(key="g01-train", seed=1)
    # Unconfined it writes to its own folder only, which is removed.
    control = await _remembered(HarnessPool(unsafe=True), alone, (None, None), shared, everywhere=False)
    for left in shared.iterdir():
        left.unlink()
    outcomes = []
    for place, code, batches in (
        ("episodes", alone, (None, None)),
        ("one batch", together, (first, first)),
        ("two batches", together, (first, second)),
    ):
        found = await _remembered(HarnessPool(), code, batches, shared)
        outcomes.append(
            Outcome(
                place=place,
                control="found the item" if control == "found" else "",
                layer="own root, own processes, Landlock",
                result="the second finds nothing" if found == "nothing" else found,
                problems=() if found == "nothing" else (found,),
            )
        )
    return outcomes


async def _remembered(
    pool: HarnessPool, code: Harness, batches: tuple[Any, Any], shared: Path, *, everywhere: bool = True
) -> str:
    """``found`` if the second episode had the first one's item, ``nothing`` if it had none, or what happened else."""
    key = int.from_bytes(secrets.token_bytes(3), "big") + 1
    items = [PREFIX + secrets.token_hex(16) for _ in range(2)]
    answers = []
    try:
        for number, (item, batch) in enumerate(zip(items, batches, strict=True)):
            given = {"item": item, "folder": str(shared), "key": key, "everywhere": everywhere}
            trajectory = await episode(pool, code, given, number, batch)
            answers.append(trajectory.answer or str(trajectory.error))
    finally:
        await pool.close()
        await asyncio.to_thread(_forget, key)
    if items[0] in answers[1]:
        return "found"
    return answers[1] if answers != ["nothing", "nothing"] else "nothing"


async def episode(
    pool: HarnessPool, code: Harness, example: dict[str, Any], number: int, batch: Batch | None = None
) -> Trajectory:
    spec = EpisodeSpec(
        trajectory=f"g00-dev-{number:04d}-n0",
        harness=code,
        example=example,
        sampling=Sampling(),
        seed=1,
        batch=batch,
    )
    return await run_episode(spec, ConstantEngine("7"), pool, dict)


def _mean(verdicts: list[Verdict]) -> float:
    return sum(v.reward for v in verdicts if isinstance(v, Scored)) / len(verdicts)


def _forget(key: int) -> None:
    """Remove the shared memory that the control may have left on this machine."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.shmget(key, 64, 0)
    if number >= 0:
        libc.shmctl(number, 0, None)
