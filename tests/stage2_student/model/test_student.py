"""The student computes only what has a weight, and only where the interface's positions are valid."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from pipeline.config import TrainConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate
from stage2_student.interfaces import ByteScores, Head, Interface
from stage2_student.losses.alm import chunk_tensors
from stage2_student.losses.divergences import class_divergence, symbol_cross_entropy
from stage2_student.model.initial_student import export_start, load_start
from stage2_student.model.parameter_groups import parameter_groups
from stage2_student.model.student import Student
from stage2_student.training.building.student import build_student
from tests.support.small_dumps import make_recipe, make_record, make_text
from tests.zoo.models import tiny_model

END_ID = 268


class HalfSure(Interface):
    """An interface of random logits; every other position is valid, and every token costs 3 nats."""

    max_bytes = None

    def forward(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        count = len(batch.state_P)
        logits_PV = torch.randn(count, 256, generator=torch.Generator().manual_seed(0))
        tokens = int((batch.labels_BL >= 0).sum())
        return ByteScores(logits_PV, torch.arange(count) % 2 == 0, torch.full((tokens,), 3.0, requires_grad=True))


@pytest.fixture(scope="module")
def batch(model: Path) -> MicroBatch:
    rng = np.random.default_rng(0)
    records = [make_record(f"d{i}", make_text(rng, 8), rng) for i in range(3)]
    documents = encode_records(records, ByteTokenizer.load(str(model)), 512)
    usable = [document for document in documents if isinstance(document, Encoded)]
    micro = collate([make_example(document, END_ID, END_ID, None, Masks(1.0, 0.05)) for document in usable])
    return replace(micro, extra=chunk_tensors(usable, micro.layout, 0.1))


def train_config(**objectives: float) -> TrainConfig:
    weights = {"ce": 0.0, "byte_ce": 0.0, "kl": 0.0, "alm": 0.0} | objectives
    return TrainConfig.model_validate({"dtype": "float32", "objectives": weights})


def sums(student: Student, batch: MicroBatch) -> dict[str, Any]:
    nats, values = student(batch)
    return {"nats": nats, **dict(zip(student.sums_names, values.tolist(), strict=True))}


def test_positions_that_the_interface_does_not_stand_by_feed_no_loss_and_are_counted(
    model: Path, batch: MicroBatch
) -> None:
    student = Student(load_start(model, False), HalfSure(), train_config(byte_ce=1.0, kl=0.5))
    found = sums(student, batch)
    logits_PV, counted_P, _ = HalfSure()(torch.empty(0), batch, torch.nn.Identity())
    byte_ce = symbol_cross_entropy(logits_PV, batch.symbols_P, counted_P)
    kl_P = counted_P & batch.kl_P
    kl = class_divergence(logits_PV, batch.entry_symbols_PE, batch.entry_logprobs_PE, kl_P)
    assert found["nats"].item() == pytest.approx(float(byte_ce + 0.5 * kl), rel=1e-6)
    assert "ce" not in found and "alm" not in found
    assert found["positions"] == len(counted_P) and found["uncounted"] == len(counted_P) // 2
    assert found["kl_positions"] == int(kl_P.sum()) < len(counted_P) - found["uncounted"]


def test_token_nats_that_the_interface_knows_are_used_and_the_head_is_not_applied_again(
    model: Path, batch: MicroBatch
) -> None:
    student = Student(load_start(model, False), HalfSure(), train_config(ce=2.0, byte_ce=1.0))
    student.lm.get_output_embeddings().forward = None  # would fail
    found = sums(student, batch)
    assert found["ce"] == 3.0 * int((batch.labels_BL >= 0).sum())
    assert found["nats"].item() == pytest.approx(2 * found["ce"] + found["byte_ce"])


@pytest.mark.parametrize(("objectives", "names"), [({"ce": 1.0}, ("ce",)), ({"alm": 1.0}, ("ce", "alm"))])
def test_a_run_without_byte_objectives_has_no_interface(
    objectives: dict[str, float], names: tuple[str, ...], model: Path, batch: MicroBatch, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, model, tmp_path, {"objectives": train_config(**objectives).objectives.model_dump()})
    (tmp_path / "start").symlink_to(model)
    tokenizer = ByteTokenizer.load(str(model))
    student = build_student(recipe, tokenizer, SpecialIds(END_ID, (END_ID,)))
    assert student.interface is None and student.sums_names == names
    found = sums(student, batch)
    assert found["nats"].item() == pytest.approx(found[names[-1]], rel=1e-6) and found["nats"].requires_grad


def test_embedding_and_interface_learn_at_multiples_of_the_rate_and_frozen_weights_not_at_all(
    model: Path, tmp_path: Path
) -> None:
    train = {"embedding_lr": 5.0, "interface_lr": 3.0}
    (tmp_path / "start").symlink_to(model)
    recipe = make_recipe(tmp_path, model, tmp_path, train, interface="causal")
    student = build_student(recipe, ByteTokenizer.load(str(model)), SpecialIds(END_ID, (END_ID,)))
    frozen = student.lm.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    rates = {id(parameter): rate for rate, _, ps in parameter_groups(student) for parameter in ps}
    assert rates.pop(id(student.lm.get_input_embeddings().weight)) == 5.0
    rates.pop(id(student.lm.get_output_embeddings().weight), None)  # untied, it is one of its own
    assert student.interface is not None
    assert all(rates.pop(id(parameter)) == 3.0 for parameter in student.interface.parameters())
    assert set(rates.values()) == {1.0} and id(frozen) not in rates


@pytest.mark.parametrize("family", ["recurrent_gemma", "xlstm", "modernbert-decoder"])
def test_a_family_that_does_more_to_its_logits_than_we_know_is_refused_by_name(family: str) -> None:
    student = Student(tiny_model(family, 300), None, train_config(ce=1.0))
    with pytest.raises(
        ValueError, match=rf"ForCausalLM \({family}\): .* training does not support .*\. Use a student\.model"
    ):
        student.find_logit_scale()


def test_a_family_whose_trunk_gives_no_hidden_states_is_refused_by_name() -> None:
    student = Student(tiny_model("llama4_text", 300), None, train_config(ce=1.0))
    with pytest.raises(
        ValueError, match=r"Llama4ForCausalLM \(llama4_text\): it has no separate trunk.*another family"
    ):
        student.find_logit_scale()


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt2", "phi", "qwen3_moe", "mamba", "cohere", "granite", "falcon_h1"]
)
def test_a_family_whose_logits_are_its_heads_products_is_not(family: str) -> None:
    Student(tiny_model(family, 300), None, train_config(ce=1.0)).find_logit_scale()


def scaled_families() -> dict[str, Any]:
    """Families that multiply their logits, and two that cap them without a word that is known here."""
    sizes = {
        "vocab_size": 270,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return {
        "granite": GraniteConfig(**sizes, num_key_value_heads=2, logits_scaling=8.0),
        "cohere": CohereConfig(**sizes, num_key_value_heads=2, logit_scale=0.0625),
        "llama": LlamaConfig(**sizes, num_key_value_heads=2),
        "gemma2": Gemma2Config(**sizes, num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0),
    }


@pytest.mark.parametrize("family", ["granite", "cohere", "llama", "gemma2"])
def test_the_nats_of_tokens_are_those_of_the_models_own_logits(family: str, batch: MicroBatch) -> None:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(scaled_families()[family]).eval()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    student = Student(lm, None, train_config(ce=1.0))
    student.find_logit_scale()
    assert student.logit_scale == {"granite": 0.125, "cohere": 0.0625}.get(family, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    nats, _ = student(batch)
    logits_BLV = lm(input_ids=batch.tokens_BL, use_cache=False).logits.double()
    supervised_BL = batch.labels_BL >= 0
    theirs = cross_entropy(logits_BLV[supervised_BL], batch.labels_BL[supervised_BL], reduction="sum")
    assert nats.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_a_family_that_caps_its_logits_without_saying_so_in_a_known_word_is_refused_by_name(model: Path) -> None:
    student = Student(load_start(model, False), None, train_config(ce=1.0))
    own = student.lm.forward
    student.lm.forward = lambda **given: _capped(own(**given))
    with pytest.raises(ValueError, match=r"\(llama\): the head applied .* differs .* by more than a factor"):
        student.find_logit_scale()


def _capped(output: Any) -> Any:
    output.logits = 30 * torch.tanh(output.logits / 30)
    return output


def test_weights_that_are_not_numbers_are_named(model: Path, tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    lm.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    named = r"weights that are NaN or infinite, in model\.layers\.1\.mlp\.up_proj\.weight \(1 values\)"
    with pytest.raises(ValueError, match=named):
        load_start(tmp_path, False)
    with pytest.raises(ValueError, match=named):
        export_start(make_recipe(tmp_path, tmp_path, tmp_path / "run", {}, tokenizer="bytes"))
    assert not (tmp_path / "run" / "start").exists()


class RowShort(HalfSure):
    """A plug-in interface that returns one row too few."""

    own_file = "mine.py"

    def forward(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        whole = super().forward(hidden_BLD, batch, head)
        return ByteScores(whole.logits_PV[:-1], whole.counted_P, whole.token_nats_N)


def test_an_interface_that_gives_too_few_rows_is_named_with_the_counts(model: Path, batch: MicroBatch) -> None:
    student = Student(load_start(model, False), RowShort(), train_config(byte_ce=1.0))
    count = len(batch.state_P)
    with pytest.raises(
        ValueError,
        match=rf"mine\.py: forward returns logits_PV of shape \({count - 1}, 256\); it must be \({count}, 256\)",
    ):
        student(batch)
