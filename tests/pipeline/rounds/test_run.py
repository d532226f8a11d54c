"""Rounds: what runs in which order with which recipe, what a kill leaves, and when they stop.

The commands are stand-ins here, which write the same files; `tests/scenarios/test_rounds.py` runs the real ones.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Recipe
from pipeline.config.loading import load_recipe
from pipeline.rounds.recipes import round_recipe
from pipeline.rounds.run import run_rounds, state_lines
from schemas.manifest import Manifest, write_json


def recipe(folder: Path, **rounds: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "corpus": {"source": "first.jsonl"},
            "teacher": {"model": "teacher"},
            "dump": {"path": str(folder / "dump")},
            "student": {"model": "base", "path": str(folder / "student"), "interface": "causal"},
            "train": {"steps": 7},
            "eval": {"source": "held.jsonl", "corpora": {"code": {"source": "code.jsonl"}}},
            "generate": {"path": str(folder / "text"), "prompts": {"source": "prompts.jsonl", "limit": 10}, "seed": 3},
            "rounds": {"path": str(folder / "rounds"), "steps": 5, **rounds},
        }
    )


class Killed(BaseException):
    """As SIGKILL."""


class Commands:
    """Stand-ins for `bld`: they write what the real ones leave, or are killed before one of them."""

    def __init__(self, bits: Sequence[float], killed_at: int | None = None) -> None:
        self.bits, self.killed_at = list(bits), killed_at
        self.done: list[tuple[str, ...]] = []

    def __call__(self, arguments: Sequence[str]) -> None:
        if len(self.done) == self.killed_at:
            raise Killed
        self.done.append(tuple(arguments))
        name, target = arguments[0], Path(arguments[1])
        if name == "eval":
            texts = {"held_out": 0.0, "code": 1.0, "out_of_domain": 99.0}
            figures = {text: {"bits_per_byte": self.bits[0] + more} for text, more in texts.items()}
            del self.bits[0]
            write_json(Path(arguments[-1]), {str(target): figures})
            return
        own = load_recipe(target)
        assert own.student is not None and own.generate is not None
        if name == "generate" and own.generate.writer == "student":
            # The text of a round has one writer, also after the round has trained the student.
            writer = (Path(arguments[3].removeprefix("student.path=")) / "export/config.json").read_text()
            written = Path(own.generate.path) / "writer"
            assert not written.exists() or written.read_text() == writer
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(writer)
        elif name == "teacher":
            Path(own.dump.path).mkdir(exist_ok=True)
            Manifest(identity={"teacher": {"model": "teacher"}}, corpus_counts={}, shards=()).save(Path(own.dump.path))
        elif name == "student":
            assert "dump" in own.train.change
            trained(Path(own.student.path), own.train.steps)


def trained(run: Path, steps: int) -> None:
    """Write what a finished run leaves."""
    (run / "export").mkdir(parents=True, exist_ok=True)
    (run / "export/config.json").write_text(str(steps))
    write_json(run / "identity.json", {"steps": steps})
    write_json(run / "summary.json", {"step": steps})


def test_each_round_trains_the_student_on_and_the_best_is_exported(tmp_path: Path) -> None:
    trained(tmp_path / "student", 7)
    wanted, commands = recipe(tmp_path, count=2), Commands([1.0, 0.9, 0.8])
    assert [score.mean for score in run_rounds(wanted, commands)] == [1.5, 1.4, pytest.approx(1.3)]
    zero, one, two = (f"{tmp_path}/rounds/round-0{number}" for number in range(3))

    def evaluated(folder: str) -> tuple[str, ...]:
        return "eval", f"{folder}/export", "--recipe", f"{folder}/recipe.yaml", "--json", f"{folder}/score.json"

    assert commands.done == [
        evaluated(zero),
        ("generate", f"{one}/recipe.yaml", "-o", f"student.path={zero}"),
        ("teacher", f"{one}/recipe.yaml"),
        ("student", f"{one}/recipe.yaml"),
        evaluated(one),
        ("generate", f"{two}/recipe.yaml", "-o", f"student.path={one}"),
        ("teacher", f"{two}/recipe.yaml"),
        ("student", f"{two}/recipe.yaml"),
        evaluated(two),
    ]
    assert [load_recipe(f"{folder}/recipe.yaml").train.steps for folder in (one, two)] == [12, 17]
    exported = [Path(folder, "export/config.json").read_text() for folder in (zero, one, two)]
    assert exported == ["7", "12", "17"]
    assert (tmp_path / "rounds/export/config.json").read_text() == "17"
    done = json.loads(Path(two, "round.json").read_text())
    assert (done["writer"], done["steps"], done["teacher"]) == (f"{one}/export", 17, {"model": "teacher"})
    again = Commands([])
    run_rounds(wanted, again)
    assert again.done == []
    more = Commands([0.7])
    run_rounds(recipe(tmp_path, count=3), more)
    assert [name for name, *_ in more.done] == ["generate", "teacher", "student", "eval"]
    assert (tmp_path / "rounds/export/config.json").read_text() == "22"


@pytest.mark.parametrize("killed_at", range(9))
def test_after_a_kill_at_any_command_only_that_round_is_run_again(tmp_path: Path, killed_at: int) -> None:
    bits = [1.0, 0.9, 0.8]
    trained(tmp_path / "student", 7)
    first = Commands(bits, killed_at)
    with pytest.raises(Killed):
        run_rounds(recipe(tmp_path, count=2), first)
    second = Commands(first.bits)
    run_rounds(recipe(tmp_path, count=2), second)
    begun = 0 if killed_at == 0 else 1 + 4 * ((killed_at - 1) // 4)  # the first command of the round that was killed
    whole = [*first.done[:begun], *second.done]
    assert [name for name, *_ in whole] == ["eval", *("generate", "teacher", "student", "eval") * 2]
    assert whole == list(dict.fromkeys([*first.done, *second.done]))
    assert (tmp_path / "rounds/export/config.json").read_text() == "17"


def test_rounds_stop_at_a_regression_and_the_best_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "student", 7)
    commands = Commands([1.0, 0.9, 0.95, 0.5])
    run_rounds(recipe(tmp_path, count=5, max_regression=0.02), commands)
    assert len(commands.bits) == 1 and "round 2 is worse than round 1" in capsys.readouterr().err
    assert (tmp_path / "rounds/export/config.json").read_text() == "12"
    run_rounds(recipe(tmp_path, count=3, max_regression=0.1), commands)
    assert (tmp_path / "rounds/export/config.json").read_text() == "22"


def test_rounds_that_make_the_student_worse_export_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "student", 7)
    run_rounds(recipe(tmp_path, count=2), Commands([1.0, 1.1]))
    assert not (tmp_path / "rounds/export").exists()
    assert "no round made the student better than it was" in capsys.readouterr().err


def test_a_cold_start_is_a_round_on_the_teachers_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has not been trained: .* holds no finished run.*rounds.cold_start: true"):
        run_rounds(recipe(tmp_path), Commands([]))
    commands = Commands([1.0, 0.9])
    run_rounds(recipe(tmp_path, count=1, cold_start=True), commands)
    zero, one = (f"{tmp_path}/rounds/round-0{number}" for number in range(2))
    assert commands.done[0] == ("generate", f"{zero}/recipe.yaml")
    assert commands.done[4] == ("generate", f"{one}/recipe.yaml", "-o", f"student.path={zero}")
    recipes = [load_recipe(f"{folder}/recipe.yaml") for folder in (zero, one)]
    assert [own.train.steps for own in recipes] == [5, 10]
    assert [own.generate.writer for own in recipes if own.generate is not None] == ["teacher", "student"]


def test_a_round_has_its_own_seed_prompts_and_share_of_the_first_corpus(tmp_path: Path) -> None:
    wanted = recipe(tmp_path, count=3, replay=0.25, next_prompts=True)
    for number in (1, 2):
        own = round_recipe(wanted, number, 7)
        assert own.student is not None and own.generate is not None
        assert (own.generate.seed, own.generate.prompts.skip) == (3 + number, 10 * (number - 1))
        assert own.corpus.source == own.generate.path and own.dump.path.endswith(f"round-0{number}/dump")
        assert {ref.corpus: ref.weight for ref in own.student.dumps} == {"round": 0.75, "first": 0.25}
        assert [ref.path for ref in own.student.dumps] == [own.dump.path, str(tmp_path / "dump")]
    student = wanted.student
    assert student is not None
    dumps = [{"path": "a", "corpus": "x", "weight": 3}, {"path": "b", "corpus": "y"}]
    union = Recipe.model_validate(wanted.model_dump() | {"student": student.model_dump() | {"dumps": dumps}})
    own = round_recipe(union, 1, 7)
    assert own.student is not None
    assert [(ref.corpus, ref.weight) for ref in own.student.dumps] == [("round", 0.75), ("x", 0.1875), ("y", 0.0625)]


def test_the_state_is_shown(tmp_path: Path) -> None:
    trained(tmp_path / "student", 7)
    run_rounds(recipe(tmp_path, count=1), Commands([1.0, 0.9]))
    other = recipe(tmp_path, count=2)
    moved = other.with_values(train=other.train.model_copy(update={"num_processes": 4, "keep_last": 0}))
    lines = dict(state_lines(moved))
    assert lines["round 1"].endswith("done: 1.4000 bits per byte held out (held_out 0.9000, code 1.9000)")
    assert lines["round 2"].endswith("new: text by the student, the teacher's dump of it, 5 steps on it")


def test_what_rounds_need_is_asked_for_by_name(tmp_path: Path) -> None:
    whole = recipe(tmp_path).model_dump()
    named = {"dumps": [{"path": "a", "corpus": "round"}, {"path": "b", "corpus": "y"}]}
    for change, said in (
        ({"rounds": None}, "no rounds section"),
        ({"eval": None}, "no eval section, by which rounds are compared"),
        ({"generate": None}, "no generate section"),
        ({"student": whole["student"] | named}, "a corpus of student.dumps is called round"),
    ):
        with pytest.raises(ValueError, match=said):
            run_rounds(Recipe.model_validate(whole | change), Commands([]))
