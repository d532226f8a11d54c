"""bfloat16 weights with a float32 copy train as float32 weights under autocast do, nearly, and resume to the bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import TrainConfig
from pipeline.config.loading import load_recipe, save_recipe
from pipeline.planning.dry_run import plan
from stage2_student.distributed.deepspeed_config import deepspeed_config
from stage2_student.launch.launch import checked
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[3]
TRAIN_EACH = """
import shutil, sys
from pathlib import Path
from pipeline.config.loading import load_recipe
from stage2_student.training.train import train

for name in sys.argv[1:]:
    if name == "resumed":  # as it was after its second step
        shutil.rmtree("resumed/export")
        for step in (4, 6):
            shutil.rmtree(f"resumed/checkpoints/step-{step:06d}")
    train(load_recipe(Path(name + ".yaml")))
"""
MASTER = {"dtype": "bfloat16", "precision": "bf16_master"}
RUNS: dict[str, dict[str, Any]] = {
    "autocast": {"dtype": "bfloat16"},
    "master-2": {**MASTER, "deepspeed": {"zero_stage": 2}},
    "master-3": {**MASTER, "deepspeed": {"zero_stage": 3}},
    "resumed": {**MASTER, "deepspeed": {"zero_stage": 2}},
}
NOT_THE_SAME = {"tokens_per_second", "data_wait_share", "memory_bytes", "seconds"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the runs in one process: DeepSpeed takes seconds to start."""
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    make_dump(work / "dump")
    (work / "each.py").write_text(TRAIN_EACH)
    for name, train in RUNS.items():
        # Micro-batches of which several make a step, so that gradients are summed.
        recipe = make_recipe(work / "dump", work / "model", work / name, train, interface="token_marginal")
        save_recipe(recipe, work / f"{name}.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = [sys.executable, "each.py", "autocast", "master-2", "master-3"]
    subprocess.run(first, env=environment, cwd=work, check=True)
    for part in ("start", "checkpoints", "export", "lengths", "tensorboard"):
        if (work / "master-2" / part).exists():
            shutil.copytree(work / "master-2" / part, work / "resumed" / part)
    for file in (work / "master-2").iterdir():
        if file.is_file():
            shutil.copy(file, work / "resumed")
    subprocess.run([sys.executable, "each.py", "resumed"], env=environment, cwd=work, check=True)
    return work


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in NOT_THE_SAME} for line in lines]


@pytest.mark.parametrize("name", ["master-2", "master-3"])
def test_losses_are_those_under_autocast_nearly_and_fall(name: str, work: Path) -> None:
    ours, theirs = ([line["loss"] for line in metrics(work / run)] for run in (name, "autocast"))
    assert ours == pytest.approx(theirs, rel=0.03) and ours != theirs
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("name", ["master-2", "master-3"])
def test_the_copy_that_a_checkpoint_holds_is_float32_and_the_export_is_its_rounding(name: str, work: Path) -> None:
    from stage2_student.distributed.deepspeed_engine import checkpoint_weights

    copy = checkpoint_weights(work / name / "checkpoints", "step-000006")
    matrix = copy["lm.model.layers.0.mlp.up_proj.weight"]
    assert matrix.dtype == torch.float32 and not torch.equal(matrix, matrix.bfloat16().float())
    exported = load_file(work / name / "export/model.safetensors")
    assert torch.equal(exported["model.layers.0.mlp.up_proj.weight"], matrix.bfloat16())


def test_a_resumed_run_ends_with_the_same_bits(work: Path) -> None:
    assert metrics(work / "resumed") == metrics(work / "master-2")
    ours, theirs = (load_file(work / name / "export/model.safetensors") for name in ("resumed", "master-2"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "train",
    [
        MASTER,
        {**MASTER, "dtype": "float32", "deepspeed": {"zero_stage": 2}},
        {**MASTER, "deepspeed": {"zero_stage": 1}},
    ],
)
def test_other_stages_and_dtypes_are_refused_by_name(train: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train\.precision: bf16_master .*zero_stage 2 or 3 .* there are zero_stage"):
        TrainConfig.model_validate(train)


@pytest.mark.parametrize("interface", ["causal", "linear"])
def test_an_interface_with_weights_is_refused_by_a_plan(interface: str, tmp_path: Path) -> None:
    train = {**MASTER, "deepspeed": {"zero_stage": 2}}
    recipe = make_recipe(tmp_path / "dump", tmp_path / "model", tmp_path / "run", train, interface=interface)
    with pytest.raises(ValueError, match=r"bf16_master .* interface with weights .*student\.interface=token_marginal"):
        checked(recipe)


def test_deepspeed_is_told_and_a_plan_says_it() -> None:
    overrides = ["train.precision=bf16_master", "train.dtype=bfloat16", "train.deepspeed.zero_stage=2"]
    recipe = load_recipe("demo", overrides)
    assert deepspeed_config(recipe, 1)["bf16"] == {"enabled": True}
    assert deepspeed_config(recipe, 1)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not {"bf16", "data_types"} & deepspeed_config(load_recipe("demo"), 1).keys()
    assert dict(plan(recipe))["train.precision"].startswith("bfloat16 weights")
