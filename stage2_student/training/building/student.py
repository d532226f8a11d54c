"""The student of a run: its start model, adapters, interface and objectives, checked to be one that can be trained."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Recipe, student_config
from pipeline.runtime.causality import check_causal
from pipeline.runtime.huggingface import check_positions
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.acceleration.attention import use_attention
from stage2_student.acceleration.options import check_master_weights
from stage2_student.interfaces import StudentShape, make_interface
from stage2_student.losses.objectives import NONE, objectives_on_tokens
from stage2_student.model.initial_student import load_start, tokenizer_moved
from stage2_student.model.lora import add_adapters, expert_weights, mixture_remarks
from stage2_student.model.rows_alone import freeze_body
from stage2_student.model.student import Student
from stage2_student.runs import folder
from stage2_student.training.building.partitioned import empty_start
from stage2_student.training.teacher_vocabulary import tokenizer_pair


def build_student(
    recipe: Recipe, tokenizer: ByteTokenizer, ids: SpecialIds, manifests: Sequence[Manifest] = (), whole: bool = True
) -> Student:
    """Load the start model, with its interface if an objective needs one, in float32 on the CPU.

    Args:
        manifests: of each corpus' dump; needed if an objective compares tokens.
        whole: read and test its weights; else they have no values yet (`stage2_student.training.building.partitioned`).
    """
    config = student_config(recipe)
    start = Path(config.path) / "start"
    lm = (load_start if whole else empty_start)(start, config.trust_remote_code)
    check_positions(lm.config, recipe.train.piece_tokens, "train.max_tokens")
    if not recipe.train.attention_on_gpu:
        use_attention(lm, recipe.train)
    by_peft = folder.adapters_by_peft(start.parent)
    lora_remarks = tuple(mixture_remarks(lm, config, by_peft))
    if config.lora_rank:
        if recipe.train.deepspeed.zero_stage == 3 and set(expert_weights(lm).values()) & set(config.lora_targets):
            raise ValueError(
                "student.lora_targets names experts' weights, which train.deepspeed.zero_stage 3 partitions, and "
                "adapters on partitioned weights are not known to be right: give train.deepspeed.zero_stage 2 or less"
            )
        add_adapters(lm, config, tokenizer_moved(start), by_peft)
    elif config.trained == "rows":
        freeze_body(lm)
    if recipe.train.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    shape = StudentShape.of(lm, tokenizer, ids)
    interface = make_interface(config, shape) if recipe.train.objectives.uses_bytes else None
    if interface is not None and recipe.train.interface_warmup_steps and not any(True for _ in interface.parameters()):
        raise ValueError(
            f"train.interface_warmup_steps is {recipe.train.interface_warmup_steps}, but student.interface "
            f"{config.interface} has no parameters to warm up; set 0"
        )
    if interface is not None:
        check_master_weights(recipe.train, any(True for _ in interface.parameters()))
    on_tokens = NONE
    if manifests and recipe.train.objectives.on_tokens:
        pair = tokenizer_pair(recipe, manifests, tokenizer, ids, shape.head_rows)
        on_tokens = objectives_on_tokens(pair, recipe.train)
    student = Student(lm, interface, recipe.train, on_tokens)
    student.remarks = lora_remarks
    if whole:
        student.eval()
        check_causal(lm, config.model)
        student.find_logit_scale()
    return student.train()
