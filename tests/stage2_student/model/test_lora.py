"""Adapters: what trains, what is merged, and runs started as an operator does."""

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
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from pipeline.config import Recipe, StudentConfig
from pipeline.config.loading import load_recipe, save_recipe
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.model.initial_student import load_start
from stage2_student.model.lora import add_adapters, mixture_remarks
from stage2_student.runs.export import export
from stage2_student.runs.folder import adapters_by_peft
from stage2_student.runs.identity import RunVersions, run_identity
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model
from tests.zoo.models import tiny_model as zoo_model

ROOT = Path(__file__).parents[3]
MERGES = ["t h", "o n", "Ġ t"]
TOKENS_BL = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
# Each argument is a recipe. One that is named with the steps to forget goes on in a copy of another run, without its
# last checkpoints.
TRAIN_EACH = """
import shutil, sys
from pathlib import Path
from pipeline.config.loading import load_recipe
from stage2_student.training.train import train

for argument in sys.argv[1:]:
    name, _, rest = argument.partition(":")
    if rest:
        other, *steps = rest.split(",")
        shutil.copytree(other, name)
        shutil.rmtree(Path(name, "export"))
        for step in steps:
            shutil.rmtree(Path(name, "checkpoints", "step-" + step.zfill(6)))
    train(load_recipe(name + ".yaml"))
"""


