"""The commands put together, and how they end: exit codes, interrupts, errors as one line."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from pipeline.cli import doctor, dumps, evaluation, planning, train
from pipeline.cli.options import Debug, LogJson, Quiet, Verbose, set_logs, with_logs
from pipeline.cli.version import version_text
from pipeline.runtime import log
from pipeline.runtime.child_processes import SAFE_PATH
from pipeline.runtime.dtypes import cpu_build
from pipeline.runtime.termination import Terminated, terminable

INTERRUPTED, TERMINATED = 130, 143  # a shell's exit codes for SIGINT and SIGTERM
_WAY_OUT = {  # of errors that the system words, and nobody on the way has
    errno.EACCES: "Give this user the right to it (ls -ld shows whose it is), or give another path.",
    errno.EPERM: "Give this user the right to it (ls -ld shows whose it is), or give another path.",
    errno.EROFS: "It lies on a file system that is mounted read-only: give a path on another.",
    errno.ENOTDIR: "A part of this path is a file where a folder is needed: give another path, or move that file away.",
    errno.EEXIST: "A file is where a folder is needed: give another path, or move that file away.",
    errno.EISDIR: "This is a folder where a file is needed: give the name of a file.",
    errno.ELOOP: "A symbolic link of this path leads back to itself: remove that link, or give another path.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.ENOENT: "Check the path: it is looked for from the folder that the command runs in.",
    errno.ENOSPC: "Make room, or give a path on another disk; then run the same command again.",
    errno.EDQUOT: "Make room, or give a path on another disk; then run the same command again.",
    errno.EFBIG: "Files may not grow that large here (ulimit -f): raise the limit, or give a path on another disk.",
    errno.EMFILE: "Too few files may be open at once: raise the limit (ulimit -n).",
}

app = typer.Typer(
    help="Offline distillation between language models with different tokenizers, through bytes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "teacher": train.teacher,
    "student": train.student,
    "export": train.export,
    "inspect": dumps.inspect,
    "verify": dumps.verify,
    "eval": evaluation.evaluate,
    "report": evaluation.report,
    "plan": planning.show_plan,
    "merge": dumps.merge,
    "push": dumps.push,
    "pull": dumps.pull,
    "clean": dumps.clean,
    "doctor": doctor.doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(with_logs(_name, _command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_text())
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print version and git revision.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_json: LogJson = False,
    debug: Debug = False,
) -> None:
    """Options before the command are the same as after it."""
    set_logs(quiet, verbose, log_json, debug)


def _bound_kernel_caches() -> None:
    """Before torch is loaded: it and oneDNN keep what they compile for each shape, 1,024 of each, and documents are of
    any length.

    That is gigabytes on a CPU, and is in use for one step; a step itself has some thirty shapes.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _name_the_accelerator() -> None:
    """To DeepSpeed, which transformers loads too: with the CPU build it would look for a GPU, and warn that it found
    none.
    """
    if cpu_build():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> None:
    """Run a command. What a user can cause is one line and exit code 1; an interrupt says how to go on, code 130 or
    143.
    """
    if "--debug" in sys.argv[1:]:
        log.show_tracebacks()
    os.environ[SAFE_PATH] = "1"  # of engines, launchers and whatever else is started from here on
    _bound_kernel_caches()
    _name_the_accelerator()
    try:
        # Not standalone: we say ourselves how to resume. typer gives an interrupt back as code 130.
        log.check_environment()
        with terminable():
            code = app(standalone_mode=False) or 0
    except BrokenPipeError:  # `bld inspect ... | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes
        raise SystemExit(141) from None
    except Terminated:
        code = TERMINATED
    except (ValueError, OSError, FloatingPointError) as error:
        if log.shows_tracebacks():
            raise
        log.error(_told(error))
        raise SystemExit(1) from None
    except Exception as error:
        _exit_for_usage_error(error)
        raise
    if code in (INTERRUPTED, TERMINATED):
        log.warning("interrupted; what is written stays. Run the same command again to resume.")
    raise SystemExit(code)


def _told(error: Exception) -> str:
    """What is wrong, with a way out where the words are the system's own."""
    way_out = _WAY_OUT.get(getattr(error, "errno", None) or 0)
    return f"{error}. {way_out}" if way_out else str(error)


def _exit_for_usage_error(error: Exception) -> None:
    """Exit as typer would for its own errors, such as an unknown option. Returns for any other error."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        raise SystemExit(code)
