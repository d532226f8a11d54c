"""The ways to train that the quality benchmark compares: what is fixed of each, and the settings that are searched.

A setting is a tuple of recipe overrides. Every method has the same rates to choose from, so that the search gives each the same budget.
A method may be varied where it is asked for: `"token_marginal student.max_token_end=1"` is that method with an override more.
"""

import shlex
from typing import NamedTuple


class Method(NamedTuple):
    """One way to train: `fixed` overrides, those of one of `RATES`, and `varied` ones, which come last and so win."""

    fixed: tuple[str, ...]
    varied: tuple[str, ...] = ()

    def settings(self) -> list[tuple[str, ...]]:
        return [
            (*self.fixed, f"train.lr={lr:.1e}", f"train.embedding_lr={factor}", *self.varied) for lr, factor in RATES
        ]


# Of the model's body, and of its embedding and head as a multiple: a moved student's new rows have further to go.
RATES = ((3e-4, 1), (1e-4, 3), (1e-4, 10), (3e-4, 3))


def objectives(**weights: float) -> str:
    """An override that sets all weights; those not named are 0."""
    values = {"ce": 0.0, "byte_ce": 0.0, "kl": 0.0, "alm": 0.0} | weights
    return "train.objectives={" + ", ".join(f"{name}: {weight}" for name, weight in values.items()) + "}"


def interface(name: str) -> str:
    return f"student.interface={name}"


OWN_RATE = "train.interface_lr=10"  # at the body's an interface of new parameters has learned nothing after 10 steps

METHODS: dict[str, Method] = {
    "sft": Method((objectives(ce=1),)),
    "alm": Method((objectives(ce=1, alm=100),)),
    "linear": Method((interface("linear"), objectives(ce=1, byte_ce=1, kl=0.1), OWN_RATE)),
    "causal": Method((interface("causal"), objectives(ce=1, byte_ce=1, kl=1), OWN_RATE)),
    "token_marginal": Method((interface("token_marginal"), objectives(ce=0.3, kl=1))),
    "token_marginal_pure": Method((interface("token_marginal"), objectives(kl=1))),
    "token_marginal_alm": Method((interface("token_marginal"), objectives(ce=0.1, kl=1, alm=100))),
}


def method_of(text: str) -> Method:
    """`NAME [override ...]`, words as in a shell. Raises ValueError for a name that is not known."""
    name, *varied = shlex.split(text)
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]._replace(varied=tuple(varied))
