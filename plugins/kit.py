"""The conformance kit: what a task promises, checked.

Every check is data: its name, the promise, what came of it and what to do. Here is what the public face shows; what
only scores can tell is in :mod:`bascule.plugins.kit_scores`.
"""

from __future__ import annotations

import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Literal

import msgspec

from bascule.plugins.task import Example, PublicFace, Task
from bascule.schemas.errors import BasculeError
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")
#: Items that a check looks at where it need not look at all.
SAMPLE = 24


class Check(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One promise and what came of it.

    Attributes:
        promise: what holds for a sound task.
        outcome: ``warns`` where it may be as its author wants it, and mostly is not.
        found: figures and names; never an answer of dev or sealed.
        next_step: what to do about one that is broken or warns.
    """

    name: str
    promise: str
    outcome: Literal["held", "broken", "warns", "does not apply"]
    found: str = ""
    next_step: str = ""


#: Answers that no task may choke on, by name.
def check(
    name: str, promise: str, faults: Sequence[str], next_step: str, found: str = "", *, applies: bool = True
) -> Check:
    """A check that holds if there is no fault; the first ones are told."""
    if not applies:
        return Check(name=name, promise=promise, outcome="does not apply", found=found)
    if not faults:
        return Check(name=name, promise=promise, outcome="held", found=found)
    shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
    return Check(name=name, promise=promise, outcome="broken", found=shown, next_step=next_step)


def fault_of(error: Exception) -> str:
    """What a person is told of an exception of the task's own code: its text, and the place if the text has none."""
    if isinstance(error, BasculeError):
        return error.message
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:300]}".rstrip(": ")


