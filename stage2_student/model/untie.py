"""A head of its own for a model whose head is its embedding."""

from typing import Any

from torch import nn

# vLLM applies the embedding as the head of these, whatever their config says; an export would be another model there.
ALWAYS_TIED = frozenset(
    {"cohere", "cohere2", "cohere2_moe", "gemma2", "gemma3n", "gemma3n_text", "lfm2", "lfm2_moe", "zamba2"}
)


def is_tied(model: Any) -> bool:
    """Return whether the head of a causal language model is its embedding."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def untie(model: Any) -> None:
    """Give a tied model a head of its own, in place, at first with the same rows; one that has it stays as it is.

    Raises:
        ValueError: engines read every model of this type as tied.
    """
    if not is_tied(model):
        return
    kind = model.config.get_text_config().model_type
    head = model.get_output_embeddings()
    if head is None or kind in ALWAYS_TIED:
        raise ValueError(
            f"student.transfer.tie: a model of type {kind} cannot have a head of its own, because engines take its "
            "embedding for the head; set student.transfer.tie=keep, and one kind of rows as student.transfer.input and "
            "student.transfer.output"
        )
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
