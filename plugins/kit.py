"""The conformance kit: what a task promises, checked; cheats are planted, and must not pay.

Every check is data: its name, the promise, what came of it and what to do. The kit loads the public face here, and
scores through ``score``, which is the scoring process wherever that is to be trusted.
"""

from __future__ import annotations

import os
import re
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Literal

import msgspec

from bascule.plugins.task import Example, PublicFace, Task
from bascule.schemas.errors import BasculeError
from bascule.schemas.events import Split
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Scored, Unscored, Verdict

SPLITS: tuple[Split, ...] = ("train", "dev", "sealed")
#: Items that a check looks at where it need not look at all.
SAMPLE = 24
#: What prose that names every answer, or an answer said twice, may get.
LITTLE = 0.05
#: Characters up to which an answer counts as a word and not as a text or a program.
WORD = 200

Score = Callable[[Split, str, str | None], Awaitable[Verdict]]


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
GARBAGE: Mapping[str, str | None] = {
    "no answer": None,
    "nothing": "",
    "blanks": " \t\n\r ",
    "a null character": "\0",
    "not a number": "NaN",
    "infinity": "-Infinity",
    "a long number": "9" * 5000,
    "a huge number": "1e400",
    "deep brackets": "[" * 5000,
    "a long text": "x " * 8000,
    "another script": "\u0661\u0662 \u7b54\u6848 \U0001d7d9 \U0001f600",
    "marks of direction": "\u202e\u200b\ufeff",
    "a lone surrogate": "\ud800",
    "JSON": '{"answer": null, "reward": 1.0}',
    "code": "__import__('os').system('true')",
    "code that looks the answer up": "item['answer']",
    "code that looks the number up": 'int(item["answer"])',
    "a variable": "answer",
    "a format": "{item[answer]}",
    "a path": "../../private/answers",
}
#: From this score on a field is taken for the answer itself.
ALL_BUT = 0.9
#: What a lazy agent always says.
CONSTANTS = ("0", "1", "2", "True", "False", "yes", "no", "A", "B", "None", "[]", "{}")


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
_NUMBER = re.compile(r"-?[0-9]+")
_TOKEN = re.compile(r"[^\W_]+(?:[.,][0-9]+)*")


def tokens(text: str) -> list[str]:
    """Words and numbers of a text in its order, in lower case; signs and punctuation are left out."""
    return _TOKEN.findall(text.lower())


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
    faults = [
        f"the answer stands in {own:.0%} of train's {name}s, and another item's in {chance:.0%}"
        for name, (own, chance) in shares.items()
        if own >= NEARLY and chance < own / 2
    ]
    found = check(
        "stands",
        "an answer does not stand in its own question or id",
        faults,
        "Leave it out, unless finding it there is what is asked for.",
        applies=bool(pairs),
    )
    return _softened(found, ids=any("'s ids" in fault for fault in faults))


def _softened(found: Check, *, ids: bool) -> Check:
    """A leak in questions warns: where a passage is searched its answer stands in it. In ids it has no business."""
    return found if ids else _warns(found)


def _warns(found: Check) -> Check:
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
        return _warns(check("baselines", promise, partly, "An item without an answer counts as failed."))
    return check("baselines", promise, faults, "Correct them.", ", ".join(names))


def _defaults(task: Task) -> Check:
    try:
        parse_config({"task": {"name": task.name}, **task.defaults()})
    except BasculeError as e:
        return check("defaults", "its defaults are a valid configuration", [e.message], "Correct them.")
    return check("defaults", "its defaults are a valid configuration", [], "")


async def score_checks(public: PublicFace, score: Score) -> AsyncIterator[Check]:
    """What only scores can tell: truths count, garbage does not, and cheats do not pay; each check as it is done.

    Ends with the truths where none of them has a verdict: without one nothing pays, and all else would hold.
    """
    truths = [public.answers[e.id] for e in public.train if e.id in public.answers]
    words = bool(truths) and max(map(len, truths)) <= WORD and not any("\n" in t.strip() for t in truths)
    found, scored = await _truths(public, score)
    yield found
    if not scored:
        return
    yield await _garbage(public, score)
    yield await _code(public, score, words)
    yield await _constants(public, score)
    yield await _fields(public, score)
    yield await _leaks(public, score, words)
    yield await _prose(public, score, words)
    yield await _twice(public, score, words)


