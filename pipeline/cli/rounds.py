"""`bld round`: the student writes, the teacher scores what it wrote, the student trains on it; several times over."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

from pipeline.cli.options import DryRun, Overrides, RecipeArgument, load
from pipeline.runtime.child_processes import child_environment, end_children_with_me
from pipeline.runtime.termination import Terminated

_STOPPED: dict[int, type[BaseException]] = {130: KeyboardInterrupt, 143: Terminated}
_BLD = (sys.executable, "-m", "pipeline")


def rounds(recipe: RecipeArgument, override: Overrides = None, dry_run: DryRun = False) -> None:
    """Train the student on its own text, in rounds: it writes on prompts, the teacher dumps that, it trains on.

    Each round is a folder of ordinary artefacts, made by `bld generate`, `bld teacher`, `bld student` and `bld eval`,
    one after another, so that only one model is in memory. Rounds stop when held-out bits per byte become worse
    (rounds.max_regression); the best student is exported. Exit codes: 0 done, 1 an error, which is named, 130 or 143
    stopped by SIGINT or SIGTERM; the same command resumes.
    """
    from pipeline.planning.dry_run import print_lines
    from pipeline.rounds.run import run_rounds, state_lines

    loaded = load(recipe, override)
    if dry_run:
        print_lines(list(state_lines(loaded)))
        return
    end_children_with_me()
    run_rounds(loaded, run_command)


@contextlib.contextmanager
def _signals_later() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM that come meanwhile: one amid the start of a process would leave that behind."""
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda found, _: came.append(found))
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_command(arguments: Sequence[str]) -> None:
    """Run a command of `bld` in a process of its own, and pass a SIGINT or SIGTERM on to it.

    Raises:
        ChildProcessError: it failed; its own message is above.
        KeyboardInterrupt, Terminated: it was stopped.
    """
    # A session of its own: Ctrl-C reaches it once, through this process.
    with _signals_later() as came:
        process = subprocess.Popen([*_BLD, *arguments], env=child_environment(), start_new_session=True)
    try:
        for number in came:
            signal.raise_signal(number)
        code = process.wait()
    except (KeyboardInterrupt, Terminated) as stop:
        process.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
        process.wait()
        raise
    finally:
        if process.poll() is None:  # a second signal came while it was stopping
            process.kill()
    if code in _STOPPED:
        raise _STOPPED[code]
    if code:
        raise ChildProcessError(
            f"`bld {' '.join(arguments)}` failed (exit code {code}) for the reason above; mend that, then run the same "
            "command again to continue"
        )
