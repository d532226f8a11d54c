"""Extension of vLLM's worker processes: rows are reduced beside the head. The second module that imports vLLM.

vLLM's own conversion of a model for pooling discards its head. `Worker` is vLLM's `worker_extension_cls`: a worker of
any kind (in this process, spawned, Ray's) imports it by name before it loads the model, and from then on a model is
converted by `with_own_head` instead. Its pooler applies the model's own `compute_logits` to the rows that a prompt's
message asks for (`stage1_teacher.reduction.messages`, in the `extra_kwargs` of its parameters) and answers with what
they sum to; no hidden state and no logit leaves the worker.

Under tensor parallelism all ranks apply the head, and the first one reduces what they gather.

Shape legend: T tokens of a step, D hidden size, V token ids.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import vllm.model_executor.models.adapters as adapters
from torch import Tensor, nn
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.v1 import kv_cache_interface as caches
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace, prepare_kernel_block_sizes

from pipeline.covering.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS
from stage1_teacher.engines.base import MESSAGE, OWN_LOGPROBS
from stage1_teacher.engines.float32_head import Float32Head
from stage1_teacher.engines.paged_branches import Stretch, lay_out, split_blocks
from stage1_teacher.reduction.device_trie import DeviceTrie
from stage1_teacher.reduction.messages import Answering, sum_on_device
from stage1_teacher.reduction.reducer import ComputedRows, PromptRows, Reducer, default_chunk

# Memory that `stage1_teacher.reduction.device_targets` takes for the tokens of a step, counted: dense float64 targets,
# as many numbers for their sorting, and eight of each of some 350 intervals a row.
DENSE_COPIES, POSITIONS_A_TOKEN = 8, 5

PROBE_ROWS, PROBE_RTOL = 8, 1e-5  # another order of the head's rows changes no product by more

_CORES = os.sched_getaffinity(0)  # vLLM binds this process to one of them later


class Worker:
    """Methods added to vLLM's worker, called through `LLM.collective_rpc`."""

    def bld_open(
        self, token_bytes: Sequence[bytes | None], ends: Sequence[int], chunk: int | None
    ) -> tuple[int, str | None, str] | None:
        """Prepare the reduction of this vocabulary.

        Returns:
            The number of ids that the model has logits of, why it cannot be reduced, and which of vLLM's model runners
            runs it (V1 or V2); None in a process that answers nothing.
        """
        if not get_pp_group().is_last_rank:
            return None
        pooler: RowPooler = self.get_model().pooler  # type: ignore[attr-defined]
        opened = pooler.open(token_bytes, ends, chunk)
        is_v2 = type(self.model_runner).__module__ == "vllm.v1.worker.gpu.model_runner"  # type: ignore[attr-defined]
        return None if opened is None else (*opened, "V2" if is_v2 else "V1")

    def bld_cache(self) -> tuple[int, tuple[int, ...]] | None:
        """Return the `CacheBlocks`; None if branches cannot share them, as of a model that also keeps states."""
        config = self.model_runner.kv_cache_config  # type: ignore[attr-defined]
        specs = [group.kv_cache_spec for group in config.kv_cache_groups]
        if not specs or not all(isinstance(spec, _PAGED) for spec in specs) or get_pp_group().world_size > 1:
            return None
        return config.num_blocks, tuple(spec.block_size for spec in specs)

    @torch.inference_mode()
    def bld_compute(
        self, copies: Sequence[Sequence[int]], stretches: Sequence[Any], message: dict[str, Any] | None
    ) -> bytes | None:
        """Compute a `stage1_teacher.engines.paged_branches.Step`, and return the answer to a message about its rows.

        None without a message, and in a process that answers nothing.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        copy_kv_cache_blocks_inplace(runner.kv_caches, runner.kv_cache_config.num_blocks, list(map(tuple, copies)))
        model = self.get_model()  # type: ignore[attr-defined]
        states_TD = _forward(runner, model, [Stretch(*stretch) for stretch in stretches])
        answer: bytes | None = None if message is None else model.pooler.answer_step(message, states_TD)
        return answer


# Caches in which a sequence's keys and values lie by its table of blocks.
_PAGED = (
    caches.FullAttentionSpec,
    caches.SlidingWindowSpec,
    caches.ChunkedLocalAttentionSpec,
    caches.UniformTypeKVCacheSpecs,
)


def _forward(runner: Any, model: nn.Module, stretches: Sequence[Stretch]) -> Tensor:
    """Run vLLM's model over stretches of tokens, as its runners do; return the state after each token, T x D."""
    config, device = runner.kv_cache_config, runner.device
    sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
    step = lay_out(stretches, sizes, runner.max_model_len)
    kernel_sizes = prepare_kernel_block_sizes(config, runner.attn_groups)
    tables = [split_blocks(*group) for group in zip(step.tables, sizes, kernel_sizes, strict=True)]
    slots = [torch.from_numpy(slot_T).to(device) for slot_T in step.slots]
    starts, ends = torch.from_numpy(step.starts), torch.from_numpy(step.ends_S)
    positions_T = torch.from_numpy(step.position_T).to(device)
    metadata = build_attn_metadata(
        runner.attn_groups,
        num_reqs=len(ends),
        num_tokens=len(positions_T),
        query_start_loc_gpu=starts.to(device),
        query_start_loc_cpu=starts,
        max_query_len=int(starts.diff().max()),
        seq_lens=ends.to(device),
        max_seq_len=int(ends.max()),
        block_tables=[torch.from_numpy(table_SB).to(device) for table_SB in tables],
        slot_mappings=slots,
        kv_cache_config=config,
        seq_lens_cpu_upper_bound=ends,
        positions=positions_T,
        is_prefilling=starts.diff() > 1,
    )
    by_layer = build_slot_mappings_by_layer(slots, config)
    with set_forward_context(metadata, runner.vllm_config, num_tokens=len(positions_T), slot_mapping=by_layer):
        states_TD: Tensor = model(input_ids=torch.from_numpy(step.token_T).to(device), positions=positions_T)
    return states_TD[torch.from_numpy(step.index_T).to(device)]


