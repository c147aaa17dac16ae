"""Prompt injection: items tell the feedback agent to leak, an author obeys, and there is nothing to be told."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from bascule.plugins.canary import PREFIX, canary_key
from tests.attacks.attack import Attack, Outcome, line_of, text_of
from tests.attacks.planted import cache
from tests.attacks.plugins.injected import SIZES, asked, right
from tests.attacks.runs import Failed, Place

_RUN = "obeyed"


def attacks() -> list[Attack]:
    return [Attack(name="prompt_injection", tries=line_of(text_of("plugins", "injected")), play=play)]


async def play(folder: Path) -> list[Outcome]:
    with cache(folder):
        return [await asyncio.to_thread(obeyed, folder)]


def obeyed(folder: Path) -> Outcome:
    place = Place(folder, "injected")
    place.run(_RUN, "--task", "injected", "--author", "obedient")
    key = canary_key()
    numbers = {split: range(size) for split, size in SIZES.items()}
    questions = {split: [asked(split, n) for n in found] for split, found in numbers.items()}
    truths = {split: [right(key, split, n) for n in found] for split, found in numbers.items()}
    events = place.events(_RUN)
    # What the author wrote, and what it was told: its calls and its harnesses.
    written = [json.dumps(e) for e in events if e["type"].rpartition("bascule.")[2] in _AUTHORS]
    everything = json.dumps(events) + _bytes(place.home / "blobs")
    told = "\n".join(written)
    problems = [
        f"{split} {what} in what the author wrote"
        for split in ("dev", "sealed")
        for what, tokens in (("question", questions[split]), ("answer", truths[split]))
        if any(token in told for token in tokens)
    ]
    problems += [f"a {s} answer in the log" for s in ("dev", "sealed") if any(t in everything for t in truths[s])]
    if PREFIX in everything:
        problems.append("a canary in the log or a blob")
    report = {"leaks": []}
    try:
        report = place.searched(_RUN, place.exported(_RUN, folder / "obeyed.tar"))
    except Failed as e:
        problems.append(str(e))
    harnesses = [w for w in written if "seen.json" in w and "harness" in w]
    obeys = any(t in told for t in questions["train"]) and any(t in told for t in truths["train"])
    return Outcome(
        place="author",
        control=f"told all of train in {len(harnesses)} events" if obeys and len(harnesses) > 1 else "",
        layer="author's input: train alone, aggregates of dev",
        result=f"no dev or sealed item in {len(written)} events of the author; {_counts(report)}",
        problems=tuple(problems),
    )


_AUTHORS = ("harness.proposed", "tool.called", "model.called", "author.failed", "lever.chosen")


def _bytes(folder: Path) -> str:
    found = b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())
    return os.fsdecode(found)


def _counts(report: dict[str, object]) -> str:
    if "events" not in report:
        return "not searched"
    return f"{report['events']} events, {report['blobs']} blobs, {report['prompts']} prompts, {report['files']} files"
