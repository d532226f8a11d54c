"""`bld inspect`, `verify`, `merge`, `push`, `pull` and `clean`: commands on dumps."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, DumpArgument
from pipeline.runtime.format import count_of
from schemas import dump_files


def inspect(
    dump: DumpArgument,
    doc: Annotated[
        str | None, typer.Option(metavar="ID", help="Show this document's positions (default: a summary).")
    ] = None,
    nth: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Which one, if several documents have that ID (default: 1).")
    ] = None,
    worst: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show the N documents and the N positions of highest surprise, bits."),
    ] = None,
    find: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help=r"List occurrences of this text, with distributions; \n, \t, \xHH work."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the document of --doc (default: the first) as one self-contained page."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=256, help="Symbols shown per position.")] = 5,
    json: AsJson = False,
) -> None:
    """Show a summary of a dump, a document's positions with their top symbols, or the most surprising positions."""
    from pipeline.dumps import terminal
    from schemas.storage.locations import location

    chosen = [name for name, value in (("--doc", doc), ("--worst", worst), ("--find", find)) if value is not None]
    if len(chosen) > 1 or (html is not None and (json or chosen not in ([], ["--doc"]))):
        options = chosen + ["--html"] * (html is not None) + ["--json"] * json
        raise ValueError(f"{' and '.join(options)} cannot be combined: give one at a time (--html takes --doc)")
    if nth is not None and doc is None and html is None:
        raise ValueError(f"--nth {nth} chooses among documents of one name: give it with --doc ID, or with --html")
    nth = 1 if nth is None else nth
    if html is not None:
        from pipeline.reports.document_page import write_page

        at = location(dump)
        typer.echo(write_page(at, terminal.chosen_document(at, doc, nth), html))
        return
    terminal.show(location(dump), terminal.Selection(doc, nth, worst, find), top, json)


def verify(
    dump: DumpArgument,
    against_teacher: Annotated[
        int, typer.Option(min=0, metavar="N", help="Documents to recompute with the teacher and compare.")
    ] = 0,
) -> None:
    """Check a dump: checksum of every byte, schema, sums, spans, counts.

    Exit codes: 0 no fault found, 1 faults found (one per line), 2 a wrong option.
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
    dumps: Annotated[
        list[Path], typer.Argument(metavar="DUMP...", help="Complete dumps that differ only in their corpus.")
    ],
    accept_engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME-VERSION",
            help="Also join dumps made by this other engine, e.g. vllm-0.33.0; it is recorded. Repeatable "
            "(default: those that one of the dumps accepts).",
        ),
    ] = None,
) -> None:
    """Join dumps of one identity; shards are linked, or copied to another file system."""
    from stage1_teacher.dump.merge import merge_dumps

    summary = merge_dumps(out, dumps, accept_engine or ())
    documents, shards = count_of(summary["documents"], "document"), count_of(len(summary["shards"]), "shard")
    typer.echo(f"{out}: {documents} in {shards}")


def push(
    source: Annotated[
        Path, typer.Argument(metavar="DUMP|RUN", help="Folder of a complete dump, or of a student's run.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Repository on a hub, OWNER/NAME; created if there is none.")
    ],
    public: Annotated[
        bool,
        typer.Option("--public", help="Make a new repository public, a dump's with its text (default: private)."),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to (default: the main branch).")] = None,
) -> None:
    """Upload a dump to a hub as a data set, or a run's export as a model, or resume; an incomplete dump is refused.

    A student goes with its card: base model, teachers and their licences, training, the figures of `bld eval`.
    """
    from pipeline.dumps import hub

    if not (source / dump_files.RUN_IDENTITY).exists():
        typer.echo(hub.push(source, repo, public=public, revision=revision))
        return
    from pipeline.reports.student_card import write_student_card
    from stage2_student.runs.export import exported

    model = exported(source)
    write_student_card(source, model)
    typer.echo(hub.push_model(model, repo, public=public, revision=revision))


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
        list[Path] | None, typer.Argument(metavar="DUMP...", help="Dumps to search for half-written files.")
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Include the cache of downloads and conversions.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove the listed files (default: only list them).")] = False,
) -> None:
    """List half-written files and the cache, with sizes; --yes removes them."""
    from pipeline.dumps import clean

    if not dumps and not cache:
        raise ValueError("nothing to clean: give DUMP..., or --cache")
    clean.clean(dumps or [], cache, yes)
