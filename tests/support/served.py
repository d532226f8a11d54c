"""Engines and recipes of a teacher behind a server."""

from pathlib import Path
from typing import Any

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.engines.openai_server import OpenAIEngine
from tests.stage1_teacher.dump.test_run import TEXTS, write_recipe

END_ID = 268


def open_engine(
    url: str, tokenizer: ByteTokenizer, placement: dict[str, Any] | None = None, **teacher: Any
) -> OpenAIEngine:
    defaults = {"model": "tiny", "engine": "openai", "max_tokens": 64, "overlap_tokens": 8, "prompt_logprobs": 5}
    return OpenAIEngine(
        TeacherConfig.model_validate(defaults | teacher),
        PlacementConfig.model_validate({"base_url": url, "request_attempts": 3} | (placement or {})),
        tokenizer,
        END_ID,
        END_ID,
    )


def served_recipe(folder: Path, model: Path, url: str, *more: str) -> tuple[Path, list[str]]:
    """Return the tiny dump's recipe, and the overrides that make its teacher a served one."""
    recipe = write_recipe(folder, model, TEXTS[:6])
    return recipe, ["teacher.engine=openai", "teacher.served_model=tiny", f"placement.base_url={url}", *more]
