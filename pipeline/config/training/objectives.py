"""Objectives of the train section: the terms of the loss and their weights."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from pipeline.config.section import Section, added
from pipeline.runtime.plugins import check_name


def _on_tokens(description: str) -> Any:
    """Return the weight of an objective that needs the teacher's tokens in the dump."""
    return Field(0.0, ge=0, description=f"{description} Needs dump.tokens.", json_schema_extra=added("0.2.0", 0.0))


# Objectives that compare tokens of both models; `stage2_student/losses/README.md` has each with its source.
ON_TOKENS = ("token_kl", "strict_kl", "bpm_kl", "xtoken_kl", "uld", "gold", "mined", "cdm")
_READ_NATS = ("uld", "gold")  # of the student's own tokens


class Objectives(Section):
    """Weights of the loss terms; nats per supervised byte.

    Python files of your own may be added to the terms named here: {entropy.py: 0.1}.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0, strict=True)]]

    ce: float = Field(0.3, ge=0, description="Cross-entropy of the student's own tokens.")
    byte_ce: float = Field(0.0, ge=0, description="Cross-entropy of the realised bytes under the interface.")
    kl: float = Field(
        1.0, ge=0, description="Divergence of the interface from the dump's targets (train.kl_direction)."
    )
    # SmolLM2 moved to GPT-2's tokenizer, before training, tau 100: the gradient of ce is 210 to 490 times alm's.
    alm: float = Field(
        0.0,
        ge=0,
        description="Approximate likelihood matching of chunks. Its gradient is small, and smaller with a larger "
        "train.alm_tau: at 100, a weight of some hundreds equals about ce 1.",
    )

    token_kl: float = _on_tokens("Divergence of the next token, for a student with the teacher's tokenizer.")
    strict_kl: float = _on_tokens("The same where both have one token over the same bytes, over shared tokens.")
    bpm_kl: float = _on_tokens("The same wherever tokens of both begin; a token counts as the student's longest in it.")
    xtoken_kl: float = _on_tokens("Divergence over chunks, the student's probabilities projected to the teacher's.")
    uld: float = _on_tokens("Distance of sorted probabilities over chunks (universal logit distillation).")
    gold: float = _on_tokens("Divergence of shared tokens, distance of the sorted others, over chunks.")
    mined: float = _on_tokens("Divergence at 1:1 positions over tokens nearest by edit distance; elsewhere ce.")
    cdm: float = _on_tokens("Divergence at 1:1 positions over pairs of tokens found there (contextual mapping).")

    @property
    def uses_bytes(self) -> bool:
        """Return whether the interface is needed."""
        return self.byte_ce > 0 or self.kl > 0 or bool(self.files)

    @property
    def uses_tokens(self) -> bool:
        """Return whether the log-probabilities of the student's own tokens are needed."""
        return self.ce > 0 or self.alm > 0 or any(name in _READ_NATS for name in self.on_tokens) or bool(self.files)

    @property
    def on_tokens(self) -> tuple[str, ...]:
        """Return the names of the objectives with a weight that need the teacher's tokens."""
        weights = (
            self.token_kl,
            self.strict_kl,
            self.bpm_kl,
            self.xtoken_kl,
            self.uld,
            self.gold,
            self.mined,
            self.cdm,
        )
        return tuple(name for name, weight in zip(ON_TOKENS, weights, strict=True) if weight)

    @property
    def files(self) -> dict[str, str]:
        """Return the operator's own objectives with a weight: name (the file's, as in metrics.jsonl) to file."""
        return {Path(file).stem: file for file, weight in (self.model_extra or {}).items() if weight}

    @property
    def weights(self) -> dict[str, float]:
        """Return all weights by name, including zeros."""
        return {Path(name).stem: weight for name, weight in self.model_dump().items()}

    @model_validator(mode="after")
    def _names_are_known_and_differ(self) -> "Objectives":
        known = tuple(type(self).model_fields)
        for name in self.model_extra or {}:
            check_name(name, known, "objective")
        names = [*known, *(Path(name).stem for name in self.model_extra or {})]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two objectives are called {', '.join(twice)}; give the file another name")
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "Objectives":
        if not any(self.model_dump().values()):
            raise ValueError("all weights are 0, so nothing would be learnt; set one of them above 0")
        return self
