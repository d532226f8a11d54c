"""Training methods of the quality benchmark: the fixed part of each, and the settings searched.

A setting is a tuple of recipe overrides: rates and weights. Every method has as many, `NUM_SETTINGS`, so that the
search gives each the same budget: the method's first weights at several rates, and its other weights at the first of
them; the fewer weights, the more rates. A method may be varied where it is asked for: `"token_marginal
student.max_token_end=1"` is that method with an override more.
"""

import shlex
from collections.abc import Mapping
from typing import NamedTuple

# Of the model's body, and of its embedding and head as a multiple: a moved student's new rows have further to go. The
# first is the best by divergence of two searches of rates alone, at 10 steps and at 50.
RATES = ((1e-4, 3), (3e-5, 10), (3e-4, 1), (1e-4, 10), (3e-4, 3))
NUM_SETTINGS = len(RATES)


class Method(NamedTuple):
    """A training method: `fixed` overrides, those of its `weights`, of one of `RATES`, and `varied` ones.

    `varied` overrides come last and so win.
    """

    fixed: tuple[str, ...]
    weights: tuple[str, ...]
    varied: tuple[str, ...] = ()

    def settings(self) -> list[tuple[str, ...]]:
        assert len(self.weights) <= NUM_SETTINGS, (
            "more weights than settings: a method would have a larger budget than others"
        )
        first, *others = self.weights
        chosen = [(first, rates) for rates in RATES[: NUM_SETTINGS - len(others)]]
        chosen += [(weights, RATES[0]) for weights in others]
        return [
            (*self.fixed, weights, f"train.lr={lr:.1e}", f"train.embedding_lr={factor}", *self.varied)
            for weights, (lr, factor) in chosen
        ]


def objectives(**weights: float) -> str:
    """Return an override that sets all weights; those not named are 0."""
    values = {"ce": 0.0, "byte_ce": 0.0, "kl": 0.0, "alm": 0.0} | weights
    return "train.objectives={" + ", ".join(f"{name}: {weight}" for name, weight in values.items()) + "}"


def interface(name: str) -> str:
    return f"student.interface={name}"


OWN_RATE = "train.interface_lr=10"  # at the body's an interface of new parameters has learned nothing after 10 steps

METHODS: dict[str, Method] = {
    "sft": Method((), (objectives(ce=1),)),
    "alm": Method((), (objectives(ce=1, alm=100), objectives(ce=1, alm=10), objectives(ce=1, alm=1000))),
    "linear": Method(
        (interface("linear"), OWN_RATE),
        (
            objectives(ce=1, byte_ce=1, kl=0.1),  # the paper's
            objectives(ce=1, byte_ce=1, kl=1),
            objectives(ce=1, byte_ce=0.1, kl=0.1),
        ),
    ),
    "causal": Method(
        (interface("causal"), OWN_RATE),
        (
            objectives(ce=1, byte_ce=1, kl=1),
            objectives(ce=1, byte_ce=1, kl=0.1),
            objectives(ce=1, byte_ce=0.1, kl=0.1),
        ),
    ),
    "token_marginal": Method(
        (interface("token_marginal"),), tuple(objectives(ce=weight, kl=1) for weight in (0.3, 0.1, 1))
    ),
    "token_marginal_pure": Method((interface("token_marginal"),), (objectives(kl=1),)),
    "token_marginal_alm": Method(
        (interface("token_marginal"),),
        tuple(objectives(ce=ce, kl=1, alm=alm) for ce, alm in ((0.1, 100), (0.3, 100), (0.3, 10))),
    ),
}


def method_of(text: str, methods: Mapping[str, Method] = METHODS) -> Method:
    """Parse `NAME [override ...]`, words as in a shell.

    Raises ValueError for an unknown name.
    """
    name, *varied = shlex.split(text)
    if name not in methods:
        raise ValueError(f"no method {name!r}; known: {', '.join(methods)}")
    return methods[name]._replace(varied=tuple(varied))
