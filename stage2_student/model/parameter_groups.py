"""The parameters that learn, in groups that share a learning rate and a weight decay."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from stage2_student.model.student import Student

_MATRIX_AXES = 2


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike.

    Attributes:
        factor: their multiple of the learning rate.
        weight_decay: how much each step shrinks them, as a multiple of that rate.
    """

    factor: float
    weight_decay: float
    parameters: list[nn.Parameter]


def parameter_groups(student: Student) -> list[ParameterGroup]:
    """Return a student's parameters that learn; the others stay frozen.

    Without weight decay, or with `train.decay: all`, there is a group for each rate, as in the first release: a
    checkpoint holds the optimizer's state by group.
    """
    train = student.train_config
    embeddings = (student.lm.get_input_embeddings(), student.lm.get_output_embeddings())
    embedding_ids = {id(parameter) for module in embeddings for parameter in module.parameters()}
    spared_ids = set() if train.decay == "all" else {id(parameter) for parameter in _not_matrices(student)}
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        factor = train.embedding_lr if id(parameter) in embedding_ids else 1.0
        if name.startswith("interface."):
            factor = train.interface_lr
        if parameter.requires_grad:
            decay = 0.0 if id(parameter) in spared_ids else train.weight_decay
            found.setdefault((factor, decay), []).append(parameter)
    return [ParameterGroup(*key, parameters) for key, parameters in found.items()]


def _not_matrices(student: nn.Module) -> Iterator[nn.Parameter]:
    """Yield embeddings, norms, biases, scalars, and the logarithms of decay rates (`A_log`, of state space models).

    By the module's kind, because some of them have two axes: a norm of each head (Cohere), a bias of each expert
    (GPT-OSS). An embedding that is the head as well is one of them, a head of its own is a matrix.
    """
    for module in student.modules():
        is_spared = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if is_spared or "bias" in name or name == "A_log" or parameter.ndim < _MATRIX_AXES:
                yield parameter
