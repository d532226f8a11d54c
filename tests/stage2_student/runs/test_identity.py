"""The identity of a run: what is part of it, and runs that an earlier release began."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.data import order
from stage2_student.runs import folder
from stage2_student.runs.identity import RunVersions, counts_key, run_identity
from stage2_student.training.rank_batches import uses_turns
from tests.support.small_dumps import make_dump, recipe_in


def test_of_deepspeeds_settings_those_that_decide_the_result_are_part_of_the_identity(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", num_records=3)
    manifest = Manifest.load(tmp_path / "dump")

    def identity(given: Any = None, **values: Any) -> dict[str, Any]:
        (tmp_path / "own.json").write_text(json.dumps(given or {}))
        values = {"deepspeed": {"zero_stage": 2, "config": str(tmp_path / "own.json")} | values}
        return run_identity(recipe_in(tmp_path, **values), manifest, "s", SpecialIds(1, (1,)))

    plain = identity()
    assert plain == identity({"zero_optimization": {"overlap_comm": True}, "tensorboard": {"enabled": True}})
    assert plain == identity(offload_optimizer="cpu")
    assert plain != identity({"optimizer": {"params": {"eps": 1e-6}}})
    assert plain != identity({"communication_data_type": "bf16"})
    assert plain != identity(zero_stage=1)
    assert identity(zero_stage=3)["deepspeed"] == {"zero_stage": 3}


def test_a_run_that_took_its_documents_in_another_order_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dump(tmp_path / "dump", num_records=3)
    identity = run_identity(recipe_in(tmp_path), Manifest.load(tmp_path / "dump"), "s", SpecialIds(1, (1,)))
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    before_it_was_told = {name: value for name, value in identity.items() if name != "data_order"}
    (run / "identity.json").write_text(json.dumps(before_it_was_told))
    with pytest.raises(ValueError, match=r"data_order: None there, 4 here.* new student.path"):
        folder.claim(run, identity)


def test_a_run_that_began_with_whole_chats_goes_on_with_them_and_with_what_it_counted(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", num_records=3)
    manifest, run = Manifest.load(tmp_path / "dump"), tmp_path / "run"
    now = run_identity(recipe_in(tmp_path), manifest, "s", SpecialIds(1, (1,)))
    begun = {**now, "data_order": 3}
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "identity.json").write_text(json.dumps(begun))
    assert folder.data_order(run) == order.WHOLE_CHATS == 3 and not uses_turns(3) and uses_turns(order.VERSION)
    decisive = {"dump": begun["dump"], "other_dumps": None, "tokenizer_sha256": "s", "template_sha256": None}
    decisive |= {"pieces": 1, "max_tokens": begun["train"]["max_tokens"]}
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    assert counts_key(begun) == key != counts_key(now)


def test_a_run_that_began_before_records_were_cut_goes_on_as_it_began(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", num_records=3)
    manifest, run = Manifest.load(tmp_path / "dump"), tmp_path / "run"
    now = run_identity(recipe_in(tmp_path), manifest, "s", SpecialIds(1, (1,)))
    begun = {**now, "data_order": order.WHOLE_RECORDS}
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "identity.json").write_text(json.dumps(begun))
    assert folder.data_order(run) == order.WHOLE_RECORDS
    ours = run_identity(
        recipe_in(tmp_path), manifest, "s", SpecialIds(1, (1,)), versions=RunVersions(folder.data_order(run))
    )
    folder.claim(run, ours)  # does not raise
    shorter = {**now, "train": now["train"] | {"max_tokens": 9}}
    assert counts_key(now) != counts_key(shorter)
    assert counts_key(begun) == counts_key(shorter | {"data_order": order.WHOLE_RECORDS})
    (run / "checkpoints" / "step-000001").rmdir()  # nothing to go on with
    assert folder.data_order(run) == order.VERSION == now["data_order"]
