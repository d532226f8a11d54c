"""Which engines there are, and how the one that a recipe names is opened. Nothing below imports this module."""

from pipeline.config import PlacementConfig, TeacherConfig
from stage1_teacher.engines.base import Engine


def open_engine(
    model: str, teacher: TeacherConfig, placement: PlacementConfig, branches: bool = False, over_machines: bool = False
) -> Engine:
    """The engine that the recipe names, with `model` (a local folder or hub id) loaded.

    Args:
        branches: it will be asked for some.
        over_machines: this process is a Ray actor in the first bundle of a placement group that has a GPU for each of the engine's
            workers (vLLM).

    Raises ValueError for a served teacher, which gives no hidden states.
    """
    if teacher.engine == "openai":
        raise ValueError("a served teacher gives no hidden states; for this, use teacher.engine: vllm or transformers")
    if teacher.engine == "vllm":
        from stage1_teacher.engines.vllm import VllmEngine

        return VllmEngine(model, teacher, placement, branches, over_machines)
    from stage1_teacher.engines.huggingface import TransformersEngine

    return TransformersEngine(model, teacher, placement, branches)