def with_own_head(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a model's class as vLLM's pooling runs it, with its head left in place."""

    class OwnHead(cls, VllmModelForPooling):  # type: ignore[valid-type,misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            config = vllm_config.model_config
            self.pooler = RowPooler(self, config.get_hidden_size(), config.dtype)

    OwnHead.__name__ = OwnHead.__qualname__ = cls.__name__
    return OwnHead


adapters.as_embedding_model = with_own_head


class RowPooler(Pooler):
    """A pooler that answers a prompt's message, or gives the model's own log-probabilities of its positions."""

    def __init__(self, model: nn.Module, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not as a submodule: the model holds us
        self._hidden_size, self._dtype = hidden_size, dtype
        self._reducer: Reducer | None = None
        self._column_V: Tensor | None = None  # of each token id, where logits come in byte order
        self._trie: DeviceTrie | None = None  # if rows are summed into targets on the device too

    def get_supported_tasks(self) -> set[Any]:
        return {"token_embed"}

    @torch.inference_mode()
    def open(
        self, token_bytes: Sequence[bytes | None], ends: Sequence[int], chunk: int | None
    ) -> tuple[int, str | None] | None:
        """See `Worker.bld_open`."""
        device = next(self.model.parameters()).device
        heads: list[Float32Head] = []
        if device.type == "cpu":
            for processor in (module for module in self.model.modules() if isinstance(module, LogitsProcessor)):
                _keep_float32_head(processor, heads)
        logits_TV = self._logits(torch.zeros(1, self._hidden_size, dtype=self._dtype, device=device))
        width = len(token_bytes) if logits_TV is None else logits_TV.shape[1]
        try:
            vocabulary = Vocabulary(token_bytes, ends, width)
        except ValueError as error:
            return width, str(error)
        self._column_V = self._put_in_byte_order(vocabulary, heads)
        self._reducer = Reducer(vocabulary, device, chunk, _CORES, self._column_V is not None)
        if device.type == "cuda" and get_tensor_model_parallel_rank() == 0:
            self._trie = DeviceTrie.of(self._reducer.vocabulary.trie, device)
        return None if logits_TV is None else (width, None)

    def _put_in_byte_order(self, vocabulary: Vocabulary, heads: Sequence[Float32Head]) -> Tensor | None:
        """Let the model's logits come in the vocabulary's order, which otherwise costs more than summing them does.

        Only where the model does to each logit what it does to all: that is tried.

        Returns:
            The column of each token id; None if logits come by token id, as ever.
        """
        if len(heads) != 1 or get_tensor_model_parallel_world_size() > 1:
            return None
        [head] = heads
        order_V, column_V = torch.from_numpy(vocabulary.order), torch.from_numpy(vocabulary.column)
        states_TD = torch.randn(PROBE_ROWS, self._hidden_size, generator=torch.Generator().manual_seed(0))
        by_id_TV = self._logits(states_TD.to(self._dtype))
        assert by_id_TV is not None
        by_id_TV = by_id_TV.clone()  # the next call overwrites it
        head.reorder(order_V)
        by_column_TV = self._logits(states_TD.to(self._dtype))
        assert by_column_TV is not None
        if torch.allclose(
            by_column_TV, by_id_TV[:, order_V], rtol=PROBE_RTOL, atol=PROBE_RTOL * float(by_id_TV.abs().max())
        ):
            return column_V
        head.reorder(column_V)
        return None

    def _logits(self, states_TD: Tensor) -> Tensor | None:
        """Return the model's own logits, T x V, in the order of the reducer; None on every rank but the first."""
        logits_TV: Tensor | None = self.model.compute_logits(states_TD)
        return logits_TV if get_tensor_model_parallel_rank() == 0 else None

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """Return an answer for each request, bytes (uint8) or log-probabilities (T x V float32).

        None before a request's last chunk, and in a process that answers nothing.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        lengths = cursor.num_scheduled_tokens_cpu.tolist()
        parts = list(
            zip(
                pooling_metadata.pooling_states,
                lengths,
                np.cumsum([0, *lengths])[:-1].tolist(),
                cursor.seq_lens_cpu.tolist(),
                pooling_metadata.pooling_params,
                strict=True,
            )
        )
        wanted: list[tuple[PromptRows, int, np.ndarray]] = []  # each with its first row, and their indices in the step
        measured: list[Tensor] = []
        for state, length, at, end, params in parts:
            extra = params.extra_kwargs or {}
            begin = end - length  # index in the prompt of the first token of this chunk
            if MESSAGE in extra:
                if not state.hidden_states_cache:
                    assert self._reducer is not None
                    state.hidden_states_cache.append(Answering(extra[MESSAGE], self._reducer.vocabulary))
                rows = state.hidden_states_cache[0].rows
                start, stop = rows.between(begin, end)
                wanted.append((rows, start, rows.index_R[start:stop] - begin + at))
            elif OWN_LOGPROBS in extra:
                self._add_own(state, hidden_states[at + max(extra[OWN_LOGPROBS] - begin, 0) : at + length])
            else:
                measured.append(hidden_states[at : at + length])
        if wanted:
            # One copy to the device for all prompts of the step.
            index_R = torch.from_numpy(np.concatenate([of_prompt for *_, of_prompt in wanted]))
            states = hidden_states[index_R.to(hidden_states.device)].split([len(index) for *_, index in wanted])
            computed = [
                ComputedRows(rows, start, states_RD) for (rows, start, _), states_RD in zip(wanted, states, strict=True)
            ]
            self._reduce(computed, [part[0].hidden_states_cache[0] for part in parts if part[0].hidden_states_cache])
        if measured:
            self._measure(torch.cat(measured))
        answers = []
        finished = cursor.get_finished_mask()
        if self._trie is not None:
            held = [part[0].hidden_states_cache for part, is_last in zip(parts, finished, strict=True) if is_last]
            sum_on_device([cache[0] for cache in held if cache and isinstance(cache[0], Answering)], self._trie)
        for (state, *_), is_last in zip(parts, finished, strict=True):
            answers.append(self._answer(state) if is_last else None)
            if is_last:
                state.clean()
        return answers

    def answer_step(self, message: dict[str, Any], states_TD: Tensor) -> bytes | None:
        """Return the answer to a message about the rows after some tokens, given all their states.

        None in a process that answers nothing.
        """
        assert self._reducer is not None
        answering = Answering(message, self._reducer.vocabulary)
        index_R = torch.from_numpy(answering.rows.index_R).to(states_TD.device)
        self._reduce([ComputedRows(answering.rows, 0, states_TD[index_R])], [answering])
        return answering.bytes() if get_tensor_model_parallel_rank() == 0 else None

    def _reduce(self, computed: Sequence[ComputedRows], answering: Sequence[Any]) -> None:
        assert self._reducer is not None
        try:
            self._reducer.reduce(computed, self._logits)
        except ValueError as error:  # told by the answer: an exception would end the engine, and its message be lost
            for answer in answering:
                if isinstance(answer, Answering):
                    answer.fault = str(error)

    def _add_own(self, state: Any, states_TD: Tensor) -> None:
        if len(states_TD) and (logits_TV := self._logits(states_TD)) is not None:
            by_id_TV = logits_TV if self._column_V is None else logits_TV[:, self._column_V]
            state.hidden_states_cache.append(by_id_TV.float().log_softmax(-1))

    def _measure(self, states_TD: Tensor) -> None:
        """Apply the head and drop the logits, for prompts without a message; hold as much memory as a dump's step does.

        vLLM measures a step's memory so at the start, and the benchmarks the least time that a dump can take.
        """
        chunk = default_chunk(states_TD.device) if self._reducer is None else self._reducer.chunk
        for part_TD in states_TD.split(chunk):
            logits_TV = self._logits(part_TD)
            if logits_TV is not None:
                logits_TV.float()
        if states_TD.is_cuda and get_tensor_model_parallel_rank() == 0:
            size = (DENSE_COPIES, POSITIONS_A_TOKEN * len(states_TD), NUM_SYMBOLS)
            torch.empty(size, dtype=torch.float64, device=states_TD.device)

    def _answer(self, state: Any) -> Tensor | None:
        held = state.hidden_states_cache
        if get_tensor_model_parallel_rank() != 0:
            return None
        if held and isinstance(held[0], Answering):
            return torch.frombuffer(bytearray(held[0].bytes()), dtype=torch.uint8)
        return torch.cat(held) if held else torch.zeros(1)


def _keep_float32_head(processor: LogitsProcessor, heads: list[Float32Head]) -> None:
    """Let a head in float32 of a model in 16 bits keep its float32 weights: vLLM would convert them for each chunk.

    Args:
        heads: gets each head when it is first applied.
    """
    apply = processor._apply_head
    kept: dict[int, Float32Head] = {}

    def apply_kept(lm_head: Any, states_TD: Tensor, bias: Tensor | None) -> Tensor:
        is_plain = isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        if processor.head_dtype != torch.float32 or states_TD.dtype == torch.float32 or not is_plain:
            return apply(lm_head, states_TD, bias)
        if id(lm_head) not in kept:
            kept[id(lm_head)] = Float32Head(lm_head.weight, bias)
            heads.append(kept[id(lm_head)])
        return kept[id(lm_head)](states_TD)

    processor._apply_head = apply_kept
