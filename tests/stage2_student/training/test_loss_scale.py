"""The loss scale of float16."""

from stage2_student.training.loss_scale import GROWTH_STEPS, MAX_FACTOR, LossScale, first_scale


def test_a_loss_scale_halves_on_overflow_and_doubles_after_a_thousand_clean_steps() -> None:
    assert first_scale("bfloat16") is None and first_scale("float32") is None
    scale = first_scale("float16")
    assert scale == LossScale(2.0**16)
    scale = scale.after_step().after_overflow()
    assert scale == LossScale(2.0**15)
    for _ in range(GROWTH_STEPS):
        scale = scale.after_step()
    assert scale == LossScale(2.0**16)
    assert LossScale(MAX_FACTOR, GROWTH_STEPS - 1).after_step() == LossScale(MAX_FACTOR)
    assert not LossScale(1.0).can_shrink