def student_of(**values: Any) -> StudentConfig:
    return StudentConfig(model="m", path="p", **values)


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomise(model: Any) -> None:
    """Adapters start as no change; here they are one."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)


@pytest.mark.parametrize("alpha", [None, 4.0])
def test_merged_weights_are_the_frozen_ones_plus_the_product_and_give_the_same_logits(
    model: Path, alpha: float | None
) -> None:
    plain, lm = load_start(model, False), load_start(model, False)
    adapted = add_adapters(lm, student_of(lora_rank=8, lora_alpha=alpha), False)
    tokens_BL = torch.tensor([[268, 3, 77, 200, 41]])
    torch.testing.assert_close(lm(tokens_BL).logits, plain(tokens_BL).logits)
    randomise(lm)
    before_BLV = lm(tokens_BL).logits
    assert not torch.allclose(before_BLV, plain(tokens_BL).logits, atol=0.01)
    layer = lm.model.layers[1].mlp.up_proj
    product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = plain.model.layers[1].mlp.up_proj.weight.double() + (alpha or 8) / 8 * product
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(tokens_BL).logits, before_BLV, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_adapters_alone_train_and_embeddings_where_the_tokenizer_moved(model: Path) -> None:
    stays, moves, told = (load_start(model, False) for _ in range(3))
    add_adapters(stays, student_of(lora_rank=2), tokenizer_moved=False)
    add_adapters(moves, student_of(lora_rank=2), tokenizer_moved=True)
    add_adapters(told, student_of(lora_rank=2, lora_embeddings=False), tokenizer_moved=True)
    assert trained_names(stays) and all("lora_" in name for name in trained_names(stays))
    assert trained_names(moves) - trained_names(stays) == {"model.embed_tokens.weight"}
    assert moves.lm_head.weight is moves.model.embed_tokens.weight
    assert trained_names(told) == trained_names(stays)
    beside = {name.split(".lora_")[0].rpartition(".")[2] for name in trained_names(stays)}
    assert beside == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_untied_head_trains_with_the_embeddings(model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=False).save_pretrained(tmp_path)
    lm = load_start(tmp_path, False)
    add_adapters(lm, student_of(lora_rank=2), tokenizer_moved=True)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= trained_names(lm)


def test_targets_are_chosen_by_name_and_a_name_that_is_not_there_is_refused(model: Path) -> None:
    lm = load_start(model, False)
    add_adapters(lm, student_of(lora_rank=2, lora_targets=["q_proj"]), False)
    assert len(trained_names(lm)) == 2 * 2 and all("q_proj" in name for name in trained_names(lm))
    with pytest.raises(ValueError, match=r"names lm_head, w1; the linear layers .* are down_proj, gate_proj"):
        add_adapters(load_start(model, False), student_of(lora_rank=2, lora_targets=["w1", "lm_head", "q_proj"]), False)


def test_layers_that_are_one_weight_get_no_adapters_of_their_own() -> None:
    with pytest.raises(
        ValueError, match=r"layers\.1\.\S+ and \S+layers\.3\.\S+ are one weight, .* leave \w+ and the others"
    ):
        add_adapters(zoo_model("zamba2", 300), student_of(lora_rank=4), False)
    add_adapters(zoo_model("zamba2", 300), student_of(lora_rank=4, lora_targets=["in_proj"]), False)


def mixtures() -> dict[str, Any]:
    """Return tiny mixtures of experts: their weights (experts, out, in), and transposed."""
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
    return {
        "mixtral": MixtralConfig(**sizes, num_local_experts=4),
        "qwen3_moe": Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=24, head_dim=16),
        "gpt_oss": GptOssConfig(**sizes, num_local_experts=4, head_dim=16, layer_types=["full_attention"] * 2),
    }


EXPERTS = ("experts.down_proj", "experts.gate_up_proj")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_that_are_named_learn_and_are_merged_into_what_the_adapters_computed(family: str) -> None:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(mixtures()[family]).eval()
    names, tokens_BL = lm.state_dict().keys(), torch.randint(0, 300, (2, 9))
    plain_BLV = lm(tokens_BL).logits
    adapted = add_adapters(lm, student_of(lora_rank=4, lora_targets=["q_proj", *EXPERTS]), False)
    torch.testing.assert_close(lm(tokens_BL).logits, plain_BLV)
    randomise(lm)
    before_BLV = lm(tokens_BL).logits
    assert not torch.allclose(before_BLV, plain_BLV, atol=0.01)
    before_BLV.square().mean().backward()
    grads = {name: weight.grad for name, weight in lm.named_parameters() if weight.requires_grad}
    assert len(grads) == 2 * 2 * (1 + len(EXPERTS)) and all(grad is not None and grad.any() for grad in grads.values())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens_BL).logits, before_BLV, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == names


@pytest.mark.parametrize(
    "family", ["deepseek_v2", "glm4_moe", "qwen3_next", "afmoe", "llama4_text", "phimoe", "falcon_h1"]
)
def test_adapters_stand_beside_the_linear_layers_and_nothing_else_whatever_their_names(family: str) -> None:
    lm = zoo_model(family, 300)
    plain_BLV = lm(TOKENS_BL).logits
    linear = {
        name
        for name, module in lm.named_modules()
        if type(module) is torch.nn.Linear and module is not lm.get_output_embeddings()
    }
    if family == "falcon_h1":  # its kernels take the weight of out_proj itself, past an adapter
        linear = {name for name in linear if not name.endswith(".out_proj")}
    else:
        experts, *_ = mixture_remarks(lm, student_of(lora_rank=4))
        router = {"llama4_text": "router.weight", "phimoe": "router.weight", "afmoe": None}.get(family, "gate.weight")
        assert experts.endswith(f"Nor does what chooses among them learn ({router})") == (router is not None)
    adapted = add_adapters(lm, student_of(lora_rank=4), False)
    assert {name.split(".lora_")[0] for name in trained_names(lm)} == linear
    torch.testing.assert_close(lm(TOKENS_BL).logits, plain_BLV)
    randomise(lm)
    before_BLV = lm(TOKENS_BL).logits
    assert not torch.allclose(before_BLV, plain_BLV, atol=0.01)
    torch.testing.assert_close(adapted.merge_and_unload()(TOKENS_BL).logits, before_BLV, rtol=1e-4, atol=1e-4)


def test_a_run_that_began_with_peft_s_choice_of_adapters_goes_on_with_them(work: Path, tmp_path: Path) -> None:
    lm = zoo_model("deepseek_v2", 300)
    add_adapters(lm, student_of(lora_rank=4), False, by_peft=True)
    beside = {name.split(".lora_")[0] for name in trained_names(lm)}
    assert any(".experts" in name for name in beside) and not any("gate_proj" in name for name in beside)
    shutil.copytree(work / "whole", tmp_path / "run")
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert identity.pop("adapters") == 2 and not adapters_by_peft(tmp_path / "run")
    (tmp_path / "run" / "identity.json").write_text(json.dumps(identity))
    assert adapters_by_peft(tmp_path / "run") and not adapters_by_peft(tmp_path / "new")
    recipe, manifest = lora_recipe(work, "whole"), Manifest.load(work / "dump")
    ours = run_identity(
        recipe,
        manifest,
        identity["student"]["tokenizer_sha256"],
        SpecialIds(0, (0,)),
        versions=RunVersions(adapters_by_peft=True),
    )
    assert "adapters" not in ours and run_identity(recipe, manifest, "s", SpecialIds(0, (0,)))["adapters"] == 2
    began, _ = mixture_remarks(zoo_model("mixtral", 300), student_of(lora_rank=4), by_peft=True)
    assert began.startswith("this run goes on with the adapters that it began with")


def test_what_a_mixture_of_experts_does_not_learn_is_said_by_name(model: Path) -> None:
    lm = AutoModelForCausalLM.from_config(mixtures()["mixtral"])
    experts, balance = mixture_remarks(lm, student_of(lora_rank=4))
    assert experts.startswith(
        "the experts get no adapters for experts.down_proj, experts.gate_up_proj, and learn nothing there"
    )
    assert "router's auxiliary loss (router_aux_loss_coef 0.001)" in balance
    assert list(mixture_remarks(lm, student_of(lora_rank=4, lora_targets=["q_proj", *EXPERTS]))) == [balance]
    assert list(mixture_remarks(lm, student_of())) == [balance]  # in full the experts learn
    assert not list(mixture_remarks(load_start(model, False), student_of(lora_rank=4)))
    assert not list(mixture_remarks(zoo_model("recurrent_gemma", 300), student_of(lora_rank=4)))  # gates of three axes
    experts, *_ = mixture_remarks(zoo_model("jetmoe", 300), student_of(lora_rank=4))
    assert "no adapters for input_linear.weight, output_linear.weight, and" in experts


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make runs with adapters and a moved tokenizer, on two ranks at each splitting stage, then on one rank.

    One of the latter continues from its own second step, the other where two ranks were before their last checkpoint.

    DeepSpeed takes seconds to start: one torchrun and one process do them all.
    """
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    tiny_model(work / "other", merges=MERGES)
    make_dump(work / "dump")
    (work / "each.py").write_text(TRAIN_EACH)
    stages = {"whole": 0, "resumed": 0, "again": 3} | {f"two-{stage}": stage for stage in (1, 2, 3)}
    for name, stage in stages.items():
        save_recipe(lora_recipe(work, name, deepspeed={"zero_stage": stage}), work / f"{name}.yaml")
    two_ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train_each(work, *two_ranks, "each.py", "two-1", "two-2", "two-3")
    train_each(work, "each.py", "whole", "resumed:whole,4,6", "again:two-3,6")
    return work


