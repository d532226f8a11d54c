"""`bld merge`, `bld push`, `bld pull`: dumps joined, and carried to a hub and back."""

from pathlib import Path
from typing import Annotated

import typer


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
    from pipeline.dumps.hub import push as push_dump

    typer.echo(push_dump(dump, repo, public=public, revision=revision))


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Data set on a hub, OWNER/NAME.")],
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="Folder to put the dump in.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit (default: the main branch).")] = None,
) -> None:
    """Download a dump from a hub, or resume, and check it against its checksums."""
    from pipeline.dumps.hub import pull as pull_dump

    typer.echo(pull_dump(repo, dump, revision=revision))
