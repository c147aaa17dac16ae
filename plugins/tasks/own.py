"""The task ``own``: somebody's own, in one file or folder; ``bascule tasks new`` writes one that works.

The file defines

- ``DESCRIPTION``: what is asked for; for people, authors and agents (in a folder also ``description.md``),
- ``items(split)``: a list for ``train``, ``dev`` and ``sealed``, each item a dict with ``answer`` and ``question`` (or
  ``input``, a dict of all that agents may see), and, if wanted, ``id`` and ``group``: a group stays in one split (in a
  folder also ``train.jsonl``, ``dev.jsonl`` and ``sealed.jsonl``),
- ``verify(item, answer)``: True or False; or a number; or one of the names in ``LEVELS``, worst first, for a rank; or a
  dict with ``reward`` and, if wanted, ``passed``, ``well_formed``; or None for an answer of another form than is asked
  for. ``answer`` is text; an episode without an answer is never verified and counts as a failure,

and, if wanted, ``verify_episode(item, answer, calls)`` for step rewards, ``tools(item)``, ``HARNESS`` (or the folder
``harness/``), ``PROMPT``, ``PARAMS`` of the general harness, ``ALLOWS``, ``BASELINES``, ``DEFAULTS``, ``NAME``,
``LICENCE``, ``SOURCE`` and ``MAX_ANSWER_TOKENS``. ``REGRESSION``, a list of further items (in a folder also
``regression.jsonl``), is what a candidate must not become worse at. ``verify_second(item, answer)`` is a second
opinion, written independently of ``verify``: no lever works towards it, and where the two drift apart nothing is
promoted (``--set second=task``).

A reward is a number between -1e9 and 1e9, best between 0 and 1: what has no answer gets 0. A NumPy scalar, or an array
of one element, is what it holds. Loading the file, each ``items(split)`` and each baseline has 120 seconds, ``verify``
60.

Its truths stand in the file, so they are wherever it is loaded: in the runtime and in the scoring process. They never
enter the sandbox, a prompt or the log. The file's hash is part of the version, so a run notices when it has changed.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from bascule.plugins.task import Baseline, Example, PrivateFace, PublicFace, Tool
from bascule.plugins.tasks.harness_files import reference_files
from bascule.plugins.tasks.own_file import Source, called, code_file, digest, read, wrong
from bascule.plugins.tasks.splits import best_constant, constant_baseline, rule_baseline
from bascule.schemas.errors import ConfigError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import (
    MOST_REWARD,
    MOST_STEPS,
    ModelCall,
    Scored,
    ToolCall,
    Trajectory,
    Unscored,
    Verdict,
)

NAME = "own"
SECOND = "verify_second"
#: The least that a true answer of train must be able to have, in tokens.
_TOKENS = 16


def named(text: str) -> dict[str, Any] | None:
    """The configuration of the task that a path names: ``{"name", "params"}``; None where ``text`` is no path.

    Raises:
        ConfigError: it is a path, and there is no task.
    """
    path = Path(text)
    if not (text.endswith(".py") or "/" in text or path.is_dir()):
        return None
    path = path.absolute()
    return {"name": NAME, "params": {"path": str(path), "sha256": digest(path)}}


def text_of(answer: Any) -> str:
    """A truth as a perfect agent would say it: texts as they are, other values as JSON."""
    return answer if isinstance(answer, str) else msgspec.json.encode(answer).decode()


class _NoVerdict(Exception):
    """What ``verify`` gave is no verdict; says so with types and names of fields alone, never with what they hold."""


def verdict(given: Any, levels: Sequence[str] = ()) -> Verdict:
    """What ``verify`` gave, as a verdict.

    Returns:
        Unscored where it is none of what it may be: a level that there is not, a number that is not finite or beyond
        ``MOST_REWARD``. The reason names types and fields, and nothing that may hold a truth.
    """
    try:
        return _scored(given, levels)
    except _NoVerdict as e:
        return Unscored(reason=f"verify returned {e}.")


def _scored(given: Any, levels: Sequence[str]) -> Scored:
    if given is None:
        return Scored(reward=0.0, passed=False, well_formed=False)
    if isinstance(given, Mapping):
        if "reward" not in given:
            raise _NoVerdict("a dict without a reward")
        base = _rewarded(given["reward"], levels, " as the reward of a dict")
        passed = given.get("passed")
        return Scored(
            reward=base.reward,
            passed=base.passed if passed is None else _truth(passed, "passed"),
            well_formed=_truth(given.get("well_formed", True), "well_formed"),
            steps=_steps(given.get("steps", ())),
        )
    return _rewarded(given, levels, "")


def _rewarded(given: Any, levels: Sequence[str], where: str) -> Scored:
    """A rank, a truth value or a number."""
    if isinstance(given, str):
        if given not in levels:
            known = f"which is none of the {len(levels)} LEVELS" if levels else "and there are no LEVELS"
            raise _NoVerdict(f"a str{where}, {known}")
        rank = list(levels).index(given)
        return Scored(reward=rank / max(len(levels) - 1, 1), passed=rank == len(levels) - 1)
    given = _element(given, where)
    if isinstance(given, bool):
        return Scored(reward=float(given), passed=given)
    return Scored(reward=_number(given, where))


def _element(given: Any, where: str) -> Any:
    """What a NumPy scalar, or an array or tensor of one element, holds; anything else as it is."""
    if not callable(getattr(given, "item", None)):
        return given
    try:
        return given.item()
    except Exception:
        raise _NoVerdict(f"{_a(given)}{where} of more or less than one element") from None


def _number(given: Any, where: str) -> float:
    if not hasattr(type(given), "__float__") and not hasattr(type(given), "__index__"):
        raise _NoVerdict(f"{_a(given)}{where}")
    try:
        number = float(given)
    except OverflowError:
        number = math.inf
    except Exception as e:
        raise _NoVerdict(f"{_a(given)}{where} that is no number ({type(e).__name__})") from None
    if math.isnan(number):
        raise _NoVerdict(f"NaN{where}")
    if abs(number) > MOST_REWARD:
        raise _NoVerdict(f"a number{where} beyond {MOST_REWARD:,.0f}")
    return number


def _truth(given: Any, field: str) -> bool:
    try:
        return bool(given)
    except Exception as e:
        raise _NoVerdict(f"a dict whose {field} is {_a(given)} without a truth value ({type(e).__name__})") from None


def _steps(given: Any) -> tuple[float, ...]:
    where = " as the reward of a step"
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise _NoVerdict(f"a dict whose steps are {_a(given)}, not a list")
    steps = tuple(islice(given, MOST_STEPS + 1))
    if len(steps) > MOST_STEPS:
        raise _NoVerdict(f"a dict with more than {MOST_STEPS} steps")
    return tuple(_number(_element(step, where), where) for step in steps)


def _a(given: Any) -> str:
    """The type's name with its article."""
    name = type(given).__name__[:40]
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