def bound(public: PublicFace) -> float:
    """What may be had without reading the question: a little over what equally frequent answers would give.

    1.25 / k + 0.1 for k different answers of train; 1 where all are alike, since nothing can be said then.
    """
    kinds = len(set(public.answers.values()))
    return 1.0 if kinds < 2 else min(1.0, 1.25 / kinds + 0.1)


def _full(verdict: Verdict) -> bool:
    if not isinstance(verdict, Scored):
        return False
    return verdict.passed is True or verdict.reward >= 1.0 or (verdict.passed is None and verdict.reward > 0)


def _reward(verdict: Verdict) -> float:
    return verdict.reward if isinstance(verdict, Scored) else 0.0


async def _mean(public: PublicFace, score: Score, answer: Callable[[int, Example], str | None]) -> float:
    """The score on dev; the denominator is its size, or that of what is looked at."""
    examples = spread(public.dev, 4 * SAMPLE)
    return sum([_reward(await score("dev", e.id, answer(i, e))) for i, e in enumerate(examples)]) / len(examples)


async def _truths(public: PublicFace, score: Score) -> tuple[Check, bool]:
    """The check, and whether any truth has a verdict, where there are truths."""
    examples = [e for e in spread(public.train) if e.id in public.answers]
    faults, reasons = [], []
    for e in examples:
        verdict = await score("train", e.id, public.answers[e.id])
        if isinstance(verdict, Unscored):
            reasons.append(verdict.reason.rstrip("."))
        elif not _full(verdict):
            faults.append(f"that of train item {e.id!r} does not (reward {verdict.reward:g})")
    faults += [f"{n} of {len(examples)} have no verdict: {reason}" for reason, n in Counter(reasons).most_common()]
    scored = len(reasons) < len(examples) or not examples
    less = "" if scored else "; what else needs verdicts was not checked"
    found = check(
        "truths",
        "train answers get full marks",
        faults,
        f"Correct the scorer or the answers{less}.",
        f"{len(examples)} of them",
    )
    return found, scored


async def _garbage(public: PublicFace, score: Score) -> Check:
    faults = []
    examples: list[tuple[Split, Example]] = [(s, e) for s in SPLITS for e in spread(public.split(s), 2)]
    for name, answer in GARBAGE.items():
        for split, e in examples:
            verdict = await score(split, e.id, answer)
            if isinstance(verdict, Unscored):
                faults.append(f"{name} leaves {split} item {e.id!r} unscored: {verdict.reason.rstrip('.')}")
            elif verdict.reward > 0 and (verdict.well_formed or answer is None):
                faults.append(f"{name} gets {verdict.reward:g} on {split} item {e.id!r}")
            elif verdict.passed:
                faults.append(f"{name} passes {split} item {e.id!r}")
    return check(
        "garbage",
        "empty, missing, odd and very long answers fail; none stops the scorer",
        faults,
        "Let the scorer look at an answer's form and length first, and call what is no answer ill-formed.",
        f"{len(GARBAGE)} kinds on {len(examples)} items",
    )


#: Code that gives the answer if it is run where the verifier stands; they do no harm there.
LOOKUPS = (
    *("item['answer']", 'item["answer"]', 'int(item["answer"])', 'float(item["answer"])', 'str(item["answer"])'),
    *("item.get('answer')", "{item[answer]}", "truth", "expected", "target", "label", "solution"),
)


def _worked(truth: str) -> list[str]:
    """Code that makes this truth."""
    made = [f"''.join([{truth!r}])", f"{truth!r} if __import__('os') else ''"]
    if _NUMBER.fullmatch(truth):
        made += [f"{truth}+0", f"{truth} if __import__('os') else 0", f"int('{truth}')"]
    return made


