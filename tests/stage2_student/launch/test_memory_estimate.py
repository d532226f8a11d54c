"""Memory estimates made without weights, against the student itself and DeepSpeed's own state."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config import student_config
from pipeline.config.loading import parse_recipe
from stage2_student.launch.memory_estimate import Sizes, bucket_bytes, footprint_lines, state_bytes, student_sizes
from stage2_student.model.initial_student import end_tokens, export_start, student_tokenizer
from stage2_student.training.building.student import build_student
from tests.pipeline.cli.test_app import ROOT
from tests.support.tiny import tiny_model

RECIPE = """
corpus: {{source: none.txt}}
teacher: {{model: {model}}}
dump: {{path: {path}/dump}}
student: {{model: {model}, tokenizer: bytes, start: <|endoftext|>, end: <|endoftext|>, path: {path}/run}}
train: {{max_tokens: 512, objectives: {{byte_ce: 1, kl: 1}}}}
"""
# Six layers, the first of them frozen; two steps, and what is held before the optimizer takes the second.
HELD = """
import gc, json, sys, torch
from torch import nn
from pipeline.config.loading import load_recipe
from stage2_student.distributed import deepspeed_engine as ds
from stage2_student.distributed.deepspeed_config import deepspeed_config

def held():
    gc.collect()
    storages = (value.untyped_storage() for value in gc.get_objects() if type(value) in (torch.Tensor, nn.Parameter))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

ds.start_ranks()
found = []
for stage in range(4):
    before = held()
    layers = nn.Sequential(*[nn.Linear(400, 400) for _ in range(6)])
    layers[0].requires_grad_(False)
    learns = [parameter for parameter in layers.parameters() if parameter.requires_grad]
    recipe = load_recipe("demo", [f"train.deepspeed.zero_stage={stage}", f"train.deepspeed.config={sys.argv[1]}"])
    engine = ds.start_engine(layers, deepspeed_config(recipe, 1), [(1.0, 0.0, learns)])
    for step in range(2):
        ds.backward(engine, engine(torch.ones(1, 400)).sum(), 1, 1, True)
        if step:
            found.append(held() - before)
        ds.optimizer_step(engine, 1e-4)
    engine.destroy()
    del engine, layers, learns
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student.tokenizer=null"],
        ["student.drop_layers=[1]", "student.interface=causal"],
        ["student.lora_rank=4", "student.interface=token_marginal"],
        ["student.transfer.tie=untie"],
        ["student.trained=rows", "student.interface=linear"],
    ],
)
def test_parameters_are_those_of_the_student_that_is_trained(tmp_path: Path, overrides: list[str]) -> None:
    text = RECIPE.format(model=tiny_model(tmp_path / "model"), path=tmp_path)
    recipe = parse_recipe(text, "test", overrides)
    export_start(recipe)
    tokenizer, _, _ = student_tokenizer(student_config(recipe))
    student = build_student(recipe, tokenizer, end_tokens(student_config(recipe), tokenizer))
    parameters = list(student.parameters())
    assert student_sizes(recipe) == Sizes(
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def test_each_stage_splits_what_it_says() -> None:
    sizes = Sizes(1000, 800)
    assert [state_bytes(sizes, stage, 1) for stage in range(4)] == [13_600, 16_800, 16_800, 16_800]
    assert [state_bytes(sizes, stage, 8) for stage in range(4)] == [13_600, 8_400, 5_600, 2_100]


def test_a_rank_holds_what_is_counted(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(tmp_path / "small.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), **alone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    layer = 400 * 401
    counted = [state_bytes(Sizes(6 * layer, 5 * layer), stage, 1) for stage in range(4)]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(counted, rel=0.01)


def test_the_plan_names_parameters_memory_and_the_bucket(tmp_path: Path) -> None:
    recipe = parse_recipe(
        RECIPE.format(model=tiny_model(tmp_path / "model"), path=tmp_path), "test", ["train.num_processes=2"]
    )
    lines = dict(footprint_lines(recipe))
    assert list(lines) == ["parameters", "memory, 1 rank", "memory, 2 ranks", "memory, 8 ranks"]
    assert (
        bucket_bytes(recipe.train.deepspeed) == 2_000_000_000
        and "1.86 are DeepSpeed's bucket" in lines["memory, 1 rank"]
    )
    assert torch.get_default_device() == torch.device("cpu")


def test_moments_of_8_bits_take_a_quarter_and_what_takes_less_than_is_counted_is_named(tmp_path: Path) -> None:
    sizes = Sizes(1000, 100)
    for stage, ranks in ((0, 1), (1, 2), (3, 4)):
        saved = state_bytes(sizes, stage, ranks) - state_bytes(sizes, stage, ranks, 1)
        assert saved == 6 * 100 // (ranks if stage else 1)
    text = RECIPE.format(model=tiny_model(tmp_path / "model"), path=tmp_path)
    master = ["train.precision=bf16_master", "train.dtype=bfloat16", "train.deepspeed.zero_stage=2"]
    said, plain = (dict(footprint_lines(parse_recipe(text, "test", more)))["memory, 1 rank"] for more in (master, []))
    assert "train.precision: bf16_master takes less than this" in said and "less" not in plain
