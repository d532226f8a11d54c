"""The ways to train that the quality benchmark compares: what is fixed of each, and the settings that are searched.

A setting is a tuple of recipe overrides. Every method has equally many, so that the search gives each the same budget.
"""

from itertools import product
from typing import NamedTuple

NUM_SETTINGS = 6


class Method(NamedTuple):
    """One way to train: `fixed` overrides, and axes whose product are its settings."""

    fixed: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]

    def settings(self) -> list[tuple[str, ...]]:
        return [(*self.fixed, *chosen) for chosen in product(*self.axes)]


def objectives(**weights: float) -> str:
    """An override that sets all weights; those not named are 0."""
    values = {"ce": 0.0, "byte_ce": 0.0, "kl": 0.0, "alm": 0.0} | weights
    return "train.objectives={" + ", ".join(f"{name}: {weight}" for name, weight in values.items()) + "}"


def rates(*rates: float) -> tuple[str, ...]:
    return tuple(f"train.lr={rate:.1e}" for rate in rates)


def interface(name: str) -> str:
    return f"student.interface={name}"


_THREE = rates(1e-4, 3e-4, 6e-4)
_OWN_RATE = ("train.interface_lr=1", "train.interface_lr=10")

METHODS: dict[str, Method] = {
    "sft": Method((objectives(ce=1),), (rates(3e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3),)),
    "alm": Method((), (_THREE, (objectives(ce=1, alm=100), objectives(alm=100)))),
    "linear": Method((interface("linear"), objectives(ce=1, byte_ce=1, kl=0.1)), (_THREE, _OWN_RATE)),
    "causal": Method((interface("causal"), objectives(ce=1, byte_ce=1, kl=0.1)), (_THREE, _OWN_RATE)),
    "causal kl": Method((interface("causal"), objectives(ce=1, byte_ce=0.1, kl=1)), (_THREE, _OWN_RATE)),
    "token_marginal": Method(
        (interface("token_marginal"),), (_THREE, (objectives(ce=0.3, kl=1), objectives(ce=0.1, kl=1)))
    ),
    "token_marginal, pure": Method(
        (interface("token_marginal"), objectives(kl=1)),
        (_THREE, ("train.kl_direction=forward", "train.kl_direction=jensen_shannon")),
    ),
    "token_marginal + alm": Method(
        (interface("token_marginal"),),
        (_THREE, (objectives(kl=1, alm=30), objectives(ce=0.3, kl=1, alm=30))),
    ),
}
