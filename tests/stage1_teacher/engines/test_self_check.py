"""An engine is refused at its start if the rows that it sums are not its model's own."""

from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import TeacherConfig
from pipeline.config.loading import load_recipe
from stage1_teacher.engines import self_check
from stage1_teacher.engines.huggingface import TransformersEngine
from stage1_teacher.engines.own_logits import OwnLogits
from stage1_teacher.engines.self_check import max_kl, max_relative_deviation
from stage1_teacher.reduction.reducer import CpuKernel
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher
from tests.stage1_teacher.dump.test_run import write_recipe
from tests.support.tiny import save_tiny, tiny_tokenizer


def opened(folder: Path, model: Path, *settings: str) -> Teacher:
    recipe = load_recipe(str(write_recipe(folder, model, ["text"])), list(settings))
    return open_teacher(recipe, *load_tokenizer(recipe))


def test_logits_of_the_wrong_scale_or_cap_or_with_silenced_tokens_are_refused_by_name(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reduction gets others than the model's own."""
    logits = OwnLogits.logits
    for change in (lambda x: x * 0.5, lambda x: 2 * (x / 2).tanh(), lambda x: x - 1e4 * (x > 0.5)):
        monkeypatch.setattr(OwnLogits, "logits", lambda self, states, change=change: change(logits(self, states)))
        with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\).*nats from the model's own.*teacher.engine: vllm"):
            opened(tmp_path, model)
    monkeypatch.undo()
    opened(tmp_path, model)


def test_rows_of_other_tokens_are_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = OwnLogits.states
    monkeypatch.setattr(OwnLogits, "states", lambda self, **inputs: states(self, **inputs).roll(1, 1))
    with pytest.raises(ValueError, match=r"the rows that transformers-.* sums are not its own log-probabilities"):
        opened(tmp_path, model)


def test_a_reduction_that_loses_mass_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = CpuKernel.__call__

    def half(self: CpuKernel, *arguments: Any) -> None:
        reduce(self, *arguments)
        arguments[-1].token_R[:] *= 0.02

    monkeypatch.setattr(CpuKernel, "__call__", half)
    with pytest.raises(ValueError, match=r"the rows that transformers-.* sums are not its own log-probabilities"):
        opened(tmp_path, model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_are_refused_as_that(tmp_path: Path, bad: float) -> None:
    folder = save_tiny(tmp_path / "model", tiny_tokenizer(), 0)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\): the teacher's logits are not finite: its weights are"):
        opened(tmp_path, folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_16_bits_passes_even_where_logits_are_large(tmp_path: Path, dtype: str) -> None:
    """Logits of up to 60, in steps of a quarter in bfloat16."""
    folder = save_tiny(tmp_path / "model", tiny_tokenizer(), 0)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 12
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    teacher = opened(tmp_path, folder, f"teacher.dtype={dtype}")
    assert isinstance(teacher.engine, TransformersEngine)
    prompt = [268, *teacher.tokenizer.encode(b"the thing and")]
    assert teacher.engine._whole_logits(prompt).abs().max() > 50


def test_an_engine_that_differs_from_itself_is_held_to_that(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows lie 0.1 nats from what the model said a moment ago, as if other experts were chosen."""
    own = TransformersEngine.own_logprobs
    flips = chain([0.0, 0.5], repeat(0.0))  # the second time that the whole probe is asked

    def noisy(self: TransformersEngine, prompt: list[int], first: int = 0) -> Tensor:
        logprobs_RV = own(self, prompt, first)
        shape = logprobs_RV.shape
        return (logprobs_RV + next(flips) * torch.randn(shape, generator=torch.Generator().manual_seed(0))).log_softmax(
            -1
        )

    monkeypatch.setattr(TransformersEngine, "own_logprobs", noisy)
    opened(tmp_path, model)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = TransformersEngine.own_logprobs

    def backwards(self: TransformersEngine, prompt: list[int], first: int = 0) -> Tensor:
        """Each row as if it came after all tokens."""
        rows_RV = own(self, prompt)
        return rows_RV[-1:].expand(len(prompt) - first, -1)

    monkeypatch.setattr(TransformersEngine, "own_logprobs", backwards)
    with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\).*looks ahead.*choose one that is"):
        opened(tmp_path, model)


def test_a_model_that_looks_ahead_and_does_not_mind_the_order_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT's encoder with nearly uniform positions looks ahead: what follows counts, in whatever order."""
    own = TransformersEngine.own_logprobs

    def bag(self: TransformersEngine, prompt: list[int], first: int = 0) -> Tensor:
        return own(self, prompt, first).roll(sum(prompt) % 7, -1)

    monkeypatch.setattr(TransformersEngine, "own_logprobs", bag)
    with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\).*looks ahead.*choose one that is"):
        opened(tmp_path, model)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.03), ("bfloat16", 3.0)])
