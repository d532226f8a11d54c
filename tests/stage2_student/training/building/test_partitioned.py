"""Under ZeRO stage 3 one rank reads the start model, and the run is the same to the bit as if all had.

DeepSpeed takes seconds to start: one torchrun of two ranks and one process make all runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.loading import save_recipe
from stage2_student.model.initial_student import load_start
from stage2_student.training.building.partitioned import empty_start
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model
from tests.zoo.models import tiny_model as zoo_model

ROOT = Path(__file__).parents[4]
# Runs named `read-...` are made as before: every rank reads the weights. In the others rank 0 alone does.
TRAIN_EACH = """
import os, sys
from pathlib import Path
from pipeline.config.loading import load_recipe
from stage2_student.training import train
from stage2_student.training.building import student

load_start, reads_weights = student.load_start, train.reads_weights

def load_on_rank_0(*arguments):
    assert int(os.environ.get("RANK", 0)) == 0, "another rank reads the weights"
    return load_start(*arguments)

for name in sys.argv[1:]:
    every = name.startswith("read-")
    train.reads_weights = (lambda *_: True) if every else reads_weights
    student.load_start = load_start if every else load_on_rank_0
    train.train(load_recipe(Path(name + ".yaml")))
"""
MERGES = ["o n", "t h", "Ġ t", "e n", "i n", "in g"]
NOT_THE_SAME = {"tokens_per_second", "data_wait_share", "memory_bytes", "seconds"}
# A moved vocabulary with a head of its own and fewer layers; adapters and an interface with weights; bfloat16 weights.
KINDS: dict[str, dict[str, Any]] = {
    "moved": {"transfer": {"output": "first_likelihood", "tie": "untie"}, "drop_layers": [0]},
    "adapted": {"lora_rank": 4, "interface": "causal"},
    "master": {"interface": "token_marginal"},
}
MASTER = {"dtype": "bfloat16", "precision": "bf16_master"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    tiny_model(work / "other", merges=MERGES)
    make_dump(work / "dump")
    (work / "each.py").write_text(TRAIN_EACH)
    train = {"steps": 3, "save_every": 3, "deepspeed": {"zero_stage": 3}, "embedding_lr": 2.0}
    names = [f"{how}-{kind}" for how in ("one", "read", "two") for kind in KINDS]
    for name in names:
        student = {"tokenizer": str(work / "other"), **KINDS[name.partition("-")[2]]}
        own = train | (MASTER if name.endswith("master") else {})
        recipe = make_recipe(work / "dump", work / "model", work / name, own, **student)
        save_recipe(recipe, work / f"{name}.yaml")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for how, started in (("one", []), ("", ranks)):
        made = [name for name in names if name.startswith("one") == bool(how)]
        subprocess.run([sys.executable, *started, "each.py", *made], env=environment, cwd=work, check=True)
    return work


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in NOT_THE_SAME} for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_of_which_one_reads_the_weights_train_to_the_bit_as_if_both_did(kind: str, work: Path) -> None:
    assert metrics(work / f"two-{kind}") == metrics(work / f"read-{kind}")
    ours, theirs = (load_file(work / f"{how}-{kind}" / "export/model.safetensors") for how in ("two", "read"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["moved", "adapted"])
def test_two_ranks_export_what_one_does(kind: str, work: Path) -> None:
    two, one = (load_file(work / f"{how}-{kind}" / "export/model.safetensors") for how in ("two", "one"))
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    started = load_file(work / f"one-{kind}" / "start/model.safetensors")
    assert any(not torch.equal(one[name], started[name]) for name in one)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "mamba", "qwen3_moe", "deepseek_v3", "phi3", "falcon_h1"]
)
def test_a_start_without_values_has_the_weights_ties_and_computed_buffers_of_one_that_is_read(
    family: str, tmp_path: Path
) -> None:
    zoo_model(family, 300).save_pretrained(tmp_path)
    read, empty = load_start(tmp_path, False), empty_start(tmp_path, False)
    every = {"remove_duplicate": False}
    for (name, weight), (theirs, other) in zip(
        empty.named_parameters(**every), read.named_parameters(**every), strict=True
    ):
        assert name == theirs and weight.is_meta and weight.shape == other.shape and weight.dtype == other.dtype
    ties = [
        {name for name, p in lm.named_parameters(**every) if p is lm.get_input_embeddings().weight}
        for lm in (read, empty)
    ]
    assert ties[0] == ties[1]
    computed = {name: buffer for name, buffer in read.named_buffers() if name not in read.state_dict()}
    assert computed.keys() == {name for name, _ in empty.named_buffers() if name not in read.state_dict()}
    for name, buffer in computed.items():
        torch.testing.assert_close(empty.get_buffer(name), buffer)
