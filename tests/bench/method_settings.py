"""The methods of the benchmark `methods`, each with the weights that are searched, and the pairs of models.

As in `tests.bench.quality_methods`, every method has as many settings, of rates and weights together. The first weights
of a method are those of its authors, where they are known (`-o NAME`), balanced by the authors' rule if they have one.
"""

from typing import NamedTuple

from pipeline.config.training.objectives import ON_TOKENS
from tests.bench.quality_methods import OWN_RATE, Method, interface
from tests.bench.quality_methods import objectives as on_bytes

# Relative, so that a setting is the same on every machine: benchmarks run in the repository's folder.
DENSE, DRAWN = (f"tests/bench/{name}_token_kl.py" for name in ("dense", "drawn"))


class Pair(NamedTuple):
    """A teacher and a student, by a recipe and what is changed in it."""

    recipe: str
    overrides: tuple[str, ...] = ()


_RECIPES = "pipeline/recipes"
PAIRS = {
    "gpt2": Pair(f"{_RECIPES}/demo.yaml"),
    "mistral": Pair(f"{_RECIPES}/demo_mistral.yaml"),
    "gemma": Pair(f"{_RECIPES}/demo_gemma.yaml"),
    # The teacher without four layers: the bound, where a token's own distribution can be used.
    "same-tokenizer": Pair(f"{_RECIPES}/demo.yaml", ("student.tokenizer=null", "student.drop_layers=[14, 15, 16, 17]")),
}
SAME = "same-tokenizer"


def objectives(**weights: float) -> str:
    """Return an override that sets all weights; those not named are 0."""
    zeros = dict.fromkeys(ON_TOKENS, 0.0)
    return on_bytes(**{**zeros, **weights})


def own_objective(file: str) -> str:
    """Return an override that trains with an objective in a file alone."""
    return objectives().removesuffix("}") + f", {file}: 1.0}}"


def _weighed(name: str, *of_ce: float) -> tuple[str, ...]:
    """Return an objective's weights: alone, then with cross-entropy."""
    return tuple(objectives(**{name: 1.0, "ce": weight}) for weight in of_ce)


_MARGINAL = Method((interface("token_marginal"),), tuple(objectives(ce=ce, kl=1) for ce in (0.3, 1.0, 0.0)))
_ALM = ("train.alm_space=true", "train.alm_end=true")

ACROSS: dict[str, Method] = {
    "sft": Method((), (objectives(ce=1),)),
    "token_marginal": _MARGINAL,
    "linear": Method(  # the paper's
        (interface("linear"), OWN_RATE), (objectives(ce=1, byte_ce=1, kl=0.1), objectives(ce=1, byte_ce=0.1, kl=0.1))
    ),
    "causal": Method(
        (interface("causal"), OWN_RATE), (objectives(ce=1, byte_ce=0.1, kl=0.1), objectives(ce=1, byte_ce=1, kl=1))
    ),
    "alm": Method(_ALM, (objectives(alm=1),)),
    "alm_sft": Method((*_ALM, "train.balance=gradient"), (objectives(ce=1, alm=1),)),
    "alm_weighed": Method((), (objectives(ce=1, alm=100), objectives(ce=1, alm=10), objectives(ce=1, alm=1000))),
    "strict": Method((), _weighed("strict_kl", 0.0, 0.3, 1.0)),
    "strict_dropped": Method(("train.token_tail=drop",), _weighed("strict_kl", 0.0, 0.3, 1.0)),
    "bpm": Method((), _weighed("bpm_kl", 0.0, 0.3, 1.0)),
    "xtoken": Method(("train.token_tail=drop", "train.balance=loss"), (objectives(ce=1, xtoken_kl=1),)),
    "xtoken_weighed": Method((), _weighed("xtoken_kl", 0.0, 0.3, 1.0)),
    "uld": Method((), (objectives(ce=1, uld=1.5), objectives(ce=1, uld=0.15), objectives(ce=1, uld=15))),
    "gold": Method((), _weighed("gold", 0.0, 0.3, 1.0)),
    "mined": Method((), (*_weighed("mined", 0.0), *_weighed("mined", 1.0))),
    "mined_tempered": Method(("train.kl_temperature=2",), _weighed("mined", 0.0)),  # as tokenkit has it
    "cdm": Method(("train.kl_temperature=2",), (objectives(ce=0.5, cdm=0.5), objectives(ce=0.1, cdm=1))),
}
OF_ONE_TOKENIZER: dict[str, Method] = {
    "sft": ACROSS["sft"],
    "dense": Method((), (own_objective(DENSE),)),  # the teacher in memory
    "drawn_12": Method((), (own_objective(DRAWN),)),  # the same: a dump stores no draws
    "top_16": Method((), (objectives(token_kl=1),)),
    "top_16_dropped": Method(("train.token_tail=drop",), (objectives(token_kl=1),)),
    "top_16_reverse": Method(("train.kl_direction=reverse",), (objectives(token_kl=1),)),
    "token_marginal": Method((interface("token_marginal"),), (objectives(kl=1),)),
    "token_marginal_ce": _MARGINAL,
}


def methods_of(pair: str) -> dict[str, Method]:
    """Return the methods that can be compared with a pair of models."""
    return OF_ONE_TOKENIZER if pair == SAME else ACROSS
