"""The pooler in vLLM's workers, driven by both of its model runners, and what it says of the memory that it takes.

The runner of a CPU (V1) runs in the tests of engines; that of a GPU (V2) needs a GPU, except for its code for pooling.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.covering.covering import Covering, exp_logits
from pipeline.covering.vocabulary import Vocabulary
from stage1_teacher.engines.base import MESSAGE, OWN_LOGPROBS
from stage1_teacher.reduction.messages import read_masses, rows_message
from stage1_teacher.reduction.types import RowsAlong
from tests.stage1_teacher.engines.test_engines import DOCUMENTS, brute_force_targets, engine_targets
from tests.stage1_teacher.reduction.test_reducer import WIDTH, covering_of, wide_vocabulary
from tests.support.tiny import tiny_model

SIZE = 16


class LinearModel(nn.Module):
    """A model whose states are given, and whose logits are doubled behind its head."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        from stage1_teacher.engines.vllm_worker import RowPooler

        generator = torch.Generator().manual_seed(0)
        self.weight_VD = nn.Parameter(torch.randn(WIDTH, SIZE, generator=generator), requires_grad=False)
        self.pooler = RowPooler(self, SIZE, torch.float32)
        self.calls: list[int] = []

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Do nothing: vLLM looks for this name."""
        raise AssertionError("vLLM only looks for it")

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Do nothing: vLLM looks at these names."""
        raise AssertionError("vLLM only looks for it")

    def compute_logits(self, states_TD: Tensor) -> Tensor:
        self.calls.append(len(states_TD))
        return 2 * states_TD @ self.weight_VD.T


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LinearModel:
    from stage1_teacher.engines import vllm_worker

    monkeypatch.setattr(vllm_worker, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm_worker, "get_tensor_model_parallel_world_size", lambda: 1)
    return LinearModel()


@pytest.fixture
def vocabulary(model: LinearModel) -> Vocabulary:
    """Make the vocabulary that the model's pooler was opened with."""
    made = wide_vocabulary(np.random.default_rng(0))
    spelled: list[bytes | None] = [None] * WIDTH
    for column, of_token in enumerate(made.sorted_bytes):
        spelled[int(made.order[column])] = of_token
    assert model.pooler.open(spelled, made.end_ids, 3) == (WIDTH, None)
    return made


class RunnerV2:
    """Model Runner V2's code for pooling, and a schedule for it."""

    def __init__(self, model: LinearModel) -> None:
        from vllm.v1.worker.gpu.pool.pooling_runner import PoolingRunner

        config = SimpleNamespace(
            model_config=SimpleNamespace(get_pooling_task=lambda tasks: tasks[0], pooler_config=None),
            scheduler_config=SimpleNamespace(max_num_seqs=8),
        )
        self.runner = PoolingRunner(model, config)  # type: ignore[arg-type]
        self.prompt_len = np.zeros(8, dtype=np.int32)

    def add(self, index: int, prompt_len: int, extra: dict[str, Any]) -> None:
        from vllm import PoolingParams

        params = PoolingParams(task="token_embed", use_activation=False, extra_kwargs=extra)
        self.prompt_len[index] = prompt_len
        self.runner.add_request(str(index), index, params, None)

    def step(self, chunks: list[tuple[int, int, Tensor]]) -> list[Tensor | None]:
        """Run (request, tokens before the chunk, the chunk's states) together."""
        sizes = [len(states_TD) for *_, states_TD in chunks]
        ends = [before + len(states_TD) for _, before, states_TD in chunks]
        batch = SimpleNamespace(
            num_tokens=sum(sizes),
            num_reqs=len(chunks),
            req_ids=[str(index) for index, *_ in chunks],
            idx_mapping_np=np.array([index for index, *_ in chunks]),
            num_scheduled_tokens=np.array(sizes, dtype=np.int32),
            seq_lens_cpu_upper_bound=torch.tensor(ends),
            query_start_loc=torch.tensor([0, *np.cumsum(sizes).tolist()]),
        )
        states = SimpleNamespace(prompt_len=SimpleNamespace(np=self.prompt_len))
        answers, _ = self.runner.pool(torch.cat([states_TD for *_, states_TD in chunks]), batch, states)  # type: ignore[arg-type]
        return list(answers)  # type: ignore[arg-type]