def spread(examples: Sequence[Example], most: int = SAMPLE) -> list[Example]:
    """At most ``most`` of the examples, evenly over their order."""
    step = max(1, -(-len(examples) // most))
    return list(examples[::step])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The texts, numbers and truth values in an input, with their places."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    elif value is not None:
        yield path, value if isinstance(value, str) else str(value)


def face_checks(task: Task, public: PublicFace) -> Iterator[Check]:
    """What can be seen without a score: splits, answers, harness, baselines, defaults; each check as it is done."""
    looks: dict[str, Callable[[], Check]] = {
        "same-face": lambda: _repeats(task, public),
        "told": lambda: _told(public),
        "splits": lambda: _splits(public),
        "ids": lambda: _ids(public),
        "groups": lambda: _groups(public),
        "questions": lambda: _questions(task, public),
        "answers": lambda: _answers(public),
        "stands": lambda: _stands(public),
        "allows": lambda: _allows(public),
        "harness": lambda: _harness(task, public),
        "baselines": lambda: _baselines(task, public),
        "defaults": lambda: _defaults(task),
    }
    for name, look in looks.items():
        yield _looked(name, look)


def _looked(name: str, look: Callable[[], Check]) -> Check:
    """The check; broken as well if the task's own code fails in it."""
    try:
        return look()
    except Exception as e:
        return check(name, "the task's own code does not fail", [fault_of(e)], "Correct the task.")


def _repeats(task: Task, public: PublicFace) -> Check:
    faults = [] if task.public() == public else ["it is another one when it is made again"]
    return check(
        "same-face", "the public face is the same each time", faults, "Leave out clocks, chance and the order of sets."
    )


def _told(public: PublicFace) -> Check:
    texts = {"description": public.description, "licence": public.licence, "source": public.source}
    faults = [f"there is no {name}" for name, text in texts.items() if not text.strip()]
    faults += [] if public.max_answer_tokens >= 1 else [f"max_answer_tokens is {public.max_answer_tokens}"]
    return check("told", "description, licence, source and length of answers are given", faults, "Give them.")


def _splits(public: PublicFace) -> Check:
    sizes = {split: len(public.split(split)) for split in SPLITS}
    found = ", ".join(f"{split} {size}" for split, size in sizes.items())
    faults = [f"{split} is empty" for split, size in sizes.items() if not size]
    return check("splits", "train, dev and sealed have items", faults, "A run needs all three.", found)


def _ids(public: PublicFace) -> Check:
    counts = Counter(e.id for split in SPLITS for e in public.split(split))
    faults = [f"{name!r} is there {n} times" for name, n in counts.items() if n > 1]
    return check("ids", "every item has an id of its own", faults, "Give every item another id.")


def _groups(public: PublicFace) -> Check:
    where: dict[str, set[str]] = {}
    for split in SPLITS:
        for e in public.split(split):
            where.setdefault(e.group, set()).add(split)
    faults = [f"{group!r} is in {' and '.join(sorted(s))}" for group, s in where.items() if len(s) > 1]
    return check("groups", "no group is in two splits", faults, "Put whole groups into one split.")


def _questions(task: Task, public: PublicFace) -> Check:
    has_tools = bool(task.tools(public.train[0])) if public.train else False
    where: dict[bytes, tuple[str, str]] = {}
    faults = []
    for split in SPLITS:
        for e in public.split(split):
            first = where.setdefault(msgspec.json.encode(e.input, order="sorted"), (split, e.id))
            if first[0] != split:
                faults.append(f"{e.id!r} of {split} asks what {first[1]!r} of {first[0]} asks")
    return check(
        "questions",
        "no question is asked in two splits",
        faults,
        "Leave it out of one, or put both into one group.",
        "what is asked stands behind the tools" if has_tools else "",
        applies=not has_tools,
    )


def _answers(public: PublicFace) -> Check:
    train = {e.id for e in public.train}
    faults = [f"train item {name!r} has none" for name in sorted(train - set(public.answers))]
    faults += [f"{name!r} is no train item and has one" for name in sorted(set(public.answers) - train)]
    inputs = Counter(key for e in (*public.dev, *public.sealed) for key in e.input if key.lower() in _TELLING)
    faults += [f"{n} items of dev and sealed have a field {key!r}" for key, n in inputs.items()]
    return check("answers", "answers stand in the public face for train, and for train alone", faults, "Correct that.")


_TELLING = ("answer", "answers", "truth", "label", "target", "solution", "expected")


#: Share of a split's items from which on something holds for nearly all of them.
NEARLY = 0.9
TOKEN = re.compile(r"[^\W_]+(?:[.,][0-9]+)*")


def tokens(text: str) -> list[str]:
    """Words and numbers of a text in its order, in lower case; signs and punctuation are left out."""
    return TOKEN.findall(text.lower())


def _stands(public: PublicFace) -> Check:
    """Whether the truths of train stand in their own questions or ids, and others' truths do not."""
    pairs = [(e, tokens(public.answers[e.id])) for e in public.train if tokens(public.answers.get(e.id, ""))]
    where: dict[str, Callable[[Example], str]] = {
        "question": lambda e: " ".join(text for _, text in leaves(e.input)),
        "id": lambda e: e.id,
    }
    shares = {}
    for name, text in where.items():
        held = [f" {' '.join(tokens(text(e)))} " for e, _ in pairs]
        truths = [f" {' '.join(truth)} " for _, truth in pairs]
        # By chance: how often the truth of another item stands there, one with another truth.
        own = sum(t in h for h, t in zip(held, truths, strict=True))
        others = [
            (h, t)
            for step in (1, 7, 31)
            for i, h in enumerate(held)
            if (t := truths[(i + step) % len(held)]) != truths[i]
        ]
        chance = sum(t in h for h, t in others) / len(others) if others else 1.0
        shares[name] = (own / len(pairs) if pairs else 0.0, chance)
    faults = {
        name: f"the answer stands in {own:.0%} of train's {name}s, and another item's in {chance:.0%}"
        for name, (own, chance) in shares.items()
        if own >= NEARLY and chance < own / 2
    }
    found = check(
        "stands",
        "an answer does not stand in its own question or id",
        list(faults.values()),
        "Leave it out, unless finding it there is what is asked for.",
        applies=bool(pairs),
    )
    # Where a passage is searched its answer stands in it; in ids it has no business.
    return found if "id" in faults else warns(found)


def warns(found: Check) -> Check:
    """The same check, which warns where it would be broken."""
    return msgspec.structs.replace(found, outcome="warns") if found.outcome == "broken" else found


def _allows(public: PublicFace) -> Check:
    allows, faults = public.allows, []
    for name in allows.packages:
        try:
            distribution(name)
        except (PackageNotFoundError, ValueError):
            faults.append(f"the package {name!r} is not installed")
    for name in ("memory_mb", "disk_mb", "prepare_seconds"):
        value = getattr(allows, name)
        faults += [] if value > 0 else [f"{name} is {value:g}"]
    return check("allows", "what a harness may ask for is there", faults, "Install it, or do not allow it.")


def _harness(task: Task, public: PublicFace) -> Check:
    next_step = "Correct the harness that the task brings."
    promise = "the first harness is a valid one, and its tools are there"
    try:
        manifest = make_harness(task.harness()).manifest
    except BasculeError as e:
        return check("harness", promise, [e.message], next_step)
    tools = task.tools(public.train[0]) if public.train else {}
    faults = [
        f"the manifest names the tool {name!r}, which there is not" for name in manifest.tools if name not in tools
    ]
    return check("harness", promise, faults, next_step, f"tools: {', '.join(tools) or 'none'}")


def _baselines(task: Task, public: PublicFace) -> Check:
    partly, names = [], Counter[str]()
    for baseline in task.baselines(public):
        names[baseline.name] += 1
        for split in ("dev", "sealed"):
            missing = sum(e.id not in baseline.answers.get(split, {}) for e in public.split(split))
            partly += [f"{baseline.name} answers {missing} items of {split} not"] if missing else []
    faults = [f"two are called {name!r}" for name, n in names.items() if n > 1]
    faults += [] if names else ["there is none"]
    promise = "there are baselines, for every item of dev and sealed"
    if partly and not faults:
        return warns(check("baselines", promise, partly, "An item without an answer counts as failed."))
    return check("baselines", promise, faults, "Correct them.", ", ".join(names))


def _defaults(task: Task) -> Check:
    try:
        defaults = task.defaults()
        parse_config({**defaults, "task": {"params": {}, **defaults.get("task", {}), "name": task.name}})
    except BasculeError as e:
        return check("defaults", "its defaults are a valid configuration", [e.message], "Correct them.")
    return check("defaults", "its defaults are a valid configuration", [], "")
