"""The private face of ``sia-dir``: grades submissions, by ours or by running the directory's evaluator in the sandbox.

The evaluator gets the directory's ``data/`` and the submission, in a sandbox of its own that no agent is in. Of what it
prints nothing is told, since it prints the answers: only its figure, or that there is none and why.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from bascule.plugins.sandbox import Program, Programs, Ran
from bascule.plugins.tasks.sia_dir_files import EVALUATOR, Shape
from bascule.plugins.tasks.sia_dir_grades import Key, NoFigure, correct, figure_of, key_of, read
from bascule.plugins.tasks.sia_dir_submission import PATTERNS, NotASubmission, unpack
from bascule.schemas.errors import ConfigError, ScoringError
from bascule.schemas.events import Split
from bascule.schemas.trajectory import Scored, Unscored, Verdict

Grader = Literal["ours", "theirs"]
#: What SIA gives an evaluator, s.
EVALUATE_SECONDS = 600.0
_OWN_SECONDS = 60.0
#: Distributions that agents and evaluators may import, by the name of the import.
DISTRIBUTIONS = {
    "numpy": "numpy",
    "pandas": "pandas",
    "pydantic": "pydantic",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
}
_GEN = "gen"
_RESULTS = f"{_GEN}/results.json"
_SAMPLE = "sample_submission.csv"
#: What evaluators write, so that no submission may bring it, whatever patterns a user gives.
_GRADES = ("results.json", "evaluation_results.json")
# Without ``site`` there is no ``exit``, which scripts use; and evaluators are promised an absolute path.
_DRIVER = f"""\
import builtins, os, runpy, sys
builtins.exit = builtins.quit = sys.exit
path = os.path.abspath(sys.argv[1])
sys.argv = [path, "--gen-dir", os.path.abspath({_GEN!r})]
sys.path.insert(0, os.path.dirname(path))
runpy.run_path(path, run_name="__main__")
"""
_RAISED = re.compile(rb"^([A-Za-z_][A-Za-z0-9_.]{0,60}(?:Error|Exception|Exit|Interrupt))\b", re.MULTILINE)


def imported(sources: Mapping[str, str]) -> tuple[str, ...]:
    """The distributions that Python files import, of those that there may be and that are installed here."""
    names: set[str] = set()
    for file, text in sources.items():
        if not file.endswith(".py"):
            continue
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # it fails when it runs, and says so then
        for node in nodes:
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return tuple(sorted(d for name, d in DISTRIBUTIONS.items() if name in names and _installed(d)))


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


class _NotStarted(Exception):
    """The sandbox could not start the evaluator, which is no submission's fault."""


def handed_in(files: Mapping[str, str], patterns: Sequence[str] = PATTERNS) -> dict[str, str]:
    """Of the files of an answer those that a submission may have; an answer can name what it likes.

    Where an evaluator ends well without a word, a ``results.json`` that came with the answer would be its figure.
    """

    def asked(name: str) -> bool:
        inner, _, last = name.rpartition("/")
        parts = (pattern.rpartition("/") for pattern in patterns)
        return any(inner == folder and fnmatch.fnmatchcase(last, form) for folder, _, form in parts)

    return {name: text for name, text in files.items() if asked(name) and name.partition("/")[0] not in _GRADES}


def evaluation(
    public: Mapping[str, bytes],
    private: Mapping[str, bytes],
    submission: Mapping[str, str],
    patterns: Sequence[str] = PATTERNS,
) -> Program:
    """The evaluator's program on one submission; files that match no pattern are left out (:func:`handed_in`)."""
    files = {f"task/data/public/{name}": data for name, data in public.items()}
    files |= {f"task/data/private/{name}": data for name, data in private.items()}
    files |= {
        f"{_GEN}/{name}": text.encode("utf-8", "replace") for name, text in handed_in(submission, patterns).items()
    }
    source = public[EVALUATOR].decode("utf-8", "replace")
    size = sum(map(len, files.values())) >> 20
    return Program(
        files={"run_evaluator.py": _DRIVER.encode(), **files},
        arguments=("run_evaluator.py", f"task/data/public/{EVALUATOR}"),
        packages=imported({EVALUATOR: source}),
        seconds=EVALUATE_SECONDS,
        memory_mb=2048,
        disk_mb=64 + 2 * size,
        output_bytes=4 << 20,
        results=(_RESULTS,),
        result_bytes=16 << 20,
    )


