"""Texts that the student writes while it is trained, from fixed prompts; nothing is drawn at random."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config import SamplesConfig
from pipeline.runtime import log
from pipeline.runtime.huggingface import without_own_sampling
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.conversation import Conversation
from pipeline.tokenization.special_ids import SpecialIds
from schemas.json_text import json_text
from stage2_student.acceleration.compilation import without_compiling

FILE = "samples.jsonl"  # in the run's folder: {"step", "prompt", "text"}


class Samples:
    """The prompts in the student's tokens.

    Args:
        chat: the tokenizer with its template, if the student learns from chats: prompts are then a user's messages.
    Raises:
        ValueError: the tokenizer cannot spell a prompt, or the template writes no prompt for the assistant's turn.
    """

    def __init__(
        self, config: SamplesConfig, tokenizer: ByteTokenizer, chat: ChatTokenizer | None, ids: SpecialIds
    ) -> None:
        self.config, self.ids, self._tokenizer = config, ids, tokenizer
        self.prompts = [_prompt_tokens(prompt, tokenizer, chat, ids.document_start) for prompt in config.prompts]

    def is_due(self, step: int, last: bool) -> bool:
        """Tell whether texts are written after this step."""
        return last or step % self.config.every == 0

    def write(self, student: Any, step: int, run: Path) -> None:
        """Write a text after each prompt, append them to the run's file, and show them in the log.

        Args:
            student: a `stage2_student.model.student.Student` with whole weights.
        """
        device = student.lm.device
        with (run / FILE).open("a", encoding="utf-8") as file, _evaluating(student), without_compiling():
            for prompt, tokens in zip(self.config.prompts, self.prompts, strict=True):
                with torch.no_grad(), student.precision.context(device.type):
                    written_BL = student.lm.generate(
                        torch.tensor([tokens], device=device),
                        attention_mask=torch.ones(1, len(tokens), dtype=torch.long, device=device),
                        do_sample=False,
                        max_new_tokens=self.config.max_new_tokens,
                        eos_token_id=list(self.ids.ends),
                        pad_token_id=self.ids.end,
                        use_cache=True,
                    )
                text = self.text(written_BL[0, len(tokens) :].tolist())
                file.write(json_text({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
                log.info(f"step {step}, after {prompt!r}: {text!r}")

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens spell, up to END; bytes that are no text are replaced."""
        token_bytes = self._tokenizer.token_bytes
        spelled = [token_bytes[i] or b"" for i in tokens if i not in self.ids.ends and i < len(token_bytes)]
        return b"".join(spelled).decode(errors="replace")


def _prompt_tokens(prompt: str, tokenizer: ByteTokenizer, chat: ChatTokenizer | None, start_id: int) -> list[int]:
    if chat is None:
        return [start_id, *tokenizer.encode(prompt.encode())]
    try:
        return chat.encode_prompt(Conversation(({"role": "user", "content": prompt},)))[0]
    except ValueError as error:
        raise ValueError(f"train.samples: {prompt!r} as a user's message: {error}") from error


@contextlib.contextmanager
def _evaluating(student: Any) -> Any:
    """Put the student in evaluation mode, and back."""
    student.eval()
    try:
        with without_own_sampling(student.lm):
            yield
    finally:
        student.train()
