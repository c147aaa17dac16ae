"""Commands that say what is installed. Each imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from bascule.runtime.cli.command import Debug, Json, app, print_json, run_async, tasks_app


@tasks_app.callback(invoke_without_command=True)
def tasks(context: typer.Context, as_json: Json = False) -> None:
    """List the tasks."""
    if context.invoked_subcommand is not None:
        return
    from bascule.plugins.loader import plugins

    registry = plugins().registry
    rows = {name: registry.tasks.get(name)({}).summary for name in sorted(registry.tasks.items)}
    if as_json:
        print_json(rows)
        return
    for name, summary in rows.items():
        typer.echo(f"{name:<20} {summary}")


@tasks_app.command("show")
def tasks_show(
    name: Annotated[str, typer.Argument(help="The task.")], as_json: Json = False, debug: Debug = False
) -> None:
    """What an author would see of a task: its description, splits, licence, and some train items."""
    from bascule.plugins.loader import plugins

    public = plugins().registry.tasks.get(name)({}).public()
    sizes = {s: len(public.split(s)) for s in ("train", "dev", "sealed")}
    if as_json:
        print_json(
            {
                "name": name,
                "version": public.version,
                "description": public.description,
                "splits": sizes,
                "source": public.source,
                "licence": public.licence,
                "train": [{"input": e.input, "answer": public.answers[e.id]} for e in public.train[:5]],
            }
        )
        return
    typer.echo(f"{name} (version {public.version})\n\n{public.description}\n")
    typer.echo("splits: " + ", ".join(f"{k} {v}" for k, v in sizes.items()))
    typer.echo(f"source: {public.source}\nlicence: {public.licence}\n\ntrain items:")
    for e in public.train[:5]:
        typer.echo(f"  {e.input.get('question', e.input)}  ->  {public.answers[e.id]}")


@tasks_app.command("baseline")
def tasks_baseline(
    name: Annotated[str, typer.Argument(help="The task.")], as_json: Json = False, debug: Debug = False
) -> None:
    """Score a task's constant and simple-rule baselines in the scoring process."""
    from bascule.plugins.loader import plugins
    from bascule.runtime.audit.baselines import score_baselines
    from bascule.runtime.world import World
    from bascule.schemas.run import PluginChoice, RunConfig

    world = World(plugins(), RunConfig(task=PluginChoice(name=name)))
    scores = run_async(score_baselines(world, ("dev", "sealed")))
    if as_json:
        print_json(scores)
        return
    for baseline, by_split in scores.items():
        typer.echo(f"{baseline:<28} " + "  ".join(f"{split} {score:.3f}" for split, score in by_split.items()))


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
