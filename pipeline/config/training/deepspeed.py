"""DeepSpeed's part of the train section."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section


class DeepSpeedConfig(Section):
    """Distribution of the training over memory and ranks by DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="Sharded across ranks: 1 the optimizer's state, 2 also gradients, 3 also weights."
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="Device of the optimizer's state and step; cpu needs zero_stage 1 or more."
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        "none", description="Where weights are kept while not in use; cpu needs zero_stage 3."
    )
    config: str | None = Field(
        None,
        description="Your own DeepSpeed JSON, merged over the derived one (RUN/deepspeed.json). Keys that the recipe "
        "decides are refused.",
    )

    @model_validator(mode="after")
    def _stage_can_offload(self) -> "DeepSpeedConfig":
        for name, min_stage in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, name) != "none" and self.zero_stage < min_stage:
                raise ValueError(
                    f"train.deepspeed.{name}: {getattr(self, name)} needs train.deepspeed.zero_stage {min_stage} or "
                    f"more, not {self.zero_stage}"
                )
        return self
