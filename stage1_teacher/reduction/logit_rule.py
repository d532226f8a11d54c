"""The rule from a model's head products to its logits: a factor, a soft cap, suppressed tokens, or nothing.

Config keys are no guide: `logits_scaling` divides in Granite and multiplies in HyperCLOVA X, other models have
`lm_head_multiplier`, `logits_soft_cap` or `output_multiplier`, and one engine may do before the head what another does
after it. So the rule is probed: an engine's model is given numbers in place of its head's products, and the rule is
fitted to the logits that it makes of them.

Shape legend: R rows of the probe, V token ids.
"""

from typing import NamedTuple

import numpy as np

PROBE_ROWS = 4
CLOSE, CLOSE_IN_HALF = 1e-5, 1e-2  # relative: float32 keeps seven digits, bfloat16 two


class LogitRule(NamedTuple):
    """The rule: logits are `soft_cap * tanh(scale * x / soft_cap)` of the head's products x.

    They are `scale * x` if `soft_cap` is 0; those of the ids `suppressed` are minus infinity.
    """

    scale: float = 1.0
    soft_cap: float = 0.0
    suppressed: tuple[int, ...] = ()


def probe_products(num_ids: int) -> np.ndarray:
    """Make probe products, R x V float32, of both signs and all sizes from 1e-4 to 1e7, each a bfloat16 number."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-4, 7, size=(PROBE_ROWS, num_ids))
    # Every row has both extremes, however small the vocabulary.
    sizes[:, 0], sizes[:, -1] = 1e-4, 1e7
    products = (sizes * rng.choice([-1.0, 1.0], size=sizes.shape)).astype(np.float32)
    return (products.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def fit_rule(products_RV: np.ndarray, logits_RV: np.ndarray, name: str, in_half: bool = False) -> LogitRule:
    """Return the rule that maps these products to these logits.

    Args:
        name: the model's class, for the error.
        in_half: the logits were in a 16-bit type.
    Raises:
        ValueError: no rule does.
    """
    x, logits = products_RV.astype(np.float64), logits_RV.astype(np.float64)
    possible_V = ~np.isneginf(logits).all(axis=0)
    x, logits = x[:, possible_V], logits[:, possible_V]
    small, large = np.abs(x) <= max(1e-3, np.abs(x).min()), np.abs(x) >= min(1e6, np.abs(x).max())
    slope = float(np.median(logits[small] / x[small]))
    cap = float(np.median(np.abs(logits[large])))
    is_capped = 0 < cap < 0.5 * slope * float(np.median(np.abs(x[large])))
    rule = LogitRule(_plain(slope), _plain(cap) if is_capped else 0.0, tuple(np.flatnonzero(~possible_V).tolist()))
    expected = rule.soft_cap * np.tanh(rule.scale * x / rule.soft_cap) if is_capped else rule.scale * x
    if not slope > 0 or not np.allclose(logits, expected, rtol=CLOSE_IN_HALF if in_half else CLOSE, atol=0):
        raise ValueError(
            f"{name} does more to its logits than a factor, a soft cap and suppressed tokens, so its hidden states "
            "alone do not determine its targets. Let `vllm serve` give its own log-probabilities instead "
            "(teacher.engine: openai)"
        )
    return rule


def _plain(value: float) -> float:
    """Undo float32's rounding: return the nearest number of six digits, or inverse of one, or else the value."""
    short, inverse = float(f"{value:.6g}"), float(f"{1 / value:.6g}") if value else 0.0
    candidates = [short, 1 / inverse] if inverse else [short]
    nearest = min(candidates, key=lambda candidate: abs(candidate - value))
    return nearest if abs(nearest - value) <= 2e-7 * abs(value) else value
