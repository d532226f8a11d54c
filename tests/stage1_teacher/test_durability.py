"""The failures that a dump promises to survive, and those that it promises to name."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import Tensor

from pipeline.corpus import Document
from schemas.manifest import Manifest, write_json
from schemas.seal import check_seal
from schemas.shard import commit_shard, read_shard
from stage1_teacher import audit, engine_transformers
from stage1_teacher.engine_transformers import TransformersEngine
from stage1_teacher.restart import EngineError
from stage1_teacher.summary import summarise
from stage1_teacher.verify import verify_dump
from tests.bench.kills import flip
from tests.stage1_teacher.test_dump import TEXTS, content, dump, write_recipe
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A complete dump that no test may change."""
    return dump(write_recipe(tmp_path_factory.mktemp("whole"), model, TEXTS[:12]))


@pytest.fixture
def copy(tmp_path: Path, whole: Path) -> Path:
    shutil.copytree(whole, tmp_path / "dump")
    return tmp_path / "dump"


def parts(dump: Path) -> list[Path]:
    return sorted((dump / "shards").glob("*.parquet"))


def left(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.partial"))


def test_a_dump_killed_or_interrupted_at_random_moments_loses_only_the_shards_in_flight() -> None:
    """Three kills of two workers, one SIGINT, one SIGTERM; `make bench` does fifty."""
    options = ["--kills", "3", "--interrupts", "2", "--flips", "20", "--documents", "40", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.kills", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_flipped_bit_and_truncation_is_found_without_a_summary(copy: Path) -> None:
    (copy / "summary.json").unlink()
    assert flip(copy, 100, random.Random(0)) == []


def test_every_bit_of_a_footer_is_under_the_seal(copy: Path) -> None:
    path = parts(copy)[0]
    good = path.read_bytes()
    for at in range(len(good) - 200, len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            check_seal(path)


def test_a_reader_finds_a_damaged_page_by_itself(copy: Path) -> None:
    path = parts(copy)[0]
    column = pq.read_metadata(path).row_group(0).column(2)
    spoiled = bytearray(path.read_bytes())
    spoiled[column.data_page_offset + column.total_compressed_size - 8] ^= 1
    path.write_bytes(bytes(spoiled))
    with pytest.raises(OSError):
        list(read_shard(path))


def test_a_shard_that_was_deleted_is_named_and_made_again_alike(tmp_path: Path, model: Path, whole: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    shutil.copytree(whole, tmp_path / "dump")
    second = parts(tmp_path / "dump")[1]
    second.unlink()
    assert verify_dump(tmp_path / "dump") == [f"{second}: missing; run `bld teacher` again to make it"]
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole) and verify_dump(tmp_path / "dump") == []


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: a write fails as it does on a full disk (EFBIG for ENOSPC), and needs no privileges."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_named_leaves_nothing_half_written_and_is_resumed(
    tmp_path: Path, model: Path, whole: Path
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    with largest_file(8000), pytest.raises(OSError, match=r"part-00000.parquet cannot be written.*same command again"):
        dump(recipe)
    assert parts(tmp_path / "dump") == left(tmp_path) == []
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 64 KiB."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_and_a_read_only_one_are_named_and_resumed_from(tmpfs: Path, model: Path, whole: Path) -> None:
    recipe = write_recipe(tmpfs.parent, model, TEXTS[:12])
    (tmpfs.parent / "dump").symlink_to(tmpfs, target_is_directory=True)
    with pytest.raises(OSError, match=r"cannot be written.*No space left.*same command again"):
        dump(recipe)
    made = content(tmpfs)
    assert 0 < len(made) < len(Manifest.load(tmpfs).shards) and left(tmpfs) == []
    remount(tmpfs, "ro")
    with pytest.raises(OSError, match=r"cannot be written.*Read-only file system"):
        dump(recipe)
    remount(tmpfs, "rw,size=16m")
    dump(recipe)
    assert content(tmpfs) == content(whole) and verify_dump(tmpfs) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_folder_without_permission_is_named(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    (tmp_path / "dump").mkdir(mode=0o555)
    with pytest.raises(OSError, match="dump"):
        dump(recipe)


HOLD = """
import sys
from pathlib import Path
from stage1_teacher.claims import open_claims
with open_claims(Path(sys.argv[1])) as claims:
    print(claims.take(1), flush=True)
    sys.stdin.read()
"""


def test_processes_share_a_dump_and_a_dead_ones_claim_is_free(
    tmp_path: Path, model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    (tmp_path / "dump").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "dump")], cwd=ROOT, stdin=-1, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    half = tmp_path / "dump" / "shards" / f"part-00001.{other.pid}.partial"
    half.parent.mkdir()
    half.write_bytes(b"half")
    dump(recipe)
    others = [path.name for path in parts(whole) if path.name != "part-00001.parquet"]
    assert [path.name for path in parts(tmp_path / "dump")] == others
    assert left(tmp_path) == [half] and not (tmp_path / "dump" / "summary.json").exists()
    assert "1 shards are missing: other processes make them" in capsys.readouterr().err
    other.kill()
    other.communicate()
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole) and left(tmp_path) == []


def test_another_teacher_and_another_corpus_are_refused_by_name(tmp_path: Path, model: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "dump")
    other = tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"teacher.model: .*teacher.weights_sha256: .*Give a new dump.path"):
        dump(write_recipe(tmp_path, other, TEXTS[:12]))
    with pytest.raises(ValueError, match=r"holds another dump: corpus.sha256"):
        dump(write_recipe(tmp_path, model, TEXTS[1:13]))
    (tmp_path / "dump" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest.json"):
        dump(write_recipe(tmp_path, model, TEXTS[:12]))


def test_another_engine_is_refused_or_accepted_by_name_and_recorded(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    shutil.copytree(whole, tmp_path / "dump")
    began = f"transformers-{transformers.__version__}"
    parts(tmp_path / "dump")[2].unlink()
    pretend_version(monkeypatch, "99.0")
    with pytest.raises(ValueError, match=r"teacher.engine: .*--accept-engine transformers-99.0"):
        dump(recipe)
    with pytest.raises(ValueError, match=r"the engine here is transformers-99.0"):
        dump(recipe, accept_engine="transformers-98.0")
    with pytest.raises(ValueError, match=r"sparsity.top_k"):  # it excuses the engine alone
        dump(recipe, "dump.top_k=3", accept_engine="transformers-99.0")
    dump(recipe, accept_engine="transformers-99.0")
    dump(recipe)  # once is enough
    assert Manifest.load(tmp_path / "dump").accepted_engines == ("transformers-99.0",)
    summary = json.loads((tmp_path / "dump" / "summary.json").read_text(encoding="utf-8"))
    assert summary["shards_by_engine"] == {began: len(parts(whole)) - 1, "transformers-99.0": 1}
    assert verify_dump(tmp_path / "dump") == []


def pretend_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """transformers replaces its own module while it is imported, so that there are two of them."""
    for module in {id(m): m for m in (sys.modules["transformers"], engine_transformers.transformers)}.values():
        monkeypatch.setattr(module, "__version__", version)


def failing_engine(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """An engine breaks in those of its calls, and then can neither be asked nor closed. Returns the numbers of calls made."""
    calls: list[int] = []
    broken: list[TransformersEngine] = []
    ask, close = TransformersEngine.hidden_states, TransformersEngine.close

    def hidden_states(self: TransformersEngine, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        calls.append(len(calls))
        if fails(calls[-1]):
            broken.append(self)
        if self in broken:
            raise RuntimeError("engine core died")
        return ask(self, prompts)

    def close_it(self: TransformersEngine) -> None:
        if self in broken:
            raise RuntimeError("it is dead")
        close(self)

    monkeypatch.setattr(TransformersEngine, "hidden_states", hidden_states)
    monkeypatch.setattr(TransformersEngine, "close", close_it)
    return calls


def test_an_engine_that_crashes_in_a_batch_is_restarted_and_nothing_is_lost(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    failing_engine(monkeypatch, {1, 4, 5}.__contains__)  # once, and twice in a row
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole)
    said = capsys.readouterr().err
    assert said.count("failed with RuntimeError: engine core died; starting it again") == 3
    assert said.count("closing the failed engine: RuntimeError: it is dead") == 3


def test_an_engine_that_fails_again_and_again_stops_the_dump_with_the_cause(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing_engine(monkeypatch, lambda call: True)
    with pytest.raises(EngineError, match=r"failed 3 times in a row .*RuntimeError: engine core died") as stop:
        dump(write_recipe(tmp_path, model, TEXTS[:3]))
    assert isinstance(stop.value.__cause__, RuntimeError) and len(calls) == 3


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Commit a shard anew, sealed, with its table changed: no checksum can tell."""
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
    """The first two symbols of each position, which both are stored, have each other's probabilities."""
    rows = []
    for counts, symbols in zip(table["entry_counts"].to_pylist(), table["symbols"].to_pylist(), strict=True):
        for at, count in zip(np.cumsum([0, *counts]).tolist(), counts, strict=False):
            if count > 1:
                symbols[at], symbols[at + 1] = symbols[at + 1], symbols[at]
        rows.append(symbols)
    return with_column(table, "symbols", rows)


def test_verify_finds_what_no_checksum_can(copy: Path) -> None:
    first, second, *_ = parts(copy)
    good = first.read_bytes()

    def faults_of(spoil: Callable[[pa.Table], pa.Table]) -> str:
        rewrite(first, spoil)
        found = "\n".join(verify_dump(copy))
        first.write_bytes(good)
        return found

    assert "documents and 0 left out" in faults_of(lambda table: table.slice(1))
    assert "column doubt is None" in faults_of(lambda table: table.drop_columns(["doubt"]))
    assert "dropped holds values outside 0..1" in faults_of(two_dropped)
    shifted = faults_of(lambda table: with_column(table, "window_start", [7] * table.num_rows))
    assert "supervises from byte 7 on" in shifted
    first.write_bytes(second.read_bytes())
    assert "made of other documents than the plan's" in "\n".join(verify_dump(copy))
    first.write_bytes(good)
    assert verify_dump(copy) == []


def test_verify_finds_a_summary_of_other_shards_and_a_shard_of_no_plan(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    (copy / "summary.json").write_text(json.dumps(summary | {"positions": 1}), encoding="utf-8")
    shutil.copy(parts(copy)[0], copy / "shards" / "part-00077.parquet")
    found = verify_dump(copy)
    assert any("part-00077.parquet: not in the plan" in fault for fault in found)
    (copy / "shards" / "part-00077.parquet").unlink()
    [fault] = verify_dump(copy)
    assert "is not that of these shards (positions: 1 there" in fault


def test_verify_against_another_teacher_says_so_instead_of_comparing(
    copy: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_version(monkeypatch, "99.0")
    [fault] = verify_dump(copy, against_teacher=2)
    assert "another one: engine: " in fault


def test_verify_finds_targets_that_the_teacher_does_not_give(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_dump(copy, against_teacher=12) == []
    assert "12 records recomputed" in capsys.readouterr().out
    for path in parts(copy):
        rewrite(path, swap_symbols)
    write_json(copy / "summary.json", summarise(copy, Manifest.load(copy)))
    found = verify_dump(copy, against_teacher=2)
    assert len(found) == 2 and all("nats per position from what is stored" in fault for fault in found)


def read_audit(folder: Path) -> dict[str, Any]:
    audit: dict[str, Any] = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    return audit


def test_the_audit_of_a_wide_covering_finds_nothing_and_of_a_canonical_one_something(
    tmp_path: Path, model: Path, whole: Path
) -> None:
    canonical = read_audit(whole)["wide_covering"]
    wide = write_recipe(
        tmp_path, model, TEXTS[:12], top_k=256, min_prob=0, covering={"beam_width": 16, "branch_threshold": 0.001}
    )
    same = read_audit(dump(wide))["wide_covering"]
    assert canonical["documents"] == same["documents"] >= 1
    # 256 entries that are nearly equal, which a real teacher's are not: each is rounded to levels 0.4 of it apart.
    assert same["kl_nats"] < 0.01 < canonical["kl_nats"]


def test_the_audit_does_not_depend_on_who_made_which_shard_or_when(tmp_path: Path, model: Path, whole: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    dump(recipe, worker=(1, 2))
    dump(recipe, worker=(0, 2))
    found, alone = read_audit(tmp_path / "dump"), read_audit(whole)
    assert found.keys() == alone.keys()
    assert found == alone
    assert 0.5 < found["kept_mass"] <= 1


def test_no_document_is_audited_where_none_is_wanted_and_the_identity_is_the_same(
    tmp_path: Path, model: Path, whole: Path
) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:12], audit_documents=0))
    assert read_audit(folder)["documents"] == 0
    assert Manifest.load(folder).identity == Manifest.load(whole).identity
    assert content(folder) == content(whole)


def test_the_audited_documents_are_those_whose_ids_hash_lowest_and_a_small_dump_has_one() -> None:
    documents = [Document(str(number), b"x" * 20_000, None) for number in range(100)]

    def chosen(num_documents: int, text: list[Document]) -> frozenset[str]:
        sample = audit.Sample(num_documents)
        assert list(sample.passing(text)) == text
        return sample.chosen()

    assert len(chosen(16, documents[:3])) == 1 and chosen(0, documents) == frozenset()
    if not torch.cuda.is_available():
        assert chosen(4, documents) < chosen(8, documents) == chosen(8, documents[::-1])
        assert len(chosen(100, documents)) == 2_000_000 / audit.BYTES_PER_TOKEN * 0.03 // audit.DOCUMENT_COST_CPU
