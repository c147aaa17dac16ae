"""Commands for what users of the peer SIA have: task directories, finished generations, providers and profiles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from bascule.runtime.cli.command import Debug, Json, app, print_json, run_async
from bascule.schemas.errors import BasculeError
from bascule.schemas.events import EpisodesRequested, TrajectoryLogged
from bascule.schemas.trajectory import Scored

if TYPE_CHECKING:
    from bascule.plugins.tasks.sia_dir_grades import Counted
    from bascule.schemas.envelope import Recorded
    from bascule.schemas.run import RunConfig
    from bascule.schemas.sandbox import SandboxConfig

TASK = "sia-dir"
#: How much of an episode's error a report repeats, characters.
_SAID = 400


class Grades(msgspec.Struct, frozen=True, kw_only=True):
    """One submission, graded by ours and by the directory's own evaluator.

    Attributes:
        ours, theirs: shares from 0 to 1; None where there is none, and ``why_ours`` or ``why_theirs`` says why.
        counted: what the submission holds; None where it cannot be read.
        differences: where the two count otherwise, a sentence each.
        recorded: the share in a ``results.json`` that lies beside the submission.
    """

    ours: float | None
    theirs: float | None
    why_ours: str = ""
    why_theirs: str = ""
    counted: Counted | None = None
    differences: tuple[str, ...] = ()
    recorded: float | None = None


def directory_named(path: Path) -> str:
    """A SIA task directory as :func:`~bascule.runtime.cli.own_tasks.chosen_task` takes it.

    Raises:
        ConfigError: it is none.
    """
    from bascule.plugins.tasks.sia_dir_files import checked

    return str(checked(path.expanduser()))


async def _graded(params: dict[str, Any], answer: str, sandbox: SandboxConfig) -> tuple[float | None, str]:
    from bascule.verifiers.scoring import Scorer

    try:
        async with Scorer(TASK, params, sandbox=sandbox) as scorer:
            verdict = await scorer.score("dev", "dev-1", answer)
    except BasculeError as e:
        return None, e.message
    return (verdict.reward, "") if isinstance(verdict, Scored) else (None, verdict.reason)


async def compare(params: dict[str, Any], answer: str, sandbox: SandboxConfig) -> Grades:
    """Grade a submission both ways, each in a scoring process.

    Args:
        params: of the task ``sia-dir``.
        answer: the submission as an episode hands it in.
    """
    from bascule.plugins.tasks.sia_dir_files import EVALUATOR, files_of, shape_of
    from bascule.plugins.tasks.sia_dir_grades import differences, read
    from bascule.plugins.tasks.sia_dir_submission import NotASubmission, unpack

    public = files_of(Path(params["path"]) / "data" / "public")
    shape = shape_of(public)
    ours, why_ours = await _graded({**params, "grader": "ours"}, answer, sandbox)
    theirs, why_theirs = None, f"The directory has no {EVALUATOR}."
    if EVALUATOR in public:
        theirs, why_theirs = await _graded({**params, "grader": "theirs"}, answer, sandbox)
    try:
        counted = read(shape, unpack(answer)).counted if shape.form else None
    except NotASubmission as e:
        return Grades(ours=ours, theirs=theirs, why_ours=why_ours or str(e), why_theirs=why_theirs)
    same = ours is not None and theirs is not None and abs(ours - theirs) < 1e-9
    said = [] if counted is None else differences(shape, counted, evaluator=EVALUATOR in public, equal=same)
    return Grades(
        ours=ours,
        theirs=theirs,
        why_ours=why_ours,
        why_theirs=why_theirs,
        counted=counted,
        differences=tuple(said),
    )


class HandedIn:
    """Finds, among the events of a run, the submissions on the sealed split."""

    def __init__(self) -> None:
        self._sealed: set[str] = set()
        self._last: str | None = None
        self._failed = ""

    def add(self, event: Recorded) -> None:
        data = event.data
        if isinstance(data, EpisodesRequested) and data.split == "sealed" and data.engine is None:
            self._sealed.add(data.evaluation)
        elif isinstance(data, TrajectoryLogged) and data.evaluation in self._sealed:
            self._last = data.answer or self._last
            if data.error is not None:
                self._failed = data.error.message.strip().splitlines()[-1][:_SAID]

    async def notes(self, config: RunConfig) -> tuple[str, ...]:
        """What the report says about the directory's own evaluator; nothing for other tasks.

        The last submission on the sealed split is graded both ways.
        """
        if config.task.name != TASK:
            return ()
        if self._last is None:
            return (f"No episode on the sealed split handed in a submission. {self._failed}".rstrip(),)
        try:
            grades = await compare(config.task.params, self._last, config.sandbox)
        except BasculeError as e:
            return (f"The last sealed submission could not be graded again. {e.message}",)
        return tuple(lines(grades, "the last sealed submission"))


def lines(grades: Grades, what: str) -> list[str]:
    """Grades as sentences."""

    def figure(value: float | None, why: str) -> str:
        return f"none ({why.rstrip('.')})" if value is None else f"{value:.4f}" + (f" ({why})" if why else "")

    ours, theirs = figure(grades.ours, grades.why_ours), figure(grades.theirs, grades.why_theirs)
    said = [f"{what}: {ours} by our grader, {theirs} by the directory's own evaluator"]
    if grades.recorded is not None:
        said.append(f"recorded beside it: {grades.recorded:.4f}")
    if grades.counted is not None:
        c = grades.counted
        said.append(
            f"read from {c.file or 'no file'}: {c.asked} asked, {c.answered} answered, {c.missing} missing, "
            f"{c.ill_formed} ill-formed, {c.repeated} rows repeated, {c.foreign} for nothing that is asked"
        )
    return [*said, *grades.differences]


@app.command("grade-sia")
def grade_sia(
    task_dir: Annotated[Path, typer.Argument(help="The SIA task directory.")],
    gen_dir: Annotated[Path, typer.Argument(help="A generation of a SIA run on it: runs/run_1/gen_1.")],
    unsafe: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Run the directory's evaluator unconfined.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Grade what a SIA agent handed in: over everything that is asked, and by the directory's evaluator in the sandbox.

    Nothing in either folder is changed.
    """
    from bascule.plugins.tasks.sia_dir import named
    from bascule.plugins.tasks.sia_dir_grades import NoFigure, figure_of
    from bascule.plugins.tasks.sia_dir_submission import MAX_FILES, NotASubmission, collect, pack
    from bascule.schemas.errors import ConfigError
    from bascule.schemas.sandbox import SandboxConfig

    chosen = named(directory_named(task_dir))
    assert chosen is not None
    if not gen_dir.is_dir():
        raise ConfigError(f"There is no folder {gen_dir}.", next_step="Name a generation such as runs/run_1/gen_1.")
    try:
        answer = pack(collect(str(gen_dir)), compress=False, limit=2 * MAX_FILES)
    except NotASubmission as e:
        grades = Grades(ours=0.0, theirs=None, why_ours=str(e), why_theirs="not run")
    else:
        grades = run_async(compare(chosen["params"], answer, SandboxConfig(unsafe=unsafe)))
    try:
        if beside := collect(str(gen_dir), ["results.json"]):
            recorded = figure_of(beside["results.json"].encode())
            grades = msgspec.structs.replace(grades, recorded=recorded)
    except (NotASubmission, NoFigure):
        pass  # another form than SIA's bundled evaluators write: there is no recorded figure to show
    if as_json:
        print_json({"task": str(task_dir), "generation": str(gen_dir), **msgspec.to_builtins(grades)})
        return
    for line in lines(grades, str(gen_dir)):
        typer.echo(line)