def lora_recipe(work: Path, name: str, **train: Any) -> Recipe:
    return make_recipe(
        work / "dump", work / "model", work / name, train, tokenizer=str(work / "other"), lora_rank=4, lora_alpha=8.0
    )


def train_each(work: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], env=environment, cwd=work, check=True)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_adapters_embeddings_and_interface_and_exports_plain_weights(work: Path) -> None:
    run = work / "whole"
    assert losses(run)[-1] < losses(run)[0]
    started, exported = (load_file(run / name / "model.safetensors") for name in ("start", "export"))
    assert started.keys() == exported.keys()
    frozen = {name for name in started if torch.equal(started[name], exported[name])}
    assert frozen == {name for name in started if "norm" in name}
    from stage2_student.distributed.deepspeed_engine import checkpoint_weights

    weights = checkpoint_weights(run / "checkpoints", "step-000006")
    assert weights["interface.maps.weight"].any()
    assert not any("base_layer" in name for name in weights)


def test_the_export_gives_the_logits_of_the_model_with_its_adapters(work: Path) -> None:
    from stage2_student.distributed.deepspeed_engine import checkpoint_weights

    lm = load_start(work / "whole" / "start", False)
    add_adapters(lm, lora_recipe(work, "whole").student, tokenizer_moved=True)  # type: ignore[arg-type]
    weights = checkpoint_weights(work / "whole" / "checkpoints", "step-000006")
    lm.load_state_dict({n.removeprefix("lm."): w for n, w in weights.items() if n.startswith("lm.")}, strict=False)
    exported = AutoModelForCausalLM.from_pretrained(work / "whole" / "export")
    tokens_BL = torch.tensor([[258, 3, 77, 200, 41]])
    torch.testing.assert_close(exported(tokens_BL).logits, lm(tokens_BL).logits, rtol=1e-4, atol=1e-4)


def test_any_checkpoint_is_exported_and_one_that_is_not_there_is_refused(work: Path, tmp_path: Path) -> None:
    early = load_file(export(work / "whole", tmp_path / "early", step=2) / "model.safetensors")
    last = load_file(work / "whole" / "export" / "model.safetensors")
    assert json.loads((tmp_path / "early" / "distilled.json").read_text()) == {"step": 2, "newest": 6}
    assert not torch.equal(early["model.embed_tokens.weight"], last["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match=r"no complete checkpoint of step 3; there are \[2, 4, 6\]"):
        export(work / "whole", tmp_path / "never", step=3)


def test_a_resumed_run_ends_with_the_same_bits(work: Path) -> None:
    assert losses(work / "resumed") == losses(work / "whole")
    ours, theirs = (load_file(work / name / "export" / "model.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_train_what_one_does(work: Path, zero_stage: int) -> None:
    name = f"two-{zero_stage}"
    assert losses(work / name) == pytest.approx(losses(work / "whole"), rel=1e-5)
    two, one = (load_file(work / run / "export" / "model.safetensors") for run in (name, "whole"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


def test_frozen_weights_that_are_split_too_stay_as_they_are_when_one_rank_reads_the_checkpoint_of_two(
    work: Path,
) -> None:
    again, two = (load_file(work / run / "export" / "model.safetensors") for run in ("again", "two-3"))
    for key in two:
        torch.testing.assert_close(again[key], two[key], rtol=1e-3, atol=1e-5)
    frozen = [key for key in two if "norm" in key]
    assert frozen and all(torch.equal(again[key], two[key]) for key in frozen)


@pytest.mark.parametrize("name", ["paper_bpe_transfer", "paper_byte_transfer", "paper_maths"])
def test_the_papers_recipes_train_adapters_of_rank_64(name: str) -> None:
    student = load_recipe(name).student
    assert student is not None and student.lora_rank == 64
