"""Objectives by name, and in files of the user's own."""

from pathlib import Path

import pytest
import torch

from pipeline.config import TrainConfig
from stage2_student.data.micro_batch import empty_micro_batch
from stage2_student.losses.objectives import ObjectiveInputs, active_objectives

FILE = "{imports}\n\n\ndef objective(seen: Seen):\n    return {value}\n"


def own_inputs(file: Path) -> tuple[TrainConfig, ObjectiveInputs]:
    train = TrainConfig.model_validate({"objectives": {"ce": 0.0, "kl": 0.0, str(file): 1.0}})
    return train, ObjectiveInputs(empty_micro_batch(0), None, torch.ones(3), train)


@pytest.mark.parametrize("module", ["stage2_student.losses.objectives", "stage2_student.objectives"])
def test_a_file_that_names_its_inputs_as_earlier_releases_did_still_runs(tmp_path: Path, module: str) -> None:
    file = tmp_path / "own.py"
    file.write_text(FILE.format(imports=f"from {module} import Seen", value="seen.nats_N.sum()"), encoding="utf-8")
    train, inputs = own_inputs(file)
    assert float(active_objectives(train.objectives)["own"](inputs)) == 3.0


@pytest.mark.parametrize(
    ("value", "kind"), [("seen.nats_N", r"a tensor of shape \(3,\)"), ("float(seen.nats_N.sum())", "float")]
)
def test_an_objective_that_is_no_sum_is_named_with_what_it_returns(tmp_path: Path, value: str, kind: str) -> None:
    file = tmp_path / "own.py"
    imports = "from stage2_student.losses.objectives import ObjectiveInputs as Seen"
    file.write_text(FILE.format(imports=imports, value=value), encoding="utf-8")
    train, inputs = own_inputs(file)
    with pytest.raises(ValueError, match=rf"own\.py: objective\(\) must return .* the sum in nats; it returns {kind}$"):
        active_objectives(train.objectives)["own"](inputs)