def expected_rows(model: LinearModel, covering: Covering, states_RD: Tensor) -> list[Any]:
    logits_RV = (2 * states_RD.double() @ model.weight_VD.T.double()).numpy()
    return covering.reduce_rows(covering.offsets, exp_logits(logits_RV[:, covering.vocabulary.order]))


def check(answer: Tensor | None, expected: list[Any]) -> None:
    assert answer is not None and answer.dtype == torch.uint8
    masses = read_masses(answer.numpy().tobytes())
    np.testing.assert_allclose(masses.masses_I, np.concatenate([row.masses_I for row in expected]), rtol=5e-5)
    np.testing.assert_allclose(masses.end_R, [row.end for row in expected], rtol=5e-5)


def test_the_runner_of_gpus_asks_what_the_pooler_answers_in_chunks_of_several_prompts(
    model: LinearModel, vocabulary: Vocabulary
) -> None:
    generator = torch.Generator().manual_seed(1)
    one, two = covering_of(vocabulary, b"abcabc"), covering_of(vocabulary, b"hg")
    runner = RunnerV2(model)
    states = [torch.randn(9, SIZE, generator=generator), torch.randn(5, SIZE, generator=generator)]
    runner.add(0, 9, {MESSAGE: rows_message([RowsAlong.canonical(one, 2)])})
    runner.add(1, 5, {MESSAGE: rows_message([RowsAlong.canonical(two, 1)])})
    assert runner.step([(0, 0, states[0][:4])]) == [None]
    first, second = runner.step([(0, 4, states[0][4:8]), (1, 0, states[1])])
    assert first is None
    check(second, expected_rows(model, two, states[1][1:4]))
    [last] = runner.step([(0, 8, states[0][8:])])
    check(last, expected_rows(model, one, states[0][2:9]))
    assert max(model.calls) <= 3  # no more logits than a chunk of them


def test_a_prompt_that_was_interrupted_starts_again(model: LinearModel, vocabulary: Vocabulary) -> None:
    covering = covering_of(vocabulary, b"abc")
    states_TD = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(2))
    message = {MESSAGE: rows_message([RowsAlong.canonical(covering, 0)])}
    runner = RunnerV2(model)
    runner.add(3, 4, message)
    assert runner.step([(3, 0, states_TD[:2])]) == [None]
    runner.runner.remove_request(3)
    runner.add(3, 4, message)
    assert runner.step([(3, 0, states_TD[:3])]) == [None]
    [answer] = runner.step([(3, 3, states_TD[3:])])
    check(answer, expected_rows(model, covering, states_TD))


def test_own_log_probabilities_are_those_of_the_whole_vocabulary(model: LinearModel, vocabulary: Vocabulary) -> None:
    states_TD = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(3))
    runner = RunnerV2(model)
    runner.add(0, 4, {OWN_LOGPROBS: 1})
    assert runner.step([(0, 0, states_TD[:2])]) == [None]
    [found_TV] = runner.step([(0, 2, states_TD[2:])])
    assert found_TV is not None
    torch.testing.assert_close(found_TV, (2 * states_TD[1:] @ model.weight_VD.T).log_softmax(-1))


def test_logits_that_are_not_finite_are_told_by_the_answer(model: LinearModel, vocabulary: Vocabulary) -> None:
    runner = RunnerV2(model)
    runner.add(0, 3, {MESSAGE: rows_message([RowsAlong.canonical(covering_of(vocabulary, b"ab"), 0)])})
    [answer] = runner.step([(0, 0, torch.full((3, SIZE), torch.nan))])
    assert answer is not None
    with pytest.raises(ValueError, match="logits are not finite"):
        read_masses(answer.numpy().tobytes())


