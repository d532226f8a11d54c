"""One dump, many students; many teachers, one student: bytes are what all tokenizers have in common."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import PlacementConfig, Recipe, TeacherConfig
from pipeline.config.loading import save_recipe
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.manifest import Manifest
from schemas.shard import read_shard
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.engines.base import EngineRequest, ListingEngine
from stage1_teacher.engines.registry import open_engine
from stage2_student.data.mix import Mix
from stage2_student.data.reader import DumpReader
from stage2_student.model.untie import is_tied
from tests.support import families
from tests.support.tiny import END_OF_TEXT, tiny_model

ROOT = Path(__file__).parents[2]
TEXTS = ["the thing and é", "banding", "a king's ring, in the end", "and another one: ünder 7 hills", "the " * 30]
OTHER_MERGES = ["o n", "t h", "Ġ t", "e n", "i n", "in g"]
TRAIN_EACH = (
    "import sys\n"
    "from pipeline.config.loading import load_recipe\n"
    "from stage2_student.training.train import train\n"
    "for path in sys.argv[1:]: train(load_recipe(path))\n"
)
MARKS = {"gpt2": (END_OF_TEXT, END_OF_TEXT), "mistral-v1": ("<s>", "</s>"), "bytes": (END_OF_TEXT, END_OF_TEXT)}


def dump_recipe(work: Path, teacher: str, **values: Any) -> Recipe:
    corpus = work / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Recipe.model_validate(
        {
            "corpus": {"source": str(corpus)},
            "teacher": {
                "model": str(work / teacher), "engine": "transformers", "dtype": "float32", "max_tokens": 64,
                "overlap_tokens": 8, "start": END_OF_TEXT, "end": [END_OF_TEXT],
            },
            "dump": {"path": str(work / f"dump-{teacher}"), "top_k": 256, "min_prob": 0, **values},
        }
    )  # fmt: skip


def student_recipe(work: Path, name: str, **student: Any) -> Recipe:
    values = dump_recipe(work, "one").model_dump(mode="json")
    train = {"steps": 1, "batch_tokens": 60, "warmup_steps": 0, "lr": 1e-3, "dtype": "float32", "max_tokens": 512}
    return Recipe.model_validate(
        values
        | {
            "student": {"model": str(work / "one"), "path": str(work / name), "interface": "linear", **student},
            "train": train,
        }
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make dumps of two teachers with different tokenizers, and students of them.

    The students are trained one after another in one process.
    """
    work = tmp_path_factory.mktemp("many")
    tiny_model(work / "one")
    tiny_model(work / "two", seed=1, merges=OTHER_MERGES)
    run_teacher(dump_recipe(work, "one", shard_bytes=60))
    run_teacher(dump_recipe(work, "two", shard_bytes=80))
    recipes = [
        student_recipe(work, name, tokenizer=families.FAMILIES[name].source, start=MARKS[name][0], end=MARKS[name][1])
        for name in MARKS
    ]
    both = [{"path": str(work / "dump-one"), "weight": 3}, {"path": str(work / "dump-two")}]
    recipes.append(student_recipe(work, "both", dumps=both, mix="geometric", lora_rank=4))
    own_head = {"output": "first_likelihood", "tie": "untie"}
    cut = {"drop_layers": [0], "lora_rank": 4, "tokenizer": str(work / "two"), "transfer": own_head}
    recipes.append(student_recipe(work, "cut", **cut))
    recipes.append(student_recipe(work, "rows", trained="rows", tokenizer=str(work / "two")))
    for recipe in recipes:
        assert recipe.student is not None
        save_recipe(recipe, Path(f"{recipe.student.path}.yaml"))
    paths = [f"{recipe.student.path}.yaml" for recipe in recipes if recipe.student is not None]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", TRAIN_EACH, *paths], env=environment, cwd=work, check=True)
    return work


@pytest.mark.parametrize("name", [*MARKS, "both", "cut", "rows"])
def test_every_student_exports_a_plain_model_with_its_tokenizer_and_generation_config(work: Path, name: str) -> None:
    export = work / name / "export"
    summary = json.loads((work / name / "summary.json").read_text())
    assert summary["step"] == 1 and summary["left_out"] == {} and summary["num_bytes"] > 0
    start, exported = (AutoModelForCausalLM.from_pretrained(folder) for folder in (work / name / "start", export))
    before, after = start.state_dict(), exported.state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    tokenizer = ByteTokenizer.load(str(export))
    wanted = (
        families.load(name) if name in MARKS else ByteTokenizer.load(str(work / ("one" if name == "both" else "two")))
    )
    assert tokenizer.sha256 == wanted.sha256
    assert exported.config.vocab_size == len(tokenizer.token_bytes)
    assert (export / "generation_config.json").exists()
    end = MARKS.get(name, (END_OF_TEXT, END_OF_TEXT))[1]
    assert exported.generation_config.eos_token_id == tokenizer.token_id(end)
    ids_BL = AutoTokenizer.from_pretrained(export)("the thing", return_tensors="pt")["input_ids"]
    assert exported.generate(ids_BL, max_new_tokens=2, do_sample=False).shape[1] > ids_BL.shape[1]