async def _code(public: PublicFace, score: Score, words: bool) -> Check:
    """Whether code counts as the answer that it would give."""
    told = [e for e in spread(public.train, 3) if e.id in public.answers] if words else []
    asked: list[tuple[Split, Example, str]] = [
        ("train", e, text) for e in told for text in _worked(public.answers[e.id].strip())
    ]
    asked += [(s, e, text) for s in SPLITS for e in spread(public.split(s), 2) for text in LOOKUPS if words]
    truths = [_reward(await score("train", e.id, public.answers[e.id])) for e in told]
    right = max(min(truths, default=1.0), 0.0)
    faults = []
    for split, e, text in asked:
        verdict = await score(split, e.id, text)
        if isinstance(verdict, Scored) and (verdict.passed or (verdict.reward > 0 and verdict.reward >= right)):
            faults.append(f"{text!r} gets {verdict.reward:g} on {split} item {e.id!r}")
    return check(
        "code",
        "code that would give the answer is no answer",
        faults,
        "Compare texts or numbers; never eval, exec or format an answer: it would run beside the truths.",
        f"{len(asked)} of them" if words else "answers are texts or programs",
        applies=words,
    )


def _places(public: PublicFace) -> dict[str, Callable[[Example], str]]:
    """The id and the fields of the questions, by name."""
    fields = sorted({place for e in spread(public.dev) for place, _ in leaves(e.input)})[:20]

    def field(place: str, e: Example) -> str:
        return next((text for p, text in leaves(e.input) if p == place), "")

    return {"the id": lambda e: e.id, **{f"the field {p}": partial(field, p) for p in fields}}


#: Ways of cutting a text into what an answer may be.
_CUTS: Mapping[str, Callable[[str], list[str]]] = {
    "word": _TOKEN.findall,
    "piece": lambda text: [piece.strip("()[]{}<>.,;:!?\"'`") for piece in text.split()],
}
_ORDINALS = {0: "first", 1: "second", 2: "third", -1: "last", -2: "last but one", -3: "last but two"}


async def _leaks(public: PublicFace, score: Score, words: bool) -> Check:
    """Whether a word at one place of a question or an id is the answer, in nearly all items of a split."""
    kinds = len(set(public.answers.values()))
    faults: dict[tuple[str, str], str] = {}
    for split in SPLITS if words and kinds > 1 else ():
        examples = spread(public.split(split))
        for place, text in _places(public).items():
            for cut, pieces in _CUTS.items():
                cuts = [pieces(text(e)) for e in examples]
                for at, ordinal in _ORDINALS.items():
                    said = [c[at] if -len(c) <= at < len(c) else "" for c in cuts]
                    if await _pays(score, split, examples, said):
                        faults.setdefault((split, place), f"the {ordinal} {cut} of {place} is the answer in {split}")
    found = check(
        "leaks",
        "no place of a question or an id gives its answer away",
        list(faults.values()),
        "Leave it out of ids, which logs show, and of questions, unless finding it there is what is asked for.",
        "" if words else "answers are texts or programs",
        applies=words and kinds > 1,
    )
    return _softened(found, ids=any(place == "the id" for _, place in faults))


