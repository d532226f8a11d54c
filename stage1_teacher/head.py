"""The teacher's output head, its rows sorted by token bytes, applied to hidden states chunk by chunk.

The whole softmax is reduced to bytes right beside the logits (`stage1_teacher.reduce`); no log-probability of a token becomes a
Python object.

Shape legend: R rows, D hidden size, C sorted columns.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import cached_file

from pipeline.vocabulary import Vocabulary


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """float32 matrix products on a CPU may round their factors to bfloat16, and still add up in float32.

    Exact for factors that are bfloat16 numbers, and faster: by oneDNN, which has kernels for it, instead of by torch's default (on an
    AMD EPYC 0.6 of the time). The switch is the whole process's, not the thread's.
    """
    backend: Any = torch.backends.mkldnn  # whose stubs lack `matmul`
    products = backend.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


class Head:
    """Hidden states to logits in sorted columns.

    Args:
        weight_VD: rows by token id, as the checkpoint has them.
        bias_V: or None.
        scale: logits are multiplied by it (Cohere's logit_scale; 1 / Granite's logits_scaling).
        soft_cap: logits become cap * tanh(logits / cap) (Gemma 2); 0 for none.
        alone: nothing else multiplies matrices in this process while `logits` does; see `bfloat16_products`.
    """

    def __init__(
        self,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        vocabulary: Vocabulary,
        scale: float = 1.0,
        soft_cap: float = 0.0,
        alone: bool = False,
    ) -> None:
        order = torch.from_numpy(vocabulary.order)
        # In float32 on a CPU: its products round the sum to the inputs' dtype, and bfloat16 logits are off by up to 0.1.
        self.weight_CD = weight_VD[order].float()
        self.bias_C = None if bias_V is None else bias_V[order].float()
        self.scale, self.soft_cap, self.alone = scale, soft_cap, alone
        self._dtype = weight_VD.dtype
        self._room: Tensor | None = None

    def to(self, device: str) -> "Head":
        """Move the head, in place. A GPU holds it in the checkpoint's dtype, and still adds up and rounds to float32."""
        self.weight_CD = self.weight_CD.to(device, torch.float32 if device == "cpu" else self._dtype)
        self.bias_C = None if self.bias_C is None else self.bias_C.to(device)
        self._room = None
        return self

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """R x C float32, on the head's device. The next call overwrites it."""
        weight_CD = self.weight_CD
        logits_RC = self._logits_room(len(hidden_RD))
        hidden_RD = hidden_RD.to(weight_CD.device, weight_CD.dtype)
        if weight_CD.dtype == torch.float32:
            with bfloat16_products() if self._holds_bfloat16(hidden_RD) else nullcontext():
                torch.mm(hidden_RD, weight_CD.T, out=logits_RC)
        else:
            torch.mm(hidden_RD, weight_CD.T, out_dtype=torch.float32, out=logits_RC)
        if self.bias_C is not None:
            logits_RC += self.bias_C
        if self.scale != 1.0:
            logits_RC *= self.scale
        if self.soft_cap:
            logits_RC.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_RC

    def _holds_bfloat16(self, hidden_RD: Tensor) -> bool:
        """Whether both factors are float32 copies of bfloat16 numbers, and this thread may say how they are multiplied."""
        return self.alone and self._dtype == torch.bfloat16 and torch.equal(hidden_RD, hidden_RD.bfloat16().float())

    def _logits_room(self, num_rows: int) -> Tensor:
        """Kept between calls: fresh pages for 25 MB a chunk cost more than the product."""
        if self._room is None or len(self._room) < num_rows:
            self._room = torch.empty(num_rows, len(self.weight_CD), dtype=torch.float32, device=self.weight_CD.device)
        return self._room[:num_rows]


def load_head(
    model: str,
    revision: str | None,
    dtype: torch.dtype,
    token_bytes: tuple[bytes | None, ...],
    end_ids: tuple[int, ...],
    trust: bool,
    alone: bool = False,
) -> tuple[Head, Vocabulary]:
    """Read only the head's tensors of a Hugging Face model, tied or not, and sort them.

    Raises:
        ValueError: the checkpoint holds no safetensors, or not the tensor that the model's head is.
    """
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust)
    text = config.get_text_config()
    names, bias_name, rename = _head_names(config, trust)
    weight_VD = _tensor(model, revision, names, rename).to(dtype)
    bias_V = _tensor(model, revision, [bias_name], rename) if bias_name else None
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    soft_cap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
    vocabulary = Vocabulary(token_bytes, end_ids, len(weight_VD))
    return Head(weight_VD, bias_V, vocabulary, scale, soft_cap, alone), vocabulary


def _head_names(config: object, trust: bool) -> tuple[list[str], str | None, Callable[[str], str]]:
    """Names of the head's weight in the model (several where it is tied), that of its bias, if any, and a checkpoint's in the model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    head = model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    weights = {id(head.weight)} | ({id(model.get_input_embeddings().weight)} if tied else set())
    named = list(model.named_parameters(remove_duplicate=False))
    bias = getattr(head, "bias", None)
    bias_name = next((name for name, parameter in named if bias is not None and parameter is bias), None)
    # GPT-NeoX's checkpoints say embed_out where the model says lm_head.
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def rename(name: str) -> str:
        return rename_source_key(name, renamings, [])[0]

    return [name for name, parameter in named if id(parameter) in weights], bias_name, rename


def _tensor(model: str, revision: str | None, names: list[str], rename: Callable[[str], str]) -> Tensor:
    """The first of `names` that the checkpoint holds, under that name or another that the model reads as it."""
    files = _checkpoint_files(model, revision)
    stored = {rename(name): name for name in files} | {name: name for name in files}
    for name in names:
        if name in stored:
            path = cached_file(model, files[stored[name]], revision=revision)
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor(stored[name])
    raise ValueError(
        f"{model} holds none of the tensors {names}, one of which its head should be; it holds e.g. {sorted(files)[:5]}"
    )


def _checkpoint_files(model: str, revision: str | None) -> dict[str, str]:
    """File of each tensor of the checkpoint."""
    index = cached_file(
        model, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if index is not None:
        weight_map: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return weight_map
    single = cached_file(model, "model.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise ValueError(
            f"{model} holds no model.safetensors: only safetensors are read. Convert it with save_pretrained."
        )
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")
