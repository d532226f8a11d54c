"""The audit of a dump: what it measures, and on which documents."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.corpus.documents import Document
from schemas.manifest import Manifest
from stage1_teacher.dump import audit
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe


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
    own = read_audit(whole)["models_own_tokens"]
    assert own["tokens"] > 5 and own["half_mean_square_nats"] < 1e-3
    assert canonical["documents"] == same["documents"] >= 1
    # As earlier releases wrote it, and as the manifest has these keys.
    assert list(canonical)[:3] == ["beam_width", "branch_threshold", "merge_after"] and canonical["merge_after"] == 4
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
        return sample.chosen_ids()

    assert len(chosen(16, documents[:3])) == 1 and chosen(0, documents) == frozenset()
    if not torch.cuda.is_available():
        assert chosen(4, documents) < chosen(8, documents) == chosen(8, documents[::-1])
        assert len(chosen(100, documents)) == 2_000_000 / audit.BYTES_PER_TOKEN * 0.03 // audit.DOCUMENT_COST_CPU