def figure(ran: Ran, metric: str = "") -> float:
    """The figure of an evaluator that ran.

    Raises:
        NoFigure: it was stopped, failed, or left none; nothing that it printed is quoted but the class of an error.
    """
    if ran.ending != "exited":
        raise NoFigure(f"{EVALUATOR} was stopped ({ran.ending}) after {ran.seconds:.0f} s")
    if ran.exit_code != 0:
        raised = _RAISED.findall(ran.stderr)
        what = f" ({raised[-1].decode()})" if raised else ""
        raise NoFigure(f"{EVALUATOR} ended with {ran.exit_code}{what}")
    if _RESULTS not in ran.results:
        raise NoFigure(f"{EVALUATOR} left no results.json")
    return figure_of(ran.results[_RESULTS], metric)


class SiaPrivate:
    """Grades by ours: right items over all that are asked. Opened in the scoring process only."""

    def __init__(self, shape: Shape, key: Key) -> None:
        self._shape = shape
        self._key = key

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """The share of right items; an answer that is no submission is a failure, and so is none."""
        del split, example  # all ask the same
        try:
            given = read(self._shape, unpack(answer or ""))
        except NotASubmission:
            return _failed()
        right = correct(self._key, given)
        return Scored(
            reward=right / len(self._key),
            passed=right == len(self._key),
            well_formed=given.counted.answered == len(self._key),
        )


class SiaEvaluated:
    """Grades by the directory's evaluator. Opened in the scoring process only.

    An evaluator that fails on a submission but not on the directory's own sample fails because of the submission,
    which then scores 0. Where there is no sample to tell, there is no verdict.
    """

    seconds = 2 * EVALUATE_SECONDS + _OWN_SECONDS

    def __init__(
        self,
        public: Mapping[str, bytes],
        private: Mapping[str, bytes],
        metric: str,
        patterns: Sequence[str] = PATTERNS,
    ) -> None:
        self._public = public
        self._private = private
        self._metric = metric
        self._patterns = tuple(patterns)
        self._programs: Programs | None = None
        self._works: bool | None = None

    def use(self, programs: Programs) -> None:
        self._programs = programs

    def score(self, split: Split, example: str, answer: str | None) -> Verdict:
        """The evaluator's figure as it says it.

        Raises:
            ScoringError: there is nothing to run programs with.
        """
        del split, example
        try:
            files = unpack(answer or "")
        except NotASubmission:
            return _failed()
        if not handed_in(files, self._patterns):
            return _failed()
        try:
            try:
                reward = self._figure(files, self._patterns)
            except NoFigure as e:
                return _failed() if self._works_on_sample() else Unscored(reason=f"The directory's evaluator: {e}.")
        except _NotStarted as e:
            return Unscored(reason=f"The sandbox could not start the directory's evaluator: {e}")
        return Scored(reward=reward)

    def _figure(self, files: Mapping[str, str], patterns: Sequence[str]) -> float:
        if self._programs is None:
            raise ScoringError("The task sia-dir has no sandbox for its evaluator.", next_step="Score it in a run.")
        ran = self._programs.run(evaluation(self._public, self._private, files, patterns))
        if ran.ending == "refused":
            raise _NotStarted(ran.stderr.decode("utf-8", "replace")[-300:])
        return figure(ran, self._metric)

    def _works_on_sample(self) -> bool:
        sample = self._public.get(_SAMPLE)
        if sample is None:
            return False
        if self._works is None:
            try:
                self._figure({"submission.csv": sample.decode("utf-8", "replace")}, PATTERNS)
            except NoFigure:
                self._works = False
            else:
                self._works = True
        return self._works


def private_face(
    name: str,
    shape: Shape,
    public: Mapping[str, bytes],
    private: Mapping[str, bytes],
    grader: Grader | None,
    metric: str,
    patterns: Sequence[str] = (),
) -> SiaPrivate | SiaEvaluated:
    """The face for a grader; by default ours where it can be had.

    Args:
        patterns: of the files that are handed in; the usual ones if there are none.

    Raises:
        ConfigError: that grader cannot be had.
    """
    key = key_of(shape, private) if grader != "theirs" else None
    if key is not None:
        return SiaPrivate(shape, key)
    if grader == "ours":
        raise ConfigError(
            f"{name} holds no answers of a form that is known, so there is no grader of ours for it.",
            next_step="Leave grader out: the directory's own evaluate.py grades then.",
        )
    if EVALUATOR not in public:
        raise ConfigError(
            f"{name} has no data/public/{EVALUATOR}, and no answers of a form that is known: nothing can grade it.",
            next_step=f"Write its {EVALUATOR}, which takes --gen-dir and writes results.json there.",
        )
    return SiaEvaluated(public, private, metric, patterns or PATTERNS)


def _failed() -> Scored:
    return Scored(reward=0.0, passed=False, well_formed=False)