class OwnPrivate:
    """Scores with the file's ``verify``, or another function of its kind; opened in the scoring process only."""

    def __init__(self, source: Source, function: str = "verify") -> None:
        self._file = code_file(source.path)
        self._function = function
        self._verify: Callable[..., Any] = getattr(source.module, function)
        self._levels = tuple(getattr(source.module, "LEVELS", ()))
        self._items = {(split, item.id): item for split, found in source.items.items() for item in found}

    def item(self, split: Split, example: str) -> dict[str, Any]:
        """A fresh copy, since a verifier may change what it is given."""
        item: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self._items[split, example].plain()))
        return item

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """The verdict of ``verify``; no answer is a failure.

        Raises:
            KeyError: the split has no such item.
        """
        item = self.item(split, example)
        return verdict(None) if answer is None else self._judged(self._function, lambda: self._verify(item, answer))

    def _judged(self, name: str, work: Callable[[], Any]) -> Verdict:
        """What a function of the file makes of an answer; Unscored where it fails, with the file's line and no text."""
        try:
            given = work()
        except (Exception, SystemExit, KeyboardInterrupt) as e:
            frames = traceback.extract_tb(e.__traceback__)
            lines = [f.lineno for f in frames if f.filename == str(self._file)]
            place = f", line {lines[-1]}" if lines else ""
            return Unscored(reason=f"{name} failed: {type(e).__name__} at {self._file.name}{place}.")
        found = verdict(given, self._levels)
        if isinstance(found, Unscored):
            return Unscored(reason=f"{found.reason.replace('verify', name, 1)[:-1]} ({self._file.name}).")
        return found


