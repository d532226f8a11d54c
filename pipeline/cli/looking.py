"""`bld inspect` and `bld verify`: what a dump holds, and whether it is sound."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import AsJson, DumpArgument


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
    from pipeline.dumps import terminal as looking
    from schemas.storage.locations import location

    given = [name for name, value in (("--doc", doc), ("--worst", worst), ("--find", find)) if value is not None]
    if len(given) > 1 or (html is not None and (json or given not in ([], ["--doc"]))):
        asked = given + ["--html"] * (html is not None) + ["--json"] * json
        raise ValueError(f"{' and '.join(asked)} do not go together: give one at a time (--html takes --doc)")
    if html is not None:
        from pipeline.reports.document_page import write_page

        at = location(dump)
        typer.echo(write_page(at, looking.chosen_document(at, doc, nth), html))
        return
    looking.show(location(dump), doc, top, json, worst, find, nth)


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
