"""Faults that `bld verify` finds in a dump that looks sound."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from schemas.manifest import Manifest, write_json
from schemas.shard import commit_shard
from stage1_teacher.dump.summary import summarise
from stage1_teacher.engines.huggingface import TransformersEngine
from stage1_teacher.engines.own_logits import OwnLogits
from stage1_teacher.targets import opening
from stage1_teacher.verification.verify import verify_dump
from tests.scenarios.test_durability import parts
from tests.stage1_teacher.coordination.test_retry import pretend_version
from tests.stage1_teacher.dump.test_run import TEXTS, dump, write_recipe


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Commit a shard again, sealed, with its table changed: no checksum can tell."""
    table = pq.read_table(path)
    commit_shard(change(table).replace_schema_metadata(table.schema.metadata), path, 3)


def with_column(table: pa.Table, name: str, rows: list[Any]) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(rows, field.type))


def two_dropped(table: pa.Table) -> pa.Table:
    rows = table["dropped"].to_pylist()
    rows[0][0] = 2.0
    return with_column(table, "dropped", rows)


def swap_symbols(table: pa.Table) -> pa.Table:
    """Swap the probabilities of the document's symbol and the first other one of each position that stores two."""
    own, others = table["realised_logprobs"].to_pylist(), table["other_logprobs"].to_pylist()
    for counts, of_own, of_others in zip(table["other_counts"].to_pylist(), own, others, strict=True):
        for position, (at, count) in enumerate(zip(np.cumsum([0, *counts]).tolist(), counts, strict=False)):
            if count:
                of_own[position], of_others[at] = of_others[at], of_own[position]
    return with_column(with_column(table, "realised_logprobs", own), "other_logprobs", others)


def test_a_sound_shard_of_a_newer_release_is_not_to_be_deleted(copy: Path) -> None:
    first = parts(copy)[0]
    table = pq.read_table(first)
    metadata = table.schema.metadata | {b"bld.schema_version": b"9"}
    commit_shard(table.replace_schema_metadata(metadata), first, 3)
    [fault] = [fault for fault in verify_dump(copy) if str(first) in fault]
    assert "has schema version '9'" in fault and "newer bld" in fault and "delete" not in fault


def with_type(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pa.nulls(len(table), kind))


def test_verify_finds_what_no_checksum_can(copy: Path) -> None:
    first, second, *_ = parts(copy)
    good = first.read_bytes()

    def faults_of(spoil: Callable[[pa.Table], pa.Table]) -> str:
        rewrite(first, spoil)
        found = "\n".join(verify_dump(copy))
        first.write_bytes(good)
        return found

    assert "documents and 0 left out" in faults_of(lambda table: table.slice(1))
    assert "column doubt is missing" in faults_of(lambda table: table.drop_columns(["doubt"]))
    more = faults_of(lambda table: table.append_column("mine", pa.array(["x"] * len(table))))
    assert "column mine (string) is not one of this dump's format" in more
    nulls = faults_of(lambda table: with_type(table, "doubt", pa.null()))
    assert "column doubt is null, the format says list<element: float not null> not null" in nulls
    assert "dropped holds values outside 0..1" in faults_of(two_dropped)
    shifted = faults_of(lambda table: with_column(table, "window_start", [7] * table.num_rows))
    assert "supervises from byte 7 on" in shifted
    first.write_bytes(second.read_bytes())
    assert "made from other documents than planned" in "\n".join(verify_dump(copy))
    first.write_bytes(good)
    assert verify_dump(copy) == []


def test_verify_finds_a_summary_of_other_shards_and_a_shard_of_no_plan(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    (copy / "summary.json").write_text(json.dumps(summary | {"positions": 1}), encoding="utf-8")
    shutil.copy(parts(copy)[0], copy / "shards" / "part-00077.parquet")
    (copy / "shards" / "001").mkdir()
    shutil.copy(parts(copy)[0], copy / "shards" / "001" / "part-00077.parquet")
    found = verify_dump(copy)
    assert sum("part-00077.parquet: not in the plan" in fault for fault in found) == 2
    (copy / "shards" / "part-00077.parquet").unlink()
    (copy / "shards" / "001" / "part-00077.parquet").unlink()
    [fault] = verify_dump(copy)
    assert "does not match these shards (positions: 1 there" in fault


def test_verify_against_another_teacher_says_so_instead_of_comparing(
    copy: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_version(monkeypatch, "99.0")
    [fault] = verify_dump(copy, against_teacher=2)
    assert "another one: teacher.engine: " in fault


def test_verify_finds_targets_that_the_teacher_does_not_give(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_dump(copy, against_teacher=12) == []
    assert "12 records recomputed" in capsys.readouterr().out
    for path in parts(copy):
        rewrite(path, swap_symbols)
    write_json(copy / "summary.json", summarise(copy, Manifest.load(copy)))
    found = verify_dump(copy, against_teacher=2)
    assert len(found) == 2 and all("nats per position from the stored ones" in fault for fault in found)


def test_a_dump_of_a_wrong_head_is_found_even_where_the_same_head_checks_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dump is that of a release that did not know a model's scale and never asked the model."""
    logits = OwnLogits.logits
    monkeypatch.setattr(OwnLogits, "logits", lambda self, states: 0.5 * logits(self, states))
    monkeypatch.setattr(opening, "check_engine", lambda *_: None)
    folder = dump(write_recipe(tmp_path, model, TEXTS[:4]))
    assert "from the model's own" in capsys.readouterr().err
    audited = json.loads((folder / "audit.json").read_text(encoding="utf-8"))["models_own_tokens"]
    assert audited["tokens"] > 5 and audited["half_mean_square_nats"] > audited["limit_nats"]
    found = verify_dump(folder, against_teacher=4)
    assert len(found) == 4 and all("from the model's own" in fault for fault in found)
    monkeypatch.undo()
    found = verify_dump(folder, against_teacher=4)
    assert sum("from the model's own" in fault for fault in found) == 4
    assert any("nats per position from the stored ones" in fault for fault in found)
    parts(folder)[-1].unlink()
    with pytest.raises(ValueError, match=r"part-00000.parquet, doc_id '0': .*give a new dump.path"):
        dump(tmp_path / "recipe.yaml")


def test_a_dump_of_a_model_that_differs_from_itself_is_held_to_that(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own two answers differ by 0.5 nats a token, as with differently chosen experts."""
    folder = dump(write_recipe(tmp_path, model, TEXTS[:4]))
    own, generator = TransformersEngine.own_logprobs, torch.Generator().manual_seed(0)

    def noisy(self: TransformersEngine, prompt: list[int], first: int = 0) -> torch.Tensor:
        logprobs_RV = own(self, prompt, first)
        return (logprobs_RV + 0.5 * torch.randn(logprobs_RV.shape, generator=generator)).log_softmax(-1)

    monkeypatch.setattr(TransformersEngine, "own_logprobs", noisy)
    monkeypatch.setattr(opening, "check_engine", lambda *_: None)
    assert verify_dump(folder, against_teacher=4) == []
    parts(folder)[-1].unlink()
    dump(tmp_path / "recipe.yaml")
    assert verify_dump(folder) == []