def test_an_engine_whose_prompts_see_each_other_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, share: float
) -> None:
    """First rows hold something of the previous prompt; alone they are right.

    vLLM does so with transformers' code for JetMoE and ZAYA.
    """
    states = OwnLogits.states

    def leaking(self: OwnLogits, **inputs: Any) -> Tensor:
        found_BTD = states(self, **inputs).clone()
        if len(found_BTD) > 1:
            decay_T1 = share * 0.8 ** torch.arange(found_BTD.shape[1])[:, None]
            found_BTD[1:] += (decay_T1 * found_BTD[:-1, -1:]).to(found_BTD.dtype)
        return found_BTD

    monkeypatch.setattr(OwnLogits, "states", leaking)
    with pytest.raises(
        ValueError, match=r"\(LlamaForCausalLM\): transformers.*the other prompts in its batch.*engine: vllm"
    ):
        opened(tmp_path, model, f"teacher.dtype={dtype}")
    monkeypatch.undo()
    opened(tmp_path, model, f"teacher.dtype={dtype}")


def test_the_measure_is_the_divergence_of_the_worst_row_and_counts_what_one_side_never_says() -> None:
    generator = torch.Generator().manual_seed(1)
    own_RV, other_RV = (torch.randn(5, 7, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    slow = max(
        sum(float(p.exp() * (p - q)) for p, q in zip(a, b, strict=True)) for a, b in zip(own_RV, other_RV, strict=True)
    )
    assert max_kl(own_RV, other_RV) == pytest.approx(slow)
    other_RV[0, 0] = -torch.inf
    assert max_kl(own_RV, other_RV) == float("inf")
    own_RV[0, 0] = -torch.inf
    assert max_kl(own_RV[:1], own_RV[:1]) == 0
    assert max_kl(own_RV, torch.full_like(own_RV, torch.nan)) == float("inf")


def test_a_head_that_is_too_sharp_is_refused_where_the_model_is_sure_of_all_that_it_says() -> None:
    """The divergence vanishes, while all other tokens are wrong by hundreds of nats."""
    generator = torch.Generator().manual_seed(2)
    logits_RV = torch.randn(6, 300, generator=generator)
    logits_RV[:, 7] = 16
    own_RV, sharp_RV = logits_RV.log_softmax(-1), (16 * logits_RV).log_softmax(-1)
    assert max_kl(own_RV, sharp_RV) < self_check.LIMIT_NATS
    assert max_relative_deviation(own_RV, sharp_RV) > 10
    rounded_RV = (10 * logits_RV).bfloat16().float().log_softmax(-1)
    assert max_relative_deviation((10 * logits_RV).log_softmax(-1), rounded_RV) < self_check.LIMIT_SPREAD / 2


def test_the_share_leaves_out_what_is_never_said_and_is_infinite_for_what_the_other_cannot_say() -> None:
    own_RV = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    other_RV = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    apart_V, own_V = (other_RV - own_RV)[0, :3].double(), own_RV[0, :3].double()
    assert max_relative_deviation(own_RV, other_RV) == pytest.approx(float(apart_V.std() / own_V.std()), rel=1e-5)
    assert max_relative_deviation(own_RV, own_RV) == 0
    assert max_relative_deviation(other_RV, own_RV) == float("inf")


def test_a_tokenizer_that_cannot_spell_the_probe_is_probed_with_tokens(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError

    tokenizer = ByteTokenizer.load(str(model))

    def refuse(self: ByteTokenizer, text: bytes) -> list[int]:
        raise SpellingError("no such bytes", "NFC")

    monkeypatch.setattr(ByteTokenizer, "encode", refuse)
    ids = self_check.probe_tokens(tokenizer, 20)
    assert len(ids) == 20 and all(tokenizer.token_bytes[token] for token in ids)


@pytest.mark.parametrize(("start", "max_tokens"), [(268, 1), (None, 1), (None, 2)])
def test_a_probe_of_too_few_tokens_is_refused_in_words(
    tmp_path: Path, model: Path, start: int | None, max_tokens: int
) -> None:
    teacher = opened(tmp_path, model)
    assert isinstance(teacher.engine, TransformersEngine)
    section = TeacherConfig.model_construct(max_tokens=max_tokens, dtype="float32")
    with pytest.raises(ValueError, match=rf"M: transformers.* cannot be checked: .*teacher.max_tokens is {max_tokens}"):
        self_check.check_engine(teacher.engine, teacher.tokenizer, start, section, "M")
