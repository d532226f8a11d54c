"""The application: all commands, exit codes, interrupts, and errors as one line."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from pipeline.cli import doctor, dumps, evaluation, generation, planning, rounds, train
from pipeline.cli.options import Debug, LogJson, Quiet, Verbose, set_logs, with_logs
from pipeline.cli.version import version_text
from pipeline.runtime import log
from pipeline.runtime.child_processes import SAFE_PATH
from pipeline.runtime.dtypes import cpu_build
from pipeline.runtime.termination import Terminated, terminable

_OURS = ("pipeline", "schemas", "stage1_teacher", "stage2_student")
INTERRUPTED, TERMINATED = 130, 143  # a shell's exit codes for SIGINT and SIGTERM
_WAY_OUT = {  # for errors whose message is the system's own
    errno.EACCES: "Give this user access to it (ls -ld shows the owner), or give another path.",
    errno.EPERM: "Give this user access to it (ls -ld shows the owner), or give another path.",
    errno.EROFS: "Its file system is mounted read-only: give a path on another one.",
    errno.ENOTDIR: "Part of this path is a file where a folder is needed: give another path, or move that file.",
    errno.EEXIST: "A file exists where a folder is needed: give another path, or move that file.",
    errno.EISDIR: "This is a folder where a file is needed: give the name of a file.",
    errno.ELOOP: "A symbolic link in this path leads back to itself: remove that link, or give another path.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.ENOENT: "Check the path; a relative one starts at the current folder.",
    errno.ENOSPC: "Free some space, or give a path on another disk; then run the same command again.",
    errno.EDQUOT: "Free some space, or give a path on another disk; then run the same command again.",
    errno.EFBIG: "The file would exceed the size limit (ulimit -f): raise the limit, or give a path on another disk.",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n).",
}

app = typer.Typer(
    help="Offline distillation between language models with different tokenizers, through bytes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "teacher": train.teacher,
    "generate": generation.generate,
    "start": train.initial_student,
    "student": train.student,
    "round": rounds.rounds,
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


def _print_version(requested: bool) -> None:
    if requested:
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
    """Options before the command have the same effect as after it."""
    set_logs(quiet, verbose, log_json, debug)


def _bound_kernel_caches() -> None:
    """Limit the kernel caches of torch and oneDNN, before torch is loaded.

    Each keeps what it compiled for 1,024 shapes, and documents have any length. On a CPU that takes gigabytes, of which
    one step uses little: a step has some thirty shapes.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _name_the_accelerator() -> None:
    """Tell DeepSpeed, which transformers loads too, that a CPU build has no GPU.

    Else it would look for one and warn that it found none.
    """
    if cpu_build():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> None:
    """Run a command. A user's error is one line and exit code 1; an interrupt says how to resume, code 130 or 143."""
    if "--debug" in sys.argv[1:]:
        log.show_tracebacks()
    os.environ[SAFE_PATH] = "1"  # for engines, launchers and all other children from here on
    _bound_kernel_caches()
    _name_the_accelerator()
    try:
        # Not standalone: we say how to resume. typer returns code 130 after an interrupt.
        log.check_environment()
        with terminable():
            code = app(standalone_mode=False) or 0
    except BrokenPipeError:  # `bld inspect ... | head`: the reader closed the pipe
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python reports the error again when it flushes
        raise SystemExit(141) from None
    except Terminated:
        code = TERMINATED
    except (ValueError, OSError, FloatingPointError) as error:
        if log.shows_tracebacks():
            raise
        log.error(format_error(error))
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if log.shows_tracebacks() or package in _OURS:
            raise
        log.error(
            f"the Python package {package} is not installed in {sys.prefix}: run `make setup` in a checkout, or "
            f"`{sys.executable} -m pip install byte-level-distillation`; --debug shows what needs it"
        )
        raise SystemExit(1) from None
    except Exception as error:
        _exit_for_usage_error(error)
        raise
    if code in (INTERRUPTED, TERMINATED):
        log.warning("interrupted; what is written stays. Run the same command again to resume.")
    raise SystemExit(code)


def format_error(error: Exception) -> str:
    """Return the message of an error, with a way out where it is the system's own message."""
    way_out = _WAY_OUT.get(getattr(error, "errno", None) or 0)
    return f"{error}. {way_out}" if way_out else str(error)


def _exit_for_usage_error(error: Exception) -> None:
    """Exit as typer would for its own errors, such as an unknown option. Return for any other error."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        raise SystemExit(code)
