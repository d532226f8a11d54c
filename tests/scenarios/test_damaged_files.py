"""Damaged files of dumps and runs, seen by each of their readers.

Each is an error that names the file, without the wording of a traceback.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dumps.card import write_card
from pipeline.evaluation.results import read_results
from pipeline.evaluation.task_table import load_tasks
from pipeline.planning.forecast_text import measured_cost
from pipeline.reports.runs import read_run
from schemas.manifest import Manifest, write_json
from stage1_teacher.calibration.calibrate import read_part
from stage1_teacher.dump.merge import _document_ids, _origin
from stage1_teacher.dump.shard_cost import read_cost, write_cost
from stage2_student.runs import folder
from stage2_student.runs.export import is_due
from stage2_student.runs.retention import evaluation_of
from stage2_student.runs.step_log import _seconds_taken, cut_lines
from tests.support.small_dumps import make_dump

READERS: list[tuple[str, Callable[[Path], Any]]] = [
    ("summary.json", write_card),
    ("recipe.yaml", write_card),
    ("audit.json", write_card),
    ("recipe.yaml", lambda dump: _origin(dump, Manifest.load(dump))),
    ("summary.json", measured_cost),
    ("eval.json", read_results),
    ("eval.json", read_run),
    ("recipe.yaml", read_run),
    ("metrics.jsonl", read_run),
    ("metrics.jsonl", lambda run: cut_lines(run / "metrics.jsonl", 1)),
    ("metrics.jsonl", lambda run: _seconds_taken(run / "metrics.jsonl")),
    ("piqa.json", load_tasks),
    ("identity.json", folder.tokenizer_sha256),
    ("identity.json", folder.begun_schedule),
    ("identity.json", folder.data_order),
    ("identity.json", lambda run: folder.claim(run, {})),
    ("identity.json", lambda run: folder.was_passed(run, 1)),
    ("checkpoints/step-000001/evaluation.json", lambda run: evaluation_of(run, 1)),
    ("export/distilled.json", is_due),
]


@pytest.mark.parametrize("content", ["{\n", "[1]\n", '"step"\n'])
@pytest.mark.parametrize(("name", "read"), READERS)
def test_a_damaged_file_is_named_with_what_to_do(
    tmp_path: Path, name: str, read: Callable[[Path], Any], content: str
) -> None:
    folder = make_dump(tmp_path / "folder")
    write_json(folder / "summary.json", {"cost": {}, "records": 1})
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"(?i)damaged|is not JSON|repair|expected|hold") as error:
        read(folder)
    assert name in str(error.value)


@pytest.mark.parametrize("values", [{}, {"seconds": 1.0}, []])
def test_a_cost_that_does_not_say_all_is_named(tmp_path: Path, values: Any) -> None:
    folder = make_dump(tmp_path / "folder")
    shard = Manifest.load(folder).shards[0]
    write_cost(folder, shard, 1.0, "a CPU")
    [path] = (folder / "costs").iterdir()
    write_json(path, values)
    with pytest.raises(ValueError, match=f"{path.name} is damaged: it holds no .*Delete it"):
        read_cost(folder, shard)


def test_a_shard_with_an_altered_page_is_named_by_merging(tmp_path: Path) -> None:
    folder = make_dump(tmp_path / "folder")
    manifest = Manifest.load(folder)
    path = manifest.shards[0].path(folder)
    column = pq.read_metadata(path).row_group(0).column(0)
    assert column.path_in_schema == "doc_id"
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        list(_document_ids(folder, manifest))


def test_a_trial_shard_that_does_not_say_what_it_cost_is_named_by_calibrating(tmp_path: Path) -> None:
    folder = make_dump(tmp_path / "folder")  # no stage has made it
    with pytest.raises(ValueError, match=r"\.parquet is not a shard made by stage 1: .*bld.teacher_tokens"):
        read_part(Manifest.load(folder).shards[0], folder)
