"""The command that forks a run, and those for what services gave up on. Each imports what it needs when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bascule.runtime.cli.command import (
    Credentials,
    Debug,
    Home,
    Json,
    Run,
    Url,
    app,
    dlq_app,
    live_progress,
    make_console,
    on_store,
    print_json,
    run_async,
)

if TYPE_CHECKING:
    from bascule.runtime.audit.whatif import Fork
    from bascule.runtime.cli.store import Store


@app.command()
def whatif(
    run: Run,
    step: Annotated[int, typer.Option("--from", min=1, help="The generation whose choice is made again.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="What is otherwise, e.g. --set policy.algorithm=best_of_n. Repeatable."),
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="Name of the fork; <run>-whatif-<n> by default.")
    ] = None,
    execute: Annotated[bool, typer.Option(help="Go on with the effects that the log does not hold.")] = False,
    home: Home = None,
    url: Url = None,
    credentials: Credentials = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What would have been decided otherwise: a new run, forked from an old one, that stops at the first effect which
    the old one's log does not hold. The old run stays as it is."""
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.store import home_folder, open_store

    async def execute_() -> None:
        async with open_store(
            home_folder(home), url=url, credentials=credentials, exclusive=execute and url is None, writes=True
        ) as store:
            name = run_id if run_id is not None else await launch.free_run_id(store, f"{run}-whatif")
            made = await _fork(store, run, name, step, set_ or [])
            if execute and made.stopped_at is not None:
                await launch.resume(store, name)
                with live_progress(as_json) as live:
                    live.skip_to(await store.log.head(f"bascule.{name}.>"))
                    await (launch.work if store.owner else launch.watch)(store, name, [live])
        _show(made, step, executed=execute, as_json=as_json)

    run_async(execute_())


async def _fork(store: Store, run: str, name: str, step: int, overrides: list[str]) -> Fork:
    from bascule.plugins.loader import plugins
    from bascule.runtime.audit.whatif import whatif as fork
    from bascule.runtime.cli import launch
    from bascule.runtime.cli.configuration import check_budget, check_gate, check_policy, layered, override
    from bascule.runtime.exports.importing import append_all, chain_of, note
    from bascule.runtime.services.catalog import SERVICES
    from bascule.runtime.state import RunState
    from bascule.runtime.world import World, plain
    from bascule.schemas.errors import ConfigError, NotFound
    from bascule.schemas.run import parse_config
    from bascule.schemas.subjects import token

    events = await store.events(run)
    if await store.log.head(f"bascule.{token(name)}.>"):
        raise ConfigError(f"There is a run {name!r} already.", next_step="Use another --run-id.")
    changes: dict[str, object] = {}
    for item in overrides:
        changes = layered(changes, override(item))
    if not changes:
        raise ConfigError("A what-if needs something that is otherwise.", next_step="--set KEY=VALUE says what.")
    config = parse_config(layered(plain(RunState.of(run, events).config), changes))
    world = World(plugins(), config)
    for check in (check_budget, check_gate, check_policy):
        check(world)
    made = fork(
        events,
        name,
        step=step,
        config=config,
        changes=changes,
        plugins=plugins(),
        producers={service: launch.producer(service) for service in (*SERVICES, "cli")},
    )
    theirs, ours = store.blobs(run), store.blobs(name)
    for ref in made.blobs:
        try:
            await ours.put(await theirs.get(ref), ref.media)
        except NotFound:
            continue  # a checkpoint that was superseded, or erased: as in the run itself
    log = store.admin()
    await append_all(log, made.events, home=store.home, run=name)
    await note(store.anchor, log, name, await chain_of(log, name))
    return made


def _show(made: Fork, step: int, *, executed: bool, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "run": made.run,
                "events": len(made.events),
                "copied": made.copied,
                "recorded": made.recorded,
                "decided": made.decided,
                "stopped_at": made.stopped_at,
                "executed": executed,
            }
        )
        return
    from bascule.runtime.cli.show import named

    console = make_console()
    console.print(f"{made.run}: {len(made.events)} events, {made.copied} of them repeated.", highlight=False)
    console.print(f"step {step} chose {named(made.recorded.lever, made.recorded.algorithm)}", highlight=False)
    if made.decided is not None:
        d = made.decided
        console.print(
            f"and would have chosen {named(d.lever, d.algorithm)}: {'; '.join(d.reasons)}",
            highlight=False,
            markup=False,
        )
    if made.stopped_at is None:
        console.print("It came to its end with what the log holds.", highlight=False)
    elif not executed:
        console.print(
            f"It stops at {made.stopped_at}, which the log does not hold. `bascule resume {made.run}` would run it.",
            highlight=False,
            markup=False,
        )


@dlq_app.command("list")
@on_store
async def dlq_list(
    store: Store,
    run: Annotated[str | None, typer.Argument(help="Only of this run.")] = None,
    as_json: Json = False,
) -> None:
    """Events that a service gave up on, and what went wrong."""
    from bascule.schemas.errors import NotFound
    from bascule.schemas.subjects import token

    if run is not None and not await store.log.head(f"bascule.{token(run)}.>"):
        raise NotFound(f"There is no run {run!r}.", next_step="`bascule status` lists the runs.")
    letters = await store.log.letters.list(run or "*")
    if as_json:
        print_json(letters)
        return
    console = make_console()
    for letter in letters:
        state = "dead" if letter.dead else "asked to try again"
        console.print(
            f"{letter.seq:>7}  {letter.service:<9} {state:<18} {letter.subject}\n         {letter.error}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"{sum(letter.dead for letter in letters)} dead letters", highlight=False)


@dlq_app.command("retry")
@on_store
async def dlq_retry(
    store: Store,
    run: Run,
    seq: Annotated[int | None, typer.Option(help="Only the event at this sequence; all of the run otherwise.")] = None,
    as_json: Json = False,
) -> None:
    """Ask the services to try dead letters again: at once where they run, otherwise when the run is resumed."""
    from bascule.schemas.errors import NotFound

    letters = [found for found in await store.log.letters.list(run) if found.dead and seq in (None, found.seq)]
    if not letters:
        raise NotFound(
            f"The run {run!r} has no dead letter{'' if seq is None else f' at sequence {seq}'}.",
            next_step="`bascule dlq list` shows those there are.",
        )
    for letter in letters:
        await store.writers.get("cli", store.log).letters.retry(letter)
    if as_json:
        print_json({"run": run, "retried": len(letters)})
    else:
        typer.echo(f"{run}: {len(letters)} will be tried again")
