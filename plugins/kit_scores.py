"""The conformance kit, continued: what only scores can tell. Cheats are planted, and must not pay.

Scores come through ``score``, which is the scoring process wherever that is to be trusted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial

import msgspec

from bascule.plugins.kit import NEARLY, SAMPLE, SPLITS, TOKEN, Check, check, leaves, spread, warns
from bascule.plugins.task import Example, PublicFace
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Unscored, Verdict

#: What prose that names every answer, or an answer said twice, may get.
LITTLE = 0.05
#: Characters up to which an answer counts as a word and not as a text or a program.
WORD = 200

Score = Callable[[Split, str, str | None], Awaitable[Verdict]]


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


_NUMBER = re.compile(r"-?[0-9]+")


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
    "word": TOKEN.findall,
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
    # Where a passage is searched its answer stands in it; in ids it has no business.
    return found if any(place == "the id" for _, place in faults) else warns(found)


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
    soften = warns if scores.get(best, 0.0) < ALL_BUT else lambda found: found
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
