"""Weight decay shrinks matrices alone, in every ZeRO stage; a run that decayed everything goes on doing so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.config import TrainConfig
from stage2_student.model.parameter_groups import parameter_groups
from stage2_student.model.student import Student
from tests.zoo.models import tiny_model

ROOT = Path(__file__).parents[3]
# Steps on a gradient of zero: what is left of each weight, by ZeRO stage.
SHRINK = """
import json, sys
import torch
from torch import nn
from pipeline.config.loading import load_recipe
from stage2_student.distributed import deepspeed_engine as ds
from stage2_student.distributed.deepspeed_config import deepspeed_config

ds.start_ranks()
left = []
for stage in range(4):
    layer = nn.Linear(30, 20)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    recipe = load_recipe("demo", [f"train.deepspeed.zero_stage={stage}", "train.weight_decay=0.5"])
    groups = [(1.0, 0.5, [layer.weight]), (2.0, 0.0, [layer.bias])]
    engine = ds.start_engine(layer, deepspeed_config(recipe, 1), groups)
    for _ in range(2):
        ds.backward(engine, engine(torch.zeros(1, 30)).sum() * 0, 1, 1, True)
        ds.optimizer_step(engine, 0.1)
    weight, bias = (
        [layer.weight, layer.bias]
        if stage < 3
        else [parameter.ds_tensor for parameter in (layer.weight, layer.bias)]
    )
    left.append([float(weight.min()), float(weight.max()), float(bias.min()), float(bias.max())])
    engine.destroy()
print(json.dumps(left))
"""


def student(family: str, interface: nn.Module | None = None, **train: object) -> Student:
    objectives = {"ce": 1.0, "byte_ce": float(interface is not None), "kl": 0.0}
    config = TrainConfig.model_validate({"dtype": "float32", "objectives": objectives, "weight_decay": 0.1, **train})
    return Student(tiny_model(family, 300), interface, config)  # type: ignore[arg-type]


def decayed(of: Student) -> dict[str, bool]:
    """Return whether each parameter decays, by name."""
    by_id = {id(p): bool(decay) for _, decay, parameters in parameter_groups(of) for p in parameters}
    return {name: by_id[id(parameter)] for name, parameter in of.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere", "gpt_oss", "mamba", "qwen3_moe", "gemma2", "olmo2"])
def test_matrices_decay_and_embeddings_norms_and_biases_do_not(family: str) -> None:
    found = decayed(student(family))
    spared = ("embed", "wte", "wpe", "norm", "bias", "ln_", "A_log", ".D", "sinks")
    assert {name for name, decays in found.items() if not decays} == {n for n in found if any(s in n for s in spared)}
    assert any(found.values())


def test_a_head_of_its_own_and_the_interfaces_matrices_decay_but_a_head_that_is_the_embedding_does_not() -> None:
    interface = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    found = decayed(student("llama", interface))
    assert {name for name in found if name.startswith("interface.") and found[name]} == {"interface.1.weight"}
    apart = Student(tiny_model("llama", 300, tie_word_embeddings=False), None, student("llama").train_config)
    assert decayed(apart)["lm.lm_head.weight"] and not decayed(apart)["lm.model.embed_tokens.weight"]
    tied = Student(tiny_model("llama", 300, tie_word_embeddings=True), None, student("llama").train_config)
    assert "lm.lm_head.weight" not in decayed(tied) and not decayed(tied)["lm.model.embed_tokens.weight"]


def test_groups_are_those_of_the_first_release_without_a_decay_and_where_everything_decays() -> None:
    for train in ({"weight_decay": 0.0}, {"decay": "all"}):
        groups = parameter_groups(student("gpt2", embedding_lr=2.0, **train))
        assert [group.factor for group in groups] == [2.0, 1.0]
        assert {group.weight_decay for group in groups} == {train.get("weight_decay", 0.1)}
    assert len(parameter_groups(student("gpt2", embedding_lr=2.0))) == 3


def test_a_step_on_no_gradient_shrinks_a_group_by_its_decay_in_every_zero_stage(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHRINK]
    said = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    left = torch.tensor(json.loads(said.splitlines()[-1]))
    expected = torch.tensor([(1 - 0.1 * 0.5) ** 2] * 2 + [1.0] * 2).expand(4, 4)
    torch.testing.assert_close(left, expected)
