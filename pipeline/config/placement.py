"""Placement section: where and how fast stage 1 runs. A dump may resume under a different placement."""

from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, field_validator

from pipeline.config.section import Section


class PlacementConfig(Section):
    """Resources and speed of stage 1. Not part of the identity."""

    renamed: ClassVar[Mapping[str, str]] = {"most_engines": "max_engines", "engine_attempts": "max_engine_failures"}

    batch_tokens: int | None = Field(
        None, ge=16, description="Teacher tokens passed to the engine at once; default: 8192, on a GPU 65536."
    )
    engine_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in one engine step (vLLM max_num_batched_tokens); default: 2048, on a GPU 8192.",
    )
    kv_cache: ByteSize | None = Field(
        None, description="vLLM KV cache, bytes; default: 1 GiB on a CPU, vLLM's own on a GPU."
    )
    gpu_memory: float = Field(0.85, gt=0, le=1, description="Share of GPU memory for vLLM.")
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs (on a CPU: processes) that each layer of a teacher is split across (vLLM)."
    )
    pipeline_parallel: int = Field(
        1, ge=1, description="GPUs that a teacher's layers are spread across (vLLM; not in its CPU build)."
    )
    engines: int | None = Field(
        None,
        ge=1,
        description="Engines on this machine, each in a process of its own; default: as many as its visible GPUs hold, "
        "with tensor_parallel x pipeline_parallel each, and one on a CPU or for a server. With more than fit, several "
        "share a GPU (vLLM: lower gpu_memory). With --worker, --ray or as a task of SLURM: one.",
    )
    engine_gpus: int | None = Field(
        None,
        ge=0,
        description="GPUs that an engine reserves on a Ray cluster; default: tensor_parallel x pipeline_parallel if "
        "the cluster has GPUs, else 0. If no machine has that many, the engine spans several (vLLM).",
    )
    engine_cpus: int | None = Field(
        None, ge=1, description="CPU cores that it reserves; default: 1, or without GPUs all of the smallest machine."
    )
    max_engines: int | None = Field(
        None,
        ge=1,
        description="Maximum number of engines on a Ray cluster; default: as many as fit, growing with the cluster.",
    )
    reduce_rows: int | None = Field(
        None,
        ge=1,
        description="Rows whose logits are in memory at once during reduction to bytes; default: 256, on a GPU 1024.",
    )
    writers: int | None = Field(
        None,
        ge=0,
        description="Processes that round, compress and write shards beside an engine; default: on a GPU one for each "
        "four cores, at most 4; otherwise 0, and the engine's process does it.",
    )
    max_engine_failures: int = Field(
        3,
        ge=1,
        description="Consecutive engine failures on one batch after which the dump stops; until then the engine is "
        "restarted. On a Ray cluster also: engines lost on one shard, or consecutive failed starts.",
    )
    overlap: bool | None = Field(
        None, description="Reduce and write a batch while the engine runs the next; default: on a GPU, or for a server."
    )
    base_url: str | None = Field(
        None, description="Address of the server (engine openai), e.g. http://127.0.0.1:8000/v1; its key: BLD_API_KEY."
    )
    requests: int = Field(16, ge=1, description="Concurrent requests (engine openai).")
    request_attempts: int = Field(
        8, ge=1, description="Attempts per request before the dump stops; the waits between them double, up to 60 s."
    )
    request_timeout: float = Field(600.0, gt=0, description="Seconds after which a missing answer counts as lost.")

    @property
    def num_workers(self) -> int:
        """Return the number of processes of one engine (vLLM)."""
        return self.tensor_parallel * self.pipeline_parallel

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        """Remove a trailing slash. The URL is stored with the dump, so it must hold no secret; errors never show it."""
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("this must be an http:// or https:// address, e.g. http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "this must hold no user, password, query or fragment: the recipe is stored beside the dump. "
                "Give the server's key in the environment variable BLD_API_KEY."
            )
        return url.rstrip("/")
