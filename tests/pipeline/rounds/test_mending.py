"""A recipe that is changed amid its rounds: what is made stays, the rest follows it, and the round says so."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Recipe
from pipeline.config.loading import load_recipe
from pipeline.rounds.run import run_rounds
from schemas.manifest import Manifest, ShardPlan, write_json
from schemas.text_corpus import TextManifest
from tests.pipeline.rounds.test_run import Commands, recipe, trained

SHARDS = (ShardPlan(0, 0, 1, 1, ""), ShardPlan(1, 1, 1, 1, ""))


def changed(of: Recipe, section: str, **values: Any) -> Recipe:
    return of.with_values(**{section: getattr(of, section).model_copy(update=values)})


class Failing(Commands):
    """Commands of which one fails after it has done this much."""

    def __init__(self, bits: Sequence[float], fails: str, shards: int = 0, kept: int = 1) -> None:
        super().__init__(bits)
        self.fails, self.shards, self.kept = fails, shards, kept

    def __call__(self, arguments: Sequence[str]) -> None:
        own = load_recipe(arguments[1]) if arguments[0] != "eval" else None
        fails = arguments[0] == self.fails
        if own is not None and own.generate is not None and arguments[0] == "generate":
            text = Path(own.generate.path)
            write_shards(text, self.shards if fails else 2)
            TextManifest(identity={"length": own.generate.max_new_tokens}, prompt_counts={}, shards=SHARDS).save(text)
            if not fails:
                left_out = {"not UTF-8": {"number": 3, "first": "0/0"}}
                write_json(text / "summary.json", {"kept": self.kept, "left_out_completions": left_out})
        if own is not None and arguments[0] == "teacher" and fails:
            Manifest(identity={"x": 1}, corpus_counts={}, shards=SHARDS).save(
                write_shards(Path(own.dump.path), self.shards)
            )
        if fails:
            self.done.append(tuple(arguments))
            raise ChildProcessError(f"bld {self.fails} failed")
        super().__call__(arguments)


def write_shards(folder: Path, number: int) -> Path:
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for plan in SHARDS[:number]:
        plan.path(folder).write_bytes(b"")
    return folder


def names(commands: Commands) -> list[str]:
    return [name for name, *_ in commands.done]


def begun(folder: Path, fails: str, shards: int = 0) -> Recipe:
    """Run rounds until the first one fails there."""
    trained(folder / "student", 7)
    wanted = recipe(folder, count=1)
    with pytest.raises(ChildProcessError):
        run_rounds(wanted, Failing([1.0], fails, shards))
    return wanted


def test_training_that_failed_for_its_rate_is_done_at_another_one_on_the_same_text_and_dump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = begun(tmp_path, "student")
    one = tmp_path / "rounds/round-01"
    commands = Commands([0.9])
    mended = changed(changed(wanted, "train", lr=0.5), "generate", max_new_tokens=9)
    run_rounds(mended, commands)
    assert names(commands) == ["teacher", "student", "eval"]
    said = capsys.readouterr().err
    assert "the recipe was changed since this round began, and is followed (train.lr: 1e-05 there, 0.5 here)" in said
    assert "text stay as made" in said
    made = load_recipe(one / "recipe.yaml")
    assert made.generate is not None and (made.train.lr, made.generate.max_new_tokens) == (0.5, 512)
    assert set(made.train.change) == {"dump", "lr"} and made.train.steps == 12
    [entry] = json.loads((one / "round.json").read_text())["mended"]
    assert entry == {"kept": ["text"], "changed": {"train.lr": {"from": 1e-05, "to": 0.5}}}
    assert load_recipe(tmp_path / "rounds/round-00/recipe.yaml").train.lr == 1e-05
    again = Commands([])
    run_rounds(mended, again)
    assert again.done == []


def test_what_is_done_stays_and_the_next_round_follows_the_changed_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "student", 7)
    run_rounds(recipe(tmp_path, count=1), Commands([1.0, 0.9]))
    more = changed(recipe(tmp_path, count=2, steps=3), "train", lr=0.5)
    run_rounds(more, Commands([0.8]))
    one, two = (load_recipe(tmp_path / f"rounds/round-0{number}/recipe.yaml") for number in (1, 2))
    assert [(own.train.lr, own.train.steps) for own in (one, two)] == [(1e-05, 12), (0.5, 15)]
    assert (set(one.train.change), set(two.train.change)) == ({"dump"}, {"dump", "lr"})
    assert "round-01 stays as made, with another recipe (train.lr: 1e-05 there, 0.5 here" in capsys.readouterr().err


def test_a_part_of_which_nothing_is_made_is_begun_anew_and_one_that_is_half_made_says_so(tmp_path: Path) -> None:
    for name, shards in (("none", 0), ("half", 1)):
        folder = tmp_path / name
        wanted = begun(folder, "generate", shards)
        one, commands = folder / "rounds/round-01", Commands([0.9])
        longer = changed(wanted, "generate", max_new_tokens=9)
        if shards:
            with pytest.raises(ValueError, match=r"text is half made \(1 shards\) .*max_new_tokens: 512 there, 9 here"):
                run_rounds(longer, commands)
            assert (one / "text/shards/part-00000.parquet").exists()
            continue
        run_rounds(longer, commands)
        assert not (one / "text/shards").exists() and names(commands) == ["generate", "teacher", "student", "eval"]
        own = load_recipe(one / "recipe.yaml").generate
        assert own is not None and own.max_new_tokens == 9
    dumped = tmp_path / "dumped"
    wanted = begun(dumped, "teacher", 1)
    with pytest.raises(ValueError, match=r"dump is half made \(1 shards\) .*dump.top_k: 16 there, 4 here"):
        run_rounds(changed(wanted, "dump", top_k=4), Commands([]))


def test_text_of_which_nothing_is_kept_is_named_and_written_anew_by_another_recipe(tmp_path: Path) -> None:
    trained(tmp_path / "student", 7)
    wanted, commands = recipe(tmp_path, count=1), Failing([1.0], "none", kept=0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"nothing that was written is kept \(3 not UTF-8\)"):
            run_rounds(wanted, commands)
    better = Failing([0.9], "none")
    run_rounds(changed(wanted, "generate", max_new_tokens=9), better)
    assert names(better) == ["generate", "teacher", "student", "eval"]


def test_what_rounds_are_compared_by_cannot_change(tmp_path: Path) -> None:
    trained(tmp_path / "student", 7)
    wanted = recipe(tmp_path, count=1)
    run_rounds(wanted, Commands([1.0, 0.9]))
    for other, said in (
        (changed(wanted, "eval", limit=3), r"eval.limit: None there, 3 here\), by which rounds are compared"),
        (changed(wanted, "student", path=str(tmp_path / "other")), "student.path"),
        (changed(wanted, "rounds", cold_start=True), "cold_start: false. Restore"),
    ):
        with pytest.raises(ValueError, match=said):
            run_rounds(other, Commands([]))
    cold = tmp_path / "begun"
    wanted = begun(cold, "teacher")
    with pytest.raises(ValueError, match=r"student\.path: "):
        run_rounds(changed(wanted, "student", path=str(cold / "other")), Commands([]))