async def _pays(score: Score, split: Split, examples: Sequence[Example], said: Sequence[str]) -> bool:
    """Whether nearly all of the answers are right, and not because nearly any is; looks no longer than it must."""
    may = len(examples) - -(-NEARLY * len(examples) // 1)
    wrong = 0
    for e, text in zip(examples, said, strict=True):
        wrong += not (text and _full(await score(split, e.id, text)))
        if wrong > may:
            return False
    moved = [*said[1:], *said[:1]]
    others = [(e, m) for e, s, m in zip(examples, said, moved, strict=True) if m != s]
    right = sum([_full(await score(split, e.id, text)) for e, text in others])
    return len(others) > 0 and right < len(others) / 2


async def _constants(public: PublicFace, score: Score) -> Check:
    most = bound(public)
    candidates: dict[str, Callable[[int, Example], str | None]] = {
        f"always {text!r}": (lambda _i, _e, text=text: text)  # type: ignore[misc]
        for text in dict.fromkeys((*_common(public), *CONSTANTS))
        if len(text) <= WORD
    }
    candidates["the item's place, from 0"] = lambda i, _: str(i)
    candidates["the item's place, from 1"] = lambda i, _: str(i + 1)
    candidates["the item's id"] = lambda _, e: e.id
    scores = {name: await _mean(public, score, answer) for name, answer in candidates.items()}
    faults = [f"{name} gets {s:.3f} on dev, and may get {most:.3f}" for name, s in scores.items() if s > most]
    best = max(scores, key=lambda name: scores[name])
    return check(
        "constants",
        "who does not read the question gets little",
        faults,
        "Balance the answers, so that no constant and no place pays.",
        f"best: {best} with {scores[best]:.3f} on dev (may be {most:.3f})",
    )


def _common(public: PublicFace) -> list[str]:
    """The answers that are most often right on train."""
    return [text for text, _ in Counter(public.answers.values()).most_common(5)]


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


async def _fields(public: PublicFace, score: Score) -> Check:
    most = bound(public)
    places = sorted({place for e in spread(public.dev) for place, _ in leaves(e.input)})[:50]
    scores = {}
    for place in places:
        scores[place] = await _mean(
            public,
            score,
            lambda _, e, place=place: next((t for p, t in leaves(e.input) if p == place), None),  # type: ignore[misc]
        )
    faults = [f"the field {p} gets {s:.3f} on dev, and may get {most:.3f}" for p, s in scores.items() if s > most]
    best = max(scores, key=lambda p: scores[p], default="none")
    # A field may say much of an answer and not be it.
    soften = _warns if scores.get(best, 0.0) < ALL_BUT else lambda found: found
    return soften(
        check(
            "fields",
            "no field of a question, the question itself included, is its answer",
            faults,
            "Leave that field out of what agents get, unless it is meant to say so much.",
            f"best: {best} with {scores.get(best, 0.0):.3f} on dev",
        )
    )


async def _prose(public: PublicFace, score: Score, words: bool) -> Check:
    every = list(dict.fromkeys(public.answers.values()))[:2000]
    texts = {
        "a sentence with all answers": f"The answer is {' or '.join(every)}.",
        "all answers, one a line": "\n".join(every),
        "all answers, as a list": msgspec.json.encode(every).decode(),
        "a sentence with the commonest answer": f"The answer is clearly {(_common(public) or [''])[0]}.",
    }
    applies = words and len(every) > 1
    scores = {n: await _mean(public, score, lambda _i, _e, t=t: t) for n, t in texts.items()} if applies else {}  # type: ignore[misc]
    faults = [f"{n} gets {s:.3f} on dev" for n, s in scores.items() if s > LITTLE]
    return check(
        "prose",
        "prose that holds an answer, or all of them, is no answer",
        faults,
        "Compare the whole answer; do not search it.",
        "" if applies else "answers are texts or programs",
        applies=applies,
    )


async def _twice(public: PublicFace, score: Score, words: bool) -> Check:
    faults = []
    examples = [e for e in spread(public.train) if e.id in public.answers] if words else []
    for name, join in (("twice", "{0} {0}"), ("twice on two lines", "{0}\n{0}"), ("twice with a comma", "{0}, {0}")):
        rewards = [_reward(await score("train", e.id, join.format(public.answers[e.id]))) for e in examples]
        if examples and sum(rewards) / len(rewards) > LITTLE:
            faults.append(f"the true answer {name} gets {sum(rewards) / len(rewards):.3f}")
    return check(
        "twice",
        "an answer that is said twice is not an answer",
        faults,
        "Compare the whole answer.",
        "" if words else "answers are texts or programs",
        applies=words,
    )
