"""A bias folded into rows: what it adds to a moved model's own logits, and what it is said to cost."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PhiConfig, PhiForCausalLM

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.model.folded_bias import constant_direction, fold
from stage2_student.model.vocabulary_transfer import transfer
from tests.support.moved_models import planned
from tests.support.small_dumps import make_text
from tests.support.tiny import MERGES, tiny_tokenizer
from tests.zoo.models import tiny_model

OLD = ByteTokenizer.from_wrapped(tiny_tokenizer(MERGES), "old")
NEW = ByteTokenizer.from_wrapped(tiny_tokenizer(["t h", "o n", "a n", "i n", "on e"]), "new")
UNTIED = {"output": "first_likelihood", "tie": "untie"}


def test_the_direction_is_that_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    shared_D = torch.randn(8, generator=generator, dtype=torch.float64)
    states_ND = shared_D + 0.05 * torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    best_D = torch.linalg.lstsq(states_ND, torch.ones(4000, 1, dtype=torch.float64)).solution[:, 0]
    torch.testing.assert_close(constant_direction(states_ND).double(), best_D, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "granite", "gemma3_text"])
@torch.no_grad()
def test_a_folded_bias_is_nearly_added_to_the_models_own_logits_and_its_cost_is_that_of_the_rest(family: str) -> None:
    model = tiny_model(family, len(OLD.token_bytes), tie_word_embeddings=True)
    if family == "gpt2":  # its final norm has a bias, so that one direction is constant
        model.transformer.ln_f.bias.fill_(0.5)
    move = planned(model, OLD, NEW, transfer=UNTIED)
    model.resize_token_embeddings(len(NEW.token_bytes), mean_resizing=False)
    rows_VD = model.get_output_embeddings().weight.clone()
    model.config.tie_word_embeddings = False
    model.get_output_embeddings().weight = torch.nn.Parameter(rows_VD.clone())
    added_V = torch.linspace(-2, 0.5, len(NEW.token_bytes))
    rng = np.random.default_rng(0)
    written = torch.tensor([[OLD.default_start, *OLD.encode(make_text(rng, 40))[:48]] for _ in range(32)])
    move.old_model.__dict__["own_texts"] = written  # what random models write is hardly text
    texts = [b"".join(OLD.token_bytes[token] or b"" for token in row[1:]) for row in written[16:].tolist()]
    texts = [text.decode(errors="ignore").encode() for text in texts]  # half a character at the end
    tokens = [[move.start_id, *NEW.encode(text)] for text in texts]
    before = [model(torch.tensor([row]), use_cache=False).logits[0].double() for row in tokens]
    folding = fold(model, rows_VD, added_V, move)
    direction_D = constant_direction(move.old_model.states(written[:16])).double()
    lost = 0.0
    for row, before_LV in zip(tokens, before, strict=True):
        after_LV = model(torch.tensor([row]), use_cache=False).logits[0].double()
        states_LD = model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0].double()
        expected_LV = before_LV + (states_LD @ direction_D)[:, None] * added_V
        torch.testing.assert_close(after_LV, expected_LV, rtol=1e-4, atol=1e-3)
        labels_L = torch.tensor(row[1:])
        lost += float(
            cross_entropy(after_LV[:-1], labels_L, reduction="sum")
            - cross_entropy((before_LV + added_V)[:-1], labels_L, reduction="sum")
        )
    assert folding.bits_per_byte == pytest.approx(lost / sum(map(len, texts)) / math.log(2), rel=1e-3, abs=1e-4)
    products_N = move.old_model.states(written[16:]).double() @ direction_D
    assert folding.mean == pytest.approx(float(products_N.mean()), abs=1e-4)
    assert folding.deviation == pytest.approx(float(products_N.std()), abs=1e-4)
    if family == "gpt2":
        assert abs(folding.mean - 1) < 0.05 and folding.deviation < 0.05 and abs(folding.bits_per_byte) < 0.05


@torch.no_grad()
def test_a_head_with_a_bias_takes_it_there() -> None:
    values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model: Any = PhiForCausalLM(PhiConfig(vocab_size=len(OLD.token_bytes), initializer_range=0.3, **values)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    pieces = OLD.encode_batch([b"one"], [b""])[0]
    assert isinstance(pieces, list) and len(pieces) > 1
    start = [OLD.default_start, *pieces]
    logprobs_LV = model(torch.tensor([start])).logits[0].log_softmax(-1)
    before_V = model(torch.tensor([[OLD.default_start]])).logits[0, -1]
    later = sum(float(logprobs_LV[at, piece]) for at, piece in enumerate(pieces) if at)
    done = transfer(model, planned(model, OLD, NEW, {NEW.default_start: OLD.default_start}, transfer=UNTIED))
    after_V = model(torch.tensor([[NEW.default_start]])).logits[0, -1]
    assert done.folding is None
    token = NEW.token_bytes.index(b"one")
    assert float(after_V[token]) == pytest.approx(float(before_V[pieces[0]]) + later, abs=1e-3)