def test_a_checkpoint_holds_adapters_and_interface_alone_where_nothing_else_trains(work: Path) -> None:
    from stage2_student.distributed.deepspeed_engine import checkpoint_weights

    names = checkpoint_weights(work / "both" / "checkpoints", "step-000001").keys()
    assert names and all("lora_" in name or name.startswith("interface.") for name in names)  # no tied head either
    start, exported = (
        AutoModelForCausalLM.from_pretrained(work / "both" / part).state_dict() for part in ("start", "export")
    )
    assert torch.equal(start["model.embed_tokens.weight"], exported["model.embed_tokens.weight"])


def test_a_student_whose_rows_alone_learn_keeps_its_body(work: Path) -> None:
    from stage2_student.distributed.deepspeed_engine import checkpoint_weights

    start, exported = (
        AutoModelForCausalLM.from_pretrained(work / "rows" / part).state_dict() for part in ("start", "export")
    )
    changed = {name for name in start if not torch.equal(start[name], exported[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    names = checkpoint_weights(work / "rows" / "checkpoints", "step-000001").keys()
    assert all("embed_tokens" in name or "lm_head" in name or name.startswith("interface.") for name in names)


def test_a_byte_level_student_has_a_token_for_each_byte(work: Path) -> None:
    summary = json.loads((work / "bytes" / "summary.json").read_text())
    assert summary["tokens"] == summary["num_bytes"] + summary["documents"]  # and the start token of each


def stored_distributions(dump: Path) -> dict[str, np.ndarray]:
    """Return document -> P x 256 of a dump that stores every symbol."""
    found = {}
    for shard in Manifest.load(dump).shards:
        for record in read_shard(shard.path(dump)):
            assert (record.entry_counts == 256).all()
            probs_PV = np.empty((record.num_positions, 256))
            position = np.repeat(np.arange(record.num_positions), 256)
            probs_PV[position, record.symbols] = np.exp(record.logprobs.astype(np.float64))
            found[record.document.decode()] = probs_PV
    return found


@pytest.mark.parametrize("how", ["arithmetic", "geometric"])
def test_teachers_of_different_tokenizers_mix_to_the_mean_of_what_their_dumps_hold(work: Path, how: Any) -> None:
    reader = DumpReader(work / "dump-one", 0, [work / "dump-two"], Mix.of([3, 1], how))
    seen = {}
    for record, after in reader.records():
        if after.epoch:
            break
        seen[record.document.decode()] = record
    assert set(seen) == set(TEXTS) and not reader.remarks
    seen.pop(TEXTS[-1])  # longer than the context of the second teacher, which cut it
    ones, twos = (stored_distributions(work / name) for name in ("dump-one", "dump-two"))
    for text, record in seen.items():
        one, two = ones[text], twos[text]
        if how == "arithmetic":
            expected_PV = 0.75 * one + 0.25 * two
        else:
            expected_PV = one**0.75 * two**0.25
            expected_PV /= expected_PV.sum(axis=1, keepdims=True)
        position = np.repeat(np.arange(record.num_positions), 256)
        found = np.exp(record.logprobs.astype(np.float64))
        np.testing.assert_allclose(found, expected_PV[position, record.symbols], rtol=1e-4)


def test_vllm_loads_a_student_with_merged_adapters_fewer_layers_and_a_head_of_its_own(work: Path) -> None:
    export = work / "cut" / "export"
    exported: Any = AutoModelForCausalLM.from_pretrained(export)
    assert exported.config.num_hidden_layers == 1 and not is_tied(exported)
    assert json.loads((work / "cut" / "summary.json").read_text())["transfer"]["folded_bias"]
    tokens = [262, 3, 77, 200, 41]
    config = TeacherConfig(model=str(export), dtype="float32", max_tokens=64, overlap_tokens=8)
    placed = PlacementConfig(engine_batch_tokens=16)
    tokenizer = ByteTokenizer.load(str(export))
    assert tokenizer.default_end is not None
    engine = open_engine(EngineRequest(str(export), config, placed, tokenizer, ends=(tokenizer.default_end,)))
    assert not isinstance(engine, ListingEngine)
    found_LV = engine.own_logprobs(tokens)
    engine.close()
    with torch.no_grad():
        expected_LV = exported(torch.tensor([tokens])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found_LV, expected_LV, rtol=1e-3, atol=1e-3)