def test_a_prompt_beside_one_whose_logits_are_not_finite_goes_on_and_tells_the_fault(
    model: LinearModel, vocabulary: Vocabulary
) -> None:
    """An exception in the pooler would end the engine, and the dump would report that it failed, not why."""
    runner = RunnerV2(model)
    states_TD = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(4))
    runner.add(0, 3, {MESSAGE: rows_message([RowsAlong.canonical(covering_of(vocabulary, b"ab"), 0)])})
    runner.add(1, 5, {MESSAGE: rows_message([RowsAlong.canonical(covering_of(vocabulary, b"abca"), 0)])})
    bad, unfinished = runner.step([(0, 0, torch.full((3, SIZE), torch.nan)), (1, 0, states_TD[:3])])
    assert bad is not None and unfinished is None
    [beside] = runner.step([(1, 3, states_TD[3:])])
    for answer in (bad, beside):
        assert answer is not None
        with pytest.raises(ValueError, match="logits are not finite"):
            read_masses(answer.numpy().tobytes())


def test_the_memory_of_a_step_is_measured_with_as_many_logits_as_a_dump_holds(
    model: LinearModel, vocabulary: Vocabulary
) -> None:
    runner = RunnerV2(model)
    runner.add(0, 7, {})
    [answer] = runner.step([(0, 0, torch.zeros(7, SIZE))])
    assert answer is not None and model.calls[1:] == [3, 3, 1]


def test_a_vocabulary_of_more_tokens_than_the_model_has_logits_is_refused(model: LinearModel) -> None:
    width, fault = model.pooler.open([b"a"] * (WIDTH + 1), [0], None) or (0, None)
    assert width == WIDTH and fault is not None and f"the model's head has {WIDTH} rows" in fault


def test_a_rank_that_is_not_the_first_applies_the_head_and_answers_nothing(
    model: LinearModel, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stage1_teacher.engines import vllm_worker

    monkeypatch.setattr(vllm_worker, "get_tensor_model_parallel_rank", lambda: 1)
    runner = RunnerV2(model)
    runner.add(0, 3, {MESSAGE: rows_message([RowsAlong.canonical(covering_of(vocabulary, b"ab"), 0)])})
    before = len(model.calls)
    assert runner.step([(0, 0, torch.zeros(3, SIZE))]) == [None] and len(model.calls) == before + 1


def test_both_model_runners_have_what_branches_read_of_them() -> None:
    read = set(re.findall(r"\brunner\.(\w+)", Path(vllm_worker_file()).read_text(encoding="utf-8")))
    assert {"attn_groups", "kv_cache_config", "kv_caches", "max_model_len"} <= read
    for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"):
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        assert not [name for name in read if not re.search(rf"\bself\.{name}\b", source)]


def vllm_worker_file() -> str:
    from stage1_teacher.engines import vllm_worker

    return vllm_worker.__file__


def test_branches_share_a_cache_of_keys_and_values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    from stage1_teacher.engines import vllm_worker

    monkeypatch.setattr(vllm_worker, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    full = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=8, dtype=torch.float32)

    def cache(*specs: Any) -> Any:
        config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs], num_blocks=9)
        return vllm_worker.Worker.bld_cache(SimpleNamespace(model_runner=SimpleNamespace(kv_cache_config=config)))  # type: ignore[arg-type]

    assert cache(full, full) == (9, (32, 32))
    assert cache(full, MambaSpec.__new__(MambaSpec)) is None and cache() is None
    monkeypatch.setattr(vllm_worker, "get_pp_group", lambda: SimpleNamespace(world_size=2))
    assert cache(full) is None  # the first stages answer nothing


