"""Commands of `make reproduce` and its rehearsal, without running them."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline.config import Recipe
from pipeline.config.loading import load_recipe
from pipeline.planning.dry_run import describe_source, plan, sources

ROOT = Path(__file__).resolve().parents[2]
# Not what a `make test` around this was told.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS", "TABLE")
}


def commands(target: str, table: int, *arguments: str) -> list[list[str]]:
    """Return the commands of `bld` that the target runs."""
    made = subprocess.run(
        ["make", "-n", target, f"TABLE={table}", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in made.stdout.splitlines() if line.startswith(".venv/bin/bld ")]


def recipe_of(command: list[str]) -> Recipe:
    """Return the recipe that results from a command's arguments."""
    assert set(command[3::2]) == {"-o"}
    return load_recipe(ROOT / command[2], command[4::2])


@pytest.mark.parametrize("target", ["reproduce", "rehearse"])
@pytest.mark.parametrize("table", [1, 2, 3])
def test_a_table_is_dumped_trained_and_evaluated_from_one_recipe(target: str, table: int, tmp_path: Path) -> None:
    found = commands(target, table)
    assert [command[1] for command in found] == ["teacher", "student", "eval"]
    recipe, *others = map(recipe_of, found)
    assert others == [recipe, recipe] and plan(recipe)
    assert recipe.student is not None and recipe.student.interface == "linear" and recipe.student.lora_rank == 64
    weights = {name: weight for name, weight in recipe.train.objectives.weights.items() if weight}
    assert weights == {"ce": 1, "byte_ce": 1, "kl": 0.1}
    assert recipe_of(commands(target, table, f"ARGS=-o dump.path={tmp_path}")[0]).dump.path == str(tmp_path)


@pytest.mark.parametrize("table", [1, 2, 3])
def test_a_rehearsal_needs_no_hub_and_writes_beside_the_real_run(table: int) -> None:
    rehearsed, real = recipe_of(commands("rehearse", table)[0]), recipe_of(commands("reproduce", table)[0])
    assert not [key for key, source in sources(rehearsed) if "from a hub" in describe_source(key, source)]
    assert rehearsed.eval is not None and rehearsed.student is not None and real.student is not None
    names = [name for group in rehearsed.eval.tasks.values() for name in group.names]
    assert sorted(names) == ["bld_boolq", "bld_boolq_answer", "bld_piqa"]
    assert rehearsed.dump.path.startswith("runs/rehearsal/") and rehearsed.student.path.startswith("runs/rehearsal/")
    assert not real.student.path.startswith("runs/rehearsal/")


def test_a_table_that_the_paper_does_not_have_is_refused() -> None:
    done = subprocess.run(
        ["make", "-n", "reproduce", "TABLE=4"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "TABLE is 4; give 1, 2 or 3" in done.stderr
