"""All options of this room: what each needs of the machine and of the model, checked before weights are loaded."""

from pipeline.config import StudentConfig, TrainConfig
from stage2_student.acceleration.attention import check_attention
from stage2_student.acceleration.compilation import check_compile
from stage2_student.acceleration.eight_bit import check_optimizer
from stage2_student.acceleration.four_bit import check_base
from stage2_student.acceleration.fused_ce import check_fused_ce
from stage2_student.acceleration.marginal_kernel import check_marginal_kernel


def check_options(train: TrainConfig, student: StudentConfig) -> None:
    """Raise ValueError, naming the option and the way out, if this machine lacks what a named option needs."""
    check_master_weights(train, student.interface in ("causal", "linear"))
    check_attention(train)
    check_compile(train)
    check_optimizer(train)
    check_fused_ce(train)
    check_marginal_kernel(train, student)
    check_base(student, train)


def check_master_weights(train: TrainConfig, interface_has_weights: bool) -> None:
    """Raise ValueError if `train.precision` would round the weights of a byte interface, which computes in float32."""
    if train.precision == "bf16_master" and interface_has_weights and train.objectives.uses_bytes:
        raise ValueError(
            "train.precision: bf16_master makes all weights bfloat16, and a byte interface with weights of its own "
            "computes in float32: set student.interface=token_marginal, which has none, or train.precision=autocast"
        )