class HeadModel(LinearModel):
    """A model in bfloat16 with vLLM's own float32 head, padded, which may hold down one token's logit behind it."""

    def __init__(self, *, vllm_config: Any = None, prefix: str = "", held_down: int | None = None) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        from stage1_teacher.engines.vllm_worker import RowPooler

        super().__init__()
        padded_VD = torch.randn(WIDTH + 24, SIZE, generator=torch.Generator().manual_seed(3)).bfloat16()
        self.weight_VD = nn.Parameter(padded_VD, requires_grad=False)
        self.lm_head = SimpleNamespace(quant_method=UnquantizedEmbeddingMethod(), weight=padded_VD, tp_size=1)
        self.logits_processor = LogitsProcessor.__new__(LogitsProcessor)
        nn.Module.__init__(self.logits_processor)
        facts = {"scale": 0.5, "soft_cap": 9.0, "logits_as_input": False, "head_dtype": torch.float32}
        for name, value in (facts | {"org_vocab_size": WIDTH, "vocab_size": WIDTH}).items():
            setattr(self.logits_processor, name, value)
        self.held_down = held_down
        self.pooler = RowPooler(self, SIZE, torch.bfloat16)

    def compute_logits(self, states_TD: Tensor) -> Tensor:
        logits_TV: Tensor = self.logits_processor(self.lm_head, states_TD)
        if self.held_down is not None:
            logits_TV[:, self.held_down] = -50.0
        return logits_TV

    def exact(self, states_TD: Tensor) -> Tensor:
        """Return the logits by token id, in float64."""
        logits_TV = states_TD.double() @ self.weight_VD[:WIDTH].T.double()
        logits_TV = 0.5 * 9 * torch.tanh(logits_TV / 9)
        if self.held_down is not None:
            logits_TV[:, self.held_down] = -50.0
        return logits_TV


@pytest.mark.parametrize("held_down", [None, 17])
def test_logits_come_in_byte_order_unless_the_model_treats_tokens_differently_and_are_its_own_either_way(
    model: LinearModel, held_down: int | None
) -> None:
    made, head = wide_vocabulary(np.random.default_rng(0)), HeadModel(held_down=held_down)
    spelled: list[bytes | None] = [None] * WIDTH
    for column, of_token in enumerate(made.sorted_bytes):
        spelled[int(made.order[column])] = of_token
    assert head.pooler.open(spelled, made.end_ids, 3) == (WIDTH, None)
    assert (head.pooler._column_V is not None) == (held_down is None)
    covering, states_TD = covering_of(made, b"abcabc"), torch.randn(7, SIZE).bfloat16()
    runner = RunnerV2(head)
    runner.add(0, 7, {MESSAGE: rows_message([RowsAlong.canonical(covering, 0)])})
    runner.add(1, 7, {OWN_LOGPROBS: 0})
    with torch.inference_mode():  # as vLLM's runners are
        answer, own = runner.step([(0, 0, states_TD), (1, 0, states_TD)])
    logits_RV = head.exact(states_TD)
    check(answer, covering.reduce_rows(covering.offsets, exp_logits(logits_RV.numpy()[:, made.order])))
    assert own is not None
    torch.testing.assert_close(own.double(), logits_RV.log_softmax(-1), rtol=0, atol=1e-4)


def test_a_teacher_in_bfloat16_is_summed_from_its_own_float32_logits_in_byte_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stage1_teacher.engines.vllm_worker import RowPooler

    orders: list[bool] = []
    put = RowPooler._put_in_byte_order

    def noted(pooler: RowPooler, *arguments: Any) -> Tensor | None:
        column_V = put(pooler, *arguments)
        orders.append(column_V is not None)
        return column_V

    monkeypatch.setattr(RowPooler, "_put_in_byte_order", noted)
    found = engine_targets("vllm", tiny_model(tmp_path), dtype="bfloat16")  # which holds rows against the model's own
    assert orders == [True]
    for targets, expected in zip(found, brute_force_targets(tmp_path, DOCUMENTS), strict=True):
        distance_P = 0.5 * np.abs(targets - expected).sum(axis=1)  # to the model in float64
        assert distance_P.mean() < 0.1
