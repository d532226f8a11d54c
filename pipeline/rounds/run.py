"""Rounds run one after another, each command in a process of its own, so that only one model is in memory.

    begun.json             the steps that the student's run had done before the first round
    round-01/recipe.yaml   the round's recipe, with which each of its commands can be run by hand
    round-01/text/, dump/  as `bld generate` and `bld teacher` write them
    round-01/export/       the student after the round, which writes in the next
    round-01/score.json    its held-out figures, as `bld eval` writes them
    round-01/mended.json   what was changed of the recipe since the round began, if anything
    round-01/round.json    written last: the round is done
    round-00/              the student before the first round; with a cold start, a round on the teacher's text
    export/, rounds.json   the best student, and which round it is from

The run in `student.path` is trained on by every round. Every command resumes by itself, so a killed round runs its
commands again, and done rounds are skipped.
"""

import fcntl
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Recipe, student_config
from pipeline.config.loading import load_recipe, save_recipe
from pipeline.config.text.rounds import RoundsConfig
from pipeline.rounds.mending import (
    REMEDY,
    changed_keys,
    describe,
    is_text_made,
    mended,
    recorded,
    require_comparable,
    require_text,
    with_changes,
)
from pipeline.rounds.recipes import FIRST, folder_of, round_recipe, rounds_config, trained_numbers
from pipeline.runtime import log
from schemas import dump_files
from schemas.manifest import Manifest, read_json, write_json
from schemas.storage.atomic import committed, committed_folder

RunCommand = Callable[[Sequence[str]], None]  # a command of `bld` with its arguments; raises if it fails

_BEGUN, _DONE, _SCORE, _BEST = "begun.json", "round.json", "score.json", "rounds.json"


class Score(NamedTuple):
    """Held-out bits per byte of the student after a round, by the name of the text."""

    round: int
    by_text: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Return the mean over the texts, by which rounds are compared."""
        return sum(self.by_text.values()) / len(self.by_text)

    def __str__(self) -> str:
        texts = ", ".join(f"{name} {bits:.4f}" for name, bits in self.by_text.items())
        return f"{self.mean:.4f} bits per byte held out ({texts})"


def run_rounds(recipe: Recipe, run: RunCommand) -> list[Score]:
    """Run all rounds that are not done, and export the best; returns the scores in order.

    Stops after a round that is worse than the best so far by more than `rounds.max_regression`.

    Raises:
        ValueError: the student has not been trained and there is no cold start, or the recipe was changed in what
            rounds are compared by, or in what a half-made part was begun with; the fields are named.
    """
    rounds = rounds_config(recipe)
    path = Path(rounds.path)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        _begin(recipe, path)
        scores: list[Score] = []
        for number in range(FIRST, rounds.count + 1):
            scores.append(_run_round(recipe, number, run))
            log.info(f"{path}: round {number}: {scores[-1]}")
            best = min(scores, key=lambda score: score.mean)
            if scores[-1].mean > best.mean + rounds.max_regression:
                log.warning(
                    f"{path}: stopped, because round {number} is worse than round {best.round} ({best.mean:.4f} bits "
                    f"per byte) by more than rounds.max_regression ({rounds.max_regression:g})"
                )
                break
        _export_best(rounds, scores)
    return scores


def state_lines(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield label and text about each round: what is done, and what would be."""
    rounds = rounds_config(recipe)
    _steps_before(recipe)
    for number in trained_numbers(rounds):
        folder = folder_of(rounds, number)
        writer = "teacher" if number == FIRST else "student"
        if (folder / _DONE).exists():
            yield f"round {number}", f"{folder}, done: {_score_of(folder / _SCORE, number)}"
        else:
            begun = "begun" if (folder / dump_files.RECIPE).exists() else "new"
            what = f"text by the {writer}, the teacher's dump of it, {rounds.steps} steps on it"
            replay = f", {rounds.replay:.0%} of each from the recipe's own dumps" if rounds.replay else ""
            yield f"round {number}", f"{folder}, {begun}: {what}{replay}"


def _steps_before(recipe: Recipe) -> int:
    """Return the steps of the student's run before the first round.

    Raises ValueError if it has not been trained, and there is no cold start.
    """
    rounds, run = rounds_config(recipe), Path(student_config(recipe).path)
    begun = Path(rounds.path) / _BEGUN
    if begun.exists():
        return int(read_json(begun, "steps", remedy=REMEDY)["steps"])
    summary = run / dump_files.SUMMARY
    if summary.exists() and (run / "export").exists():
        return int(read_json(summary, "step", remedy=REMEDY)["step"])
    if not rounds.cold_start or (run / "checkpoints").exists():
        raise ValueError(
            f"the student has not been trained: {run} holds no finished run. Run `bld student` first, or set "
            "rounds.cold_start: true and a new student.path, to begin with text by the teacher"
        )
    return 0


def _begin(recipe: Recipe, path: Path) -> None:
    if not (path / _BEGUN).exists():
        write_json(path / _BEGUN, {"steps": _steps_before(recipe)})


