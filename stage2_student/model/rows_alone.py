"""Training of a model's rows alone: its embedding and its head, with all else frozen."""

from typing import Any


def freeze_body(lm: Any) -> None:
    """Freeze everything of a causal language model but its embedding and its head, in place."""
    lm.requires_grad_(False)
    for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        module.requires_grad_(True)
