"""A short real run of each task, and the search for canaries in all that it leaves; then a leak, which is found."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from bascule.plugins.canary import canary, canary_key
from bascule.plugins.loader import plugins
from bascule.plugins.tasks.own_new import write_file
from tests.attacks.attack import Attack, Outcome
from tests.attacks.planted import cache
from tests.attacks.runs import Failed, Place

_FEW = ("--set", "evaluation.dev_examples=6", "--set", "evaluation.sealed_examples=6")
_FEW += ("--set", "evaluation.train_groups=2", "--set", "evaluation.train_samples=1")
#: By task: parameters of the run, and of the task.
RUNS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "arith": (_FEW, {}),
    "gpqa": (_FEW, {}),
    "longcot-chess": (_FEW, {}),
    "lawbench": (_FEW, {}),
    "spaceship-titanic": (_FEW, {}),
    "rooms": (_FEW, {}),
    "rg:chain_sum": (_FEW, {}),
    "denoising": (("--set", "task.params.data=simulated"), {"data": "simulated"}),
    "trimul": (("--set", "task.params.size=small", "--set", "task.params.seconds=900"), {"size": "small"}),
    "own": (_FEW, {}),
    "sia-dir": ((), {}),
}


def attacks() -> list[Attack]:
    return [
        Attack(
            name=f"canaries_{task.replace(':', '_').replace('-', '_')}",
            tries=f"Looks for a canary in the log, blobs, prompts and export of a run on {task}.",
            play=_player(task),
        )
        for task in RUNS
    ]


def _player(task: str) -> Any:
    async def play(folder: Path) -> list[Outcome]:
        with cache(folder):
            return [await asyncio.to_thread(searched, task, folder)]

    return play


def searched(task: str, folder: Path) -> Outcome:
    more, params = RUNS[task]
    place = Place(folder)
    chosen = ("--task", task)
    run = "searched"
    try:
        if task == "own":
            params = {"path": str(write_file(folder / "vowels.py"))}
            chosen = ("--task", params["path"])
        elif task == "sia-dir":
            place.bascule("unpack-sia", str(folder / "peer"))
            params = {"path": str(folder / "peer" / "longcot-chess")}
            chosen = ("--task-dir", params["path"])
        place.run(run, *chosen, "--max_gen", "0", *more)
        export = place.exported(run, folder / "run.tar")
        clean = place.searched(run, export)
        # The same search, with the canary of one sealed item in a log and in a page beside the export.
        sealed = plugins().registry.tasks.get(task)(params).public().sealed[0]
        token = canary(canary_key(), task, "sealed", sealed.id)
        for name, data in (("page.html", f"<p>{token}</p>".encode("utf-16")), ("log.jsonl", token[:24].encode())):
            (folder / name).write_bytes(data)
        found = place.searched(run, export, folder / "page.html", folder / "log.jsonl", leaks=True)
    except Failed as e:
        return Outcome(place="run", control=None, layer="", result="not searched", problems=(str(e),))
    named = {(leak["split"], leak["example"]) for leak in found["leaks"]}
    planted = len(found["leaks"]) == 2 and named == {("sealed", sealed.id)}
    searched_all = clean["events"] > 0 and clean["files"] > 0 and clean["known"] > 0 and not clean["absent"]
    counts = ", ".join(f"{clean[name]} {name}" for name in ("events", "blobs", "prompts", "files"))
    size = clean["event_bytes"] + clean["blob_bytes"] + clean["file_bytes"]
    problems = [] if searched_all else [f"not everything was searched: {clean}"]
    return Outcome(
        place="run",
        control="a planted leak is found, twice" if planted else "",
        layer="truths in the scoring process alone",
        result=f"none of {clean['known']} canaries in {counts}; {size:,} bytes",
        problems=tuple(problems),
    )
