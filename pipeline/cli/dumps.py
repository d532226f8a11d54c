"""`bld inspect`, `verify`, `merge`, `push`, `pull` and `clean`: a dump looked into, checked, joined, carried and
tidied.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, DumpArgument


def inspect(
    dump: DumpArgument,
    doc: Annotated[
        str | None, typer.Option(metavar="ID", help="Show this document's positions (default: a summary).")
    ] = None,
    nth: Annotated[int, typer.Option(min=1, metavar="N", help="Which one, where several documents have that ID.")] = 1,
    worst: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show the N documents and the N positions of highest surprise, bits."),
    ] = None,
    find: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help=r"Show where this text stands, with its distributions; \n, \t, \xHH work."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the document of --doc (default: the first) as one self-contained page."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=256, help="Symbols shown per position.")] = 5,
    json: AsJson = False,
) -> None:
    """Look into a dump: a summary, a document's positions with their top symbols, or what surprised the teacher."""
    from pipeline.dumps import terminal
    from schemas.storage.locations import location

    given = [name for name, value in (("--doc", doc), ("--worst", worst), ("--find", find)) if value is not None]
    if len(given) > 1 or (html is not None and (json or given not in ([], ["--doc"]))):
        asked = given + ["--html"] * (html is not None) + ["--json"] * json
        raise ValueError(f"{' and '.join(asked)} do not go together: give one at a time (--html takes --doc)")
    if html is not None:
        from pipeline.reports.document_page import write_page

        at = location(dump)
        typer.echo(write_page(at, terminal.chosen_document(at, doc, nth), html))
        return
    terminal.show(location(dump), terminal.Look(doc, nth, worst, find), top, json)


def verify(
    dump: DumpArgument,
    against_teacher: Annotated[
        int, typer.Option(min=0, metavar="N", help="Documents to recompute with the teacher and compare.")
    ] = 0,
) -> None:
    """Check a dump: every byte's checksum, schema, sums, spans, counts.

    Exit codes: 0 no fault found, 1 something is wrong (each fault on a line of its own), 2 a wrong option.
    """
    from schemas.storage.locations import location
    from stage1_teacher.verification.verify import verify_dump

    faults = verify_dump(location(dump), against_teacher)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{dump}: no faults")


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new dump.")],
    dumps: Annotated[list[Path], typer.Argument(metavar="DUMP...", help="Complete dumps that differ in corpus only.")],
    accept_engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME-VERSION",
            help="Join dumps that another engine made too, as vllm-0.33.0; it is recorded. Once for each (default: those that "
            "one of the dumps accepts).",
        ),
    ] = None,
) -> None:
    """Join dumps of one identity; shards are linked, or copied to another file system."""
    from stage1_teacher.dump.merge import merge_dumps

    summary = merge_dumps(out, dumps, accept_engine or ())
    typer.echo(f"{out}: {summary['documents']} documents in {len(summary['shards'])} shards")


def push(
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="Folder of a complete dump.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Data set on a hub, OWNER/NAME; made where there is none.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new data set public: the text goes with it (default: private).")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to (default: the main one).")] = None,
) -> None:
    """Upload a dump to a hub as a data set, or resume; a dump that is not complete is refused."""
    from pipeline.dumps import hub

    typer.echo(hub.push(dump, repo, public=public, revision=revision))


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Data set on a hub, OWNER/NAME.")],
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="Folder to put the dump in.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit (default: the main branch).")] = None,
) -> None:
    """Download a dump from a hub, or resume, and check it against its checksums."""
    from pipeline.dumps import hub

    typer.echo(hub.pull(repo, dump, revision=revision))


def clean(
    dumps: Annotated[
        list[Path] | None, typer.Argument(metavar="DUMP...", help="Dumps to look for half-written files in.")
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Also the cache of downloads and conversions.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed (default: only list it).")] = False,
) -> None:
    """List half-written files and the cache, with sizes; --yes removes them."""
    from pipeline.dumps import clean

    if not dumps and not cache:
        raise ValueError("nothing to look at: give DUMP..., or --cache")
    clean.clean(dumps or [], cache, yes)
