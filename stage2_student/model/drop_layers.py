"""A smaller student: the same model without some of its layers.

Shape legend: B documents, L tokens, V vocabulary, D hidden width.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def drop_layers(model: Any, dropped: Sequence[int]) -> Any:
    """Return the model without these layers, counted from 0; it shares its weights with `model`.

    The new model is built from a configuration with fewer layers, so that whatever a family decides by layer number
    (its kind of attention, its place in a cache) is decided anew. Then it is compared with the old one with those
    layers skipped.

    Raises:
        ValueError: a layer does not exist, all are dropped, or the model cannot be cut this way.
    """
    name, num_layers = _block_list(model)
    if set(dropped) - set(range(num_layers)):
        raise ValueError(
            f"student.drop_layers {list(dropped)} names layers that do not exist; the model has 0 .. {num_layers - 1}"
        )
    kept = [layer for layer in range(num_layers) if layer not in set(dropped)]
    if not kept:
        raise ValueError(f"student.drop_layers names all {num_layers} layers; leave at least one")
    smaller = type(model)(smaller_config(model.config, kept))
    smaller.generation_config = model.generation_config
    missing, unexpected = smaller.load_state_dict(
        _renumbered(model.state_dict(), name, kept), strict=False, assign=True
    )
    smaller.tie_weights()
    if unexpected or set(missing) - set(smaller.all_tied_weights_keys):
        raise ValueError(
            f"{model.config.model_type}: student.drop_layers cannot cut it: without layers {list(dropped)} it lacks "
            f"weights {missing[:3]} and has no place for {unexpected[:3]}"
        )
    _check_same(smaller.eval(), model.eval(), name, dropped)
    return smaller


def _block_list(model: Any) -> tuple[str, int]:
    """Return the name of the list of layers, and their number.

    Raises:
        ValueError: there is not exactly one such list.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ValueError(
            f"{model.config.model_type}: student.drop_layers needs one list of {num_layers} layers; "
            f"found {outer or 'none'}"
        )
    return outer[0], num_layers


def smaller_config(config: Any, kept: Sequence[int]) -> Any:
    """Return a configuration of the kept layers.

    It has their number, and their entries of each list with a value per layer.
    """
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    num_layers = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(text, key, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)
    return smaller


def _renumbered(weights: dict[str, Tensor], name: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights without those of dropped layers; the others under their new numbers."""
    number = {old: new for new, old in enumerate(kept)}
    layer_weight = re.compile(rf"{re.escape(name)}\.(\d+)\.(.*)")
    renumbered = {}
    for key, value in weights.items():
        match = layer_weight.fullmatch(key)
        if match is None:
            renumbered[key] = value
        elif int(match[1]) in number:
            renumbered[f"{name}.{number[int(match[1])]}.{match[2]}"] = value
    return renumbered


@torch.no_grad()
def _check_same(smaller: Any, model: Any, name: str, dropped: Sequence[int]) -> None:
    """Check that `smaller` gives the same logits as `model` with the dropped layers skipped.

    Raises:
        ValueError: it does not.
    """
    tokens_BL = torch.tensor([[0, 1, 2, 3, 4]])
    blocks = model.get_submodule(name)
    hooks = [blocks[layer].register_forward_hook(_passed_over, with_kwargs=True) for layer in dropped]
    theirs_BLV = model(input_ids=tokens_BL, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    ours_BLV = smaller(input_ids=tokens_BL, use_cache=False).logits
    if not torch.equal(ours_BLV, theirs_BLV):
        raise ValueError(
            f"{model.config.model_type}: student.drop_layers cannot cut it: the logits of the model with fewer layers "
            f"differ by {(ours_BLV - theirs_BLV).abs().max().item():.3g} from those with layers {list(dropped)} skipped"
        )


def _passed_over(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """Return the layer's input in the form of its output, as a layer that changes nothing."""
    hidden_BLD = arguments[0] if arguments else named["hidden_states"]
    return (hidden_BLD, *output[1:]) if isinstance(output, tuple) else hidden_BLD