@app.command("import-sia")
def import_sia(
    folder: Annotated[Path, typer.Argument(help="Where SIA was run, or what holds its profiles/ and providers/.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what of SIA's profiles and providers Bascule has: options of `bascule run`, and what has no counterpart.

    Keys are never copied: only the name of the variable that holds one is printed.
    """
    from bascule.plugins.tasks.sia_dir_profiles import imported

    found = imported(folder.expanduser())
    if as_json:
        print_json([{**msgspec.to_builtins(one), "options": options(one.config)} for one in found])
        return
    for one in found:
        typer.echo(f"{one.profile} ({one.role}, {one.file})")
        typer.echo(f"  options of bascule run: {' '.join(options(one.config)) or 'none'}")
        if one.key_variable is not None:
            typer.echo(f"  key: in the variable {one.key_variable}; agents in the sandbox get none")
        for what in one.without:
            typer.echo(f"  no counterpart: {what}")


def options(config: dict[str, Any]) -> list[str]:
    """The options of ``bascule run`` that set a configuration, each as one word of a command line."""
    import shlex

    said = []
    if "model" in config:
        said += ["--model", shlex.quote(config["model"])]
    for name, value in config.get("task", {}).get("params", {}).items():
        text = msgspec.json.encode(value).decode()
        said += ["--set", shlex.quote(f"task.{name}={text}")]
    return said


@app.command("unpack-sia")
def unpack_sia(
    into: Annotated[Path, typer.Argument(help="The folder to make; the four directories lie in it.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the four task directories of sia-agent 0.6.0 from its pinned wheel; nothing of it is installed or run."""
    from bascule.plugins.tasks.sia_data import WHEEL
    from bascule.plugins.tasks.sia_dir_files import is_directory_of_sia
    from bascule.plugins.wheels import extract, fetch_wheel
    from bascule.schemas.errors import ConfigError

    into = into.expanduser()
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(f"{into} is there and not empty.", next_step="Name a folder that is not there yet.")
    extract(fetch_wheel(*WHEEL), "sia/tasks", into)
    found = sorted(str(path) for path in into.iterdir() if is_directory_of_sia(path))
    if as_json:
        print_json(found)
        return
    for path in found:
        typer.echo(f"{path}: bascule run --task-dir {path}")