class OwnEpisodesPrivate(OwnPrivate):
    """Scores with the file's ``verify_episode`` as well, which gives step rewards."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._verify_episode: Callable[..., Any] = source.module.verify_episode

    def score_episode(self, split: Split, example: str, episode: Trajectory) -> Verdict:
        """The verdict of ``verify_episode(item, answer, calls)``; an episode without an answer is a failure.

        ``calls`` lists what happened, in order: ``{"model": [texts]}`` or ``{"tool", "arguments", "result", "error"}``.

        Raises:
            KeyError: the split has no such item.
        """
        item = self.item(split, example)
        calls = [c for step in episode.steps if (c := _call(step)) is not None]
        if episode.answer is None:
            return Scored(reward=0.0, passed=False, well_formed=False, steps=(0.0,) * sum("model" in c for c in calls))
        return self._judged("verify_episode", lambda: self._verify_episode(item, episode.answer, calls))


def _call(step: Any) -> dict[str, Any] | None:
    if isinstance(step, ModelCall):
        return {"model": [output.text for output in step.outputs]}
    if isinstance(step, ToolCall):
        result = None if step.result is None else msgspec.json.decode(step.result)
        arguments = msgspec.json.decode(step.arguments)
        return {"tool": step.name, "arguments": arguments, "result": result, "error": step.error}
    return None


class Own:
    """The task ``own``. Parameters: ``path`` of the file or folder, and its ``sha256`` where it is to be that one."""

    def __init__(self, params: dict[str, Any]) -> None:
        unknown = sorted(set(params) - {"path", "sha256"})
        if unknown:
            raise ConfigError(f"The task own has no parameter {unknown[0]!r}.", next_step="It has path and sha256.")
        self._path = params.get("path")
        self._sha256 = params.get("sha256")
        self.name = NAME
        self.summary = "one's own, in a file or folder: --task PATH; `bascule tasks new PATH` makes one"

    def _source(self) -> Source:
        if not isinstance(self._path, str):
            raise ConfigError("The task own needs the path of its file.", next_step="Give --task PATH instead.")
        path = Path(self._path)
        if self._sha256 is not None and (now := digest(path)) != self._sha256:
            raise ConfigError(
                f"The task {path} has changed: its sha256 is {now}, and was {self._sha256}.",
                next_step="Put the recorded file back, or start a new run.",
            )
        return read(path)

    def _setting(self, name: str, default: Any, type_: type) -> Any:
        source = self._source()
        given = getattr(source.module, name, default)
        if not isinstance(given, type_):
            raise ConfigError(
                f"The task {code_file(source.path)} has a {name} that is no {type_.__name__}.", next_step="Correct it."
            )
        return given

    def public(self) -> PublicFace:
        source = self._source()
        answers = {item.id: text_of(item.answer) for item in source.items["train"]}
        longest = max(map(len, answers.values()))
        stem = source.path.name.removesuffix(".py")
        return PublicFace(
            name=self._setting("NAME", stem, str),
            version=source.sha256[:16],
            description=source.description,
            train=tuple(i.example() for i in source.items["train"]),
            answers=answers,
            dev=tuple(i.example() for i in source.items["dev"]),
            sealed=tuple(i.example() for i in source.items["sealed"]),
            max_answer_tokens=self._setting("MAX_ANSWER_TOKENS", max(longest, _TOKENS), int),
            source=self._setting("SOURCE", "the user's own", str),
            licence=self._setting("LICENCE", "the user's own", str),
            allows=source.allows,
            regression=tuple(i.example() for i in source.items["regression"]),
        )

    @property
    def ordinal(self) -> bool:
        """Whether its verdicts are ranks: it names ``LEVELS``."""
        return hasattr(self._source().module, "LEVELS")

    def private(self) -> PrivateFace:
        source = self._source()
        return OwnEpisodesPrivate(source) if hasattr(source.module, "verify_episode") else OwnPrivate(source)

    def second(self) -> PrivateFace:
        """The file's ``verify_second``.

        Raises:
            ConfigError: it has none.
        """
        source = self._source()
        if not callable(getattr(source.module, SECOND, None)):
            raise wrong(code_file(source.path), f"defines no function {SECOND}(item, answer)")
        return OwnPrivate(source, SECOND)

    def harness(self) -> dict[str, str]:
        """The file's own, or the general one with its ``PROMPT`` and ``PARAMS``."""
        source = self._source()
        params = {"form": "chat", "extract": "whole", **self._setting("PARAMS", {}, dict)}
        return source.harness or reference_files(
            name="chat", system_prompt=self._setting("PROMPT", source.description, str), params=params
        )

    def tools(self, example: Example) -> Mapping[str, Tool]:
        """What ``tools(item)`` gives for the item without its answer; plain functions are called with the arguments."""
        source = self._source()
        make = getattr(source.module, "tools", None)
        if make is None:
            return {}
        file, item = code_file(source.path), {"id": example.id, "input": example.input, **example.input}
        given = called(file, "in tools(item)", lambda: make(item))
        if not isinstance(given, Mapping):
            raise wrong(file, f"gives {_a(given)} in tools(item), not a dict of functions by name")
        if odd := [str(name) for name, function in given.items() if not callable(function)]:
            raise wrong(file, f"gives the tool {odd[0]!r} in tools(item) as no function")
        return {str(name): _tool(function) for name, function in given.items()}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """The best constant of train, and those of ``BASELINES``: functions of an item without its answer, by name."""
        rules: dict[str, Callable[[dict[str, Any]], Any]] = self._setting("BASELINES", {}, dict)
        file = code_file(self._source().path)
        return (
            constant_baseline("best-constant", public, best_constant(public)),
            *(_baseline(file, name, public, rule) for name, rule in rules.items()),
        )

    def defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = self._setting("DEFAULTS", {}, dict) if self._path is not None else {}
        return {"evaluation": {"train_groups": 16, "train_samples": 4}, "max_generations": 2, **defaults}


def _baseline(file: Path, name: str, public: PublicFace, rule: Callable[[dict[str, Any]], Any]) -> Baseline:
    """What a rule of ``BASELINES`` says to every item.

    Raises:
        ConfigError: it fails, or gives None.
    """
    if not callable(rule):
        raise wrong(file, f"has BASELINES[{name!r}], which is no function")

    def said(example: Example) -> str:
        given = rule({"id": example.id, "input": example.input, **example.input})
        if given is None:
            raise wrong(file, f"gives no answer to {example.id!r} in BASELINES[{name!r}]")
        return str(given)

    return called(file, f"in BASELINES[{name!r}]", lambda: rule_baseline(str(name), public, said))


def _tool(function: Callable[..., Any]) -> Tool:
    async def call(arguments: dict[str, Any]) -> str:
        result = function(**arguments)
        return str(await result if inspect.isawaitable(result) else result)

    return call
