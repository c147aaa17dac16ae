"""Commands about a run's blobs. Each imports what it needs when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bascule.runtime.cli.command import Json, Run, app, make_console, on_store, print_json

if TYPE_CHECKING:
    from bascule.runtime.cli.store import Store

blobs_app = typer.Typer(help="List a run's blobs, erase one, or delete what is no longer needed.", no_args_is_help=True)
app.add_typer(blobs_app, name="blobs")


@blobs_app.command("list")
@on_store
async def list_blobs(store: Store, run: Run, as_json: Json = False) -> None:
    """The blobs that a run's events name, and whether they are there."""
    from bascule.runtime.blob_care import standings

    found, unnamed = await standings(store.read(run), store.blobs(run))
    if as_json:
        print_json({"run": run, "blobs": found, "unnamed": unnamed})
        return
    console = make_console()
    for s in found:
        console.print(
            f"{s.sha256}  {s.state:<9} {s.size:>11}  {s.media:<27} {s.subject}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"{run}: {len(found)} blobs, and {unnamed} that no event names", highlight=False)


@blobs_app.command()
@on_store
async def erase(
    store: Store,
    run: Run,
    sha256: Annotated[str, typer.Argument(help="The blob's hash, as `bascule blobs list RUN` shows it.")],
    reason: Annotated[str, typer.Option(help="Recorded in the run's log for good.")],
    as_json: Json = False,
) -> None:
    """Delete a blob for good, and record that. The events that name it stay as they are."""
    from bascule.runtime.blob_care import mention_of, references
    from bascule.runtime.cli.launch import view_of
    from bascule.schemas import subjects
    from bascule.schemas.envelope import Draft
    from bascule.schemas.events import BlobErased

    mention = mention_of(await references(store.read(run)), run, sha256)
    draft = Draft(
        subject=subjects.blob_erased(run, sha256),
        step=0,
        data=BlobErased(sha256=sha256, reason=reason),
        cause=mention.event,
    )
    # Recorded first: if this is cut short, it is carried out by doing it again, or by the next collection.
    (recorded,) = await view_of(store, run).append("cli", [draft])
    await store.blobs(run).erase(sha256)
    if as_json:
        print_json({"run": run, "sha256": sha256, "seq": recorded.seq, "named_by": mention.subject})
    else:
        make_console().print(f"{run}: {sha256} is erased (event {recorded.seq})", highlight=False, soft_wrap=True)


@blobs_app.command()
@on_store
async def gc(
    store: Store,
    run: Annotated[str | None, typer.Argument(help="The run's name; all runs by default.")] = None,
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds for which a blob may wait for its event; fewer only while nothing works on it.", min=0
        ),
    ] = 86400.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted.")] = False,
    as_json: Json = False,
) -> None:
    """Delete blobs that no event needs: of steps that were cut short, and checkpoints of finished training jobs."""
    from bascule.runtime.blob_care import collect

    # Before the runs: blobs that are there already belong to a run that the log knows, if it knows it at all.
    holders = [] if run is not None else await store.blob_runs()
    runs = [run] if run is not None else [r async for r in store.runs()]
    done = [
        await collect(r, store.blobs(r), lambda r=r: store.read(r), grace=grace, dry_run=dry_run)  # type: ignore[misc]
        for r in runs
    ]
    strangers = sorted(set(holders) - set(runs))
    if as_json:
        print_json({"runs": done, "unknown": strangers, "dry_run": dry_run})
        return
    console = make_console()
    would = "would be " if dry_run else ""
    for c in done:
        console.print(
            f"{c.run}: {len(c.swept)} blobs ({c.freed} bytes) and {c.tidied} leftovers {would}deleted, "
            f"{len(c.erased)} erasures {would}finished, {c.kept} kept, {c.young} too young to tell",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for name in strangers:
        console.print(f"{name}: the log knows no such run; its blobs are left alone", highlight=False, markup=False)