def _run_round(recipe: Recipe, number: int, run: RunCommand) -> Score:
    """Run what is not done of a round."""
    rounds = rounds_config(recipe)
    folder = folder_of(rounds, number)
    if (folder / _DONE).exists():
        _check_done(recipe, number)
    else:
        stored = _stored_recipe(recipe, number)
        if number in trained_numbers(rounds):
            log.info(f"{folder}: text by the {'teacher' if number == FIRST else 'student'}, its dump, training on it")
            # The writer is the student of the round before: student.path/export changes with this round.
            writer = () if number == FIRST else ("-o", f"student.path={folder_of(rounds, number - 1)}")
            if not is_text_made(folder):
                run(["generate", str(stored), *writer])
                require_text(folder)
            run(["teacher", str(stored)])
            run(["student", str(stored)])
        student = Path(student_config(recipe).path)
        _copy(student / "export", folder / "export")
        run(["eval", str(folder / "export"), "--recipe", str(stored), "--json", str(folder / _SCORE)])
        write_json(folder / _DONE, _record(recipe, number))
    return _score_of(folder / _SCORE, number)


def _score_of(file: Path, number: int) -> Score:
    """Read the figures of one model. Raises ValueError, naming the file, if one is not finite."""
    [texts] = read_json(file, remedy=REMEDY).values()
    by_text = {name: float(figures["bits_per_byte"]) for name, figures in texts.items() if name != "out_of_domain"}
    if wrong := {name: bits for name, bits in by_text.items() if not math.isfinite(bits)}:
        raise ValueError(f"{file}: {wrong} bits per byte; this round's student is broken: lower train.lr")
    return Score(number, by_text)


def _check_done(recipe: Recipe, number: int) -> None:
    """Raise ValueError if the recipe was changed since a round was done in a way that no later round can follow."""
    rounds = rounds_config(recipe)
    folder = folder_of(rounds, number)
    if number == FIRST and ("writer" in read_json(folder / _DONE, remedy=REMEDY)) != rounds.cold_start:
        raise ValueError(
            f"{folder} was made with rounds.cold_start: {str(not rounds.cold_start).lower()}. Restore this value, or "
            "give a new rounds.path and student.path"
        )
    stored = load_recipe(folder / dump_files.RECIPE)
    require_comparable(folder, changed_keys(stored, round_recipe(recipe, number, _steps_until(recipe, number))))


def _stored_recipe(recipe: Recipe, number: int) -> Path:
    """Return the file of the recipe of a round that is not done.

    It is written when the round begins, and again if the recipe was changed since; what is made keeps its sections.
    """
    folder = folder_of(rounds_config(recipe), number)
    path, ours = folder / dump_files.RECIPE, round_recipe(recipe, number, _steps_until(recipe, number))
    if path.exists():
        there = load_recipe(path)
        ours = mended(folder, there, ours, number)
        if ours is there:
            return path
    elif number > FIRST:
        ours = _after_done(recipe, number, ours)
    folder.mkdir(parents=True, exist_ok=True)
    with committed(path) as partial:
        save_recipe(ours, partial)
    return path


def _after_done(recipe: Recipe, number: int, ours: Recipe) -> Recipe:
    """Return the recipe of a new round, which takes up what was changed since the round before, with a warning."""
    before = folder_of(rounds_config(recipe), number - 1)
    now = round_recipe(recipe, number - 1, _steps_until(recipe, number - 1))
    changed = changed_keys(load_recipe(before / dump_files.RECIPE), now)
    if changed:
        log.warning(f"{before} stays as made, with another recipe ({describe(changed)}), which is followed from here")
    return with_changes(ours, changed)


def _steps_until(recipe: Recipe, number: int) -> int:
    """Return the steps of the student's run before a round."""
    rounds = rounds_config(recipe)
    if number <= trained_numbers(rounds)[0]:
        return _steps_before(recipe)
    return load_recipe(folder_of(rounds, number - 1) / dump_files.RECIPE).train.steps


def _record(recipe: Recipe, number: int) -> dict[str, Any]:
    """Return who wrote, who scored and who learned in a round."""
    rounds, run = rounds_config(recipe), Path(student_config(recipe).path)
    folder = folder_of(rounds, number)
    identity = (run / dump_files.RUN_IDENTITY).read_bytes()
    learned = {"steps": read_json(run / dump_files.SUMMARY, "step", remedy=REMEDY)["step"]}
    learned |= {"student_identity_sha256": hashlib.sha256(identity).hexdigest()}
    learned |= {"mended": entries} if (entries := recorded(folder)) else {}
    if number not in trained_numbers(rounds):
        return {"round": number, **learned}
    writer = "teacher" if number == FIRST else str(folder_of(rounds, number - 1) / "export")
    teacher = Manifest.load(folder / "dump").identity.get("teacher", {})
    return {"round": number, "writer": writer, "teacher": teacher, **learned}


def _copy(model: Path, to: Path) -> None:
    with committed_folder(to) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True)


def _export_best(rounds: RoundsConfig, scores: Sequence[Score]) -> None:
    """Copy the student of the best round to `export`, unless it was better before the first one."""
    path, best = Path(rounds.path), min(scores, key=lambda score: score.mean)
    is_trained = best.round in trained_numbers(rounds)
    values = {"best": best.round, "bits_per_byte": {str(score.round): score.mean for score in scores}}
    is_done = (path / _BEST).exists() and read_json(path / _BEST, remedy=REMEDY) == values
    if is_done and is_trained == (path / "export").exists():
        return
    if is_trained:
        _copy(folder_of(rounds, best.round) / "export", path / "export")
        log.info(f"{path / 'export'}: the student after round {best.round}, {best}")
    else:
        shutil.rmtree(path / "export", ignore_errors=True)
        log.warning(f"{path}: no round made the student better than it was: nothing is exported")
    write_json(path / _BEST, values)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock the rounds until the context ends. Raises ValueError if another process runs them."""
    with (path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process runs the rounds in {path}; wait for it, or give another rounds.path"
            ) from None
        yield
