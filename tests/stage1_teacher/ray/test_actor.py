"""The actor: it refuses other code and other dumps, and its hash covers whatever decides content."""

import shutil
from pathlib import Path

import pytest

from pipeline.config import Recipe
from stage1_teacher.dump.job import DumpTask
from stage1_teacher.ray.actor import CONTENT, ROOT, ClusterEngine, ClusterTask, code_sha256
from tests.test_layout import PACKAGES, dotted, imports, modules

RECIPE = {"corpus": {"source": "c"}, "teacher": {"model": "m"}, "dump": {"path": "d"}}


def test_a_machine_with_other_code_or_without_the_dump_refuses_to_make_shards(tmp_path: object) -> None:
    recipe = Recipe.model_validate(RECIPE | {"dump": {"path": f"{tmp_path}/elsewhere"}})
    task = ClusterTask(DumpTask(recipe, {}, (), frozenset()), str(tmp_path), "another", False)
    with pytest.raises(ValueError, match=r"process \d+ of .* runs another release of this package"):
        ClusterEngine().open(task)
    with pytest.raises(
        ValueError, match=r"cannot find .*elsewhere: dump.path must be a folder that all machines share"
    ):
        ClusterEngine().open(task._replace(code=code_sha256()))


def test_other_code_is_other_content_not_another_report(tmp_path: Path) -> None:
    for package in ("pipeline", "schemas", "stage1_teacher"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    ours = code_sha256(tmp_path)
    assert ours == code_sha256()
    for aside in ("pipeline/reports/page.py", "pipeline/cli/app.py", "pipeline/setup/doctor.py", "schemas/README.md"):
        with (tmp_path / aside).open("a", encoding="utf-8") as file:
            file.write("# more\n")
    assert code_sha256(tmp_path) == ours
    for deciding in ("stage1_teacher/reduction/cpu_kernel.py", "pipeline/covering/covering.py", "schemas/levels.py"):
        with (tmp_path / deciding).open("a", encoding="utf-8") as file:
            file.write("# more\n")
        assert code_sha256(tmp_path) != ours
        shutil.copy(ROOT / deciding, tmp_path / deciding)
    assert code_sha256(tmp_path) == ours


def test_whatever_an_engine_runs_is_in_that_hash_but_for_what_decides_no_content() -> None:
    paths = {dotted(path): path for path in modules(*PACKAGES)}
    run: set[str] = set()
    tasks = {"stage1_teacher.dump.job", "stage1_teacher.generation.text_writer"}  # which come pickled
    found = {"stage1_teacher.ray.actor", "stage1_teacher.engines.vllm_worker", *tasks}
    while found:
        run |= found
        found = {name for module in found for name in imports(paths[module])} & paths.keys() - run
    places = [ROOT / part for part in CONTENT]
    left_out = {name for name in run if not any(paths[name].is_relative_to(place) for place in places)}
    rooms = ("pipeline.runtime", "pipeline.dumps", "stage1_teacher.coordination", "stage1_teacher.dump")
    assert {name for name in left_out if not name.startswith(rooms)} <= {"pipeline", "stage1_teacher"}
    # Of rooms that are not in it whole: logs and processes, licences and cards, identities, audits and what shards
    # took.
    assert left_out.isdisjoint({"pipeline.runtime.dtypes", "pipeline.runtime.huggingface"})
    assert left_out.isdisjoint({"stage1_teacher.dump.shard_plan", "stage1_teacher.dump.shard_writer"})
    assert tasks.isdisjoint(left_out)
