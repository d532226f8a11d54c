"""The teacher's output head, its rows sorted by token bytes, applied to hidden states chunk by chunk.

The whole softmax is reduced to bytes right beside the logits; no log-probability of a token becomes a Python object.

Shape legend: R rows, D hidden size, C sorted columns and one more, which holds 0.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from pipeline.covering import MIN_LOGIT
from pipeline.vocabulary import Vocabulary


class Head:
    """Hidden states to unnormalised probabilities in sorted columns.

    Args:
        weight_VD: rows by token id, as the checkpoint has them.
        bias_V: or None.
        scale: logits are multiplied by it (Cohere's logit_scale; 1 / Granite's logits_scaling).
        soft_cap: logits become cap * tanh(logits / cap) (Gemma 2); 0 for none.
    """

    def __init__(
        self,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        vocabulary: Vocabulary,
        scale: float = 1.0,
        soft_cap: float = 0.0,
    ) -> None:
        order = torch.from_numpy(vocabulary.order)
        self.weight_CD = torch.cat([weight_VD[order], torch.zeros_like(weight_VD[:1])])
        self.bias_C = None if bias_V is None else torch.cat([bias_V[order], torch.zeros_like(bias_V[:1])]).float()
        self.scale, self.soft_cap = scale, soft_cap
        self._raw: Tensor | None = None
        self._float: Tensor | None = None

    def to(self, device: str) -> "Head":
        """Move the head, in place."""
        self.weight_CD = self.weight_CD.to(device)
        self.bias_C = None if self.bias_C is None else self.bias_C.to(device)
        return self

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """R x C float32; the last column is 0 and means nothing. The next call overwrites it."""
        num_rows = len(hidden_RD)
        raw_RC, logits_RC = self._buffers(num_rows)
        torch.mm(hidden_RD.to(self.weight_CD.device, self.weight_CD.dtype), self.weight_CD.T, out=raw_RC)
        if logits_RC.dtype != raw_RC.dtype:
            logits_RC.copy_(raw_RC)
        if self.bias_C is not None:
            logits_RC += self.bias_C
        if self.scale != 1.0:
            logits_RC *= self.scale
        if self.soft_cap:
            logits_RC.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_RC

    def _buffers(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Room for the product in the head's dtype and in float32, kept: fresh pages for 25 MB a chunk cost more than the product."""
        if self._raw is None or len(self._raw) < num_rows:
            shape, device = (num_rows, len(self.weight_CD)), self.weight_CD.device
            self._raw = torch.empty(shape, dtype=self.weight_CD.dtype, device=device)
            is_float32 = self._raw.dtype == torch.float32
            self._float = self._raw if is_float32 else torch.empty(shape, dtype=torch.float32, device=device)
        assert self._float is not None
        return self._raw[:num_rows], self._raw[:num_rows] if self._float is self._raw else self._float[:num_rows]

    @torch.inference_mode()
    def rows(self, hidden_RD: Tensor, chunk: int) -> Iterator[np.ndarray]:
        """Yield each row's unnormalised probabilities, C long, `chunk` rows computed at once. A row dies with the next chunk."""
        for part_RD in hidden_RD.split(chunk):
            logits_RC = self.logits(part_RD)
            logits_RC[:, -1] = -torch.inf
            logits_RC -= logits_RC.amax(dim=1, keepdim=True)
            probs_RC = logits_RC.clamp_(min=MIN_LOGIT).exp_()
            probs_RC[:, -1] = 0.0
            yield from probs_RC.cpu().numpy()


def load_head(
    model: str,
    revision: str | None,
    dtype: torch.dtype,
    token_bytes: tuple[bytes | None, ...],
    end_ids: tuple[int, ...],
    trust: bool,
) -> tuple[Head, Vocabulary]:
    """Read only the head's tensors of a Hugging Face model, tied or not, and sort them.

    Raises:
        ValueError: the checkpoint holds no safetensors, or not the tensor that the model's head is.
    """
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust)
    text = config.get_text_config()
    names, bias_name = _head_names(config, trust)
    weight_VD = _tensor(model, revision, names).to(dtype)
    bias_V = _tensor(model, revision, [bias_name]) if bias_name else None
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    soft_cap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
    vocabulary = Vocabulary(token_bytes, end_ids, len(weight_VD))
    return Head(weight_VD, bias_V, vocabulary, scale, soft_cap), vocabulary


def _head_names(config: object, trust: bool) -> tuple[list[str], str | None]:
    """Names that the head's weight may have in the checkpoint (several where it is tied), and that of its bias, if any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    head = model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    weights = {id(head.weight)} | ({id(model.get_input_embeddings().weight)} if tied else set())
    named = list(model.named_parameters(remove_duplicate=False))
    bias = getattr(head, "bias", None)
    bias_name = next((name for name, parameter in named if bias is not None and parameter is bias), None)
    return [name for name, parameter in named if id(parameter) in weights], bias_name


def _tensor(model: str, revision: str | None, names: list[str]) -> Tensor:
    """The first of `names` that the checkpoint holds."""
    files = _checkpoint_files(model, revision)
    for name in names:
        if name in files:
            path = cached_file(model, files[name], revision=revision)
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor(name)
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
