"""The student's chat template: its tokenizer's own, or, for a student that has moved, the recipe's or its model's.

A template writes control tokens. Those that the tokenizer lacks are added to it; a moved student brings their rows
along.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pipeline.config import StudentConfig
from pipeline.runtime.huggingface import load_tokenizer
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.resolve import resolve_file, resolve_model, resolve_tokenizer


def with_template(wrapped: Any, student: StudentConfig) -> Any:
    """Return a tokenizer with the student's chat template, and with the control tokens that the template writes.

    Args:
        wrapped: the transformers tokenizer; changed in place.
    Raises:
        ValueError: no source has a template.
    """
    if student.chat_template is None and wrapped.chat_template is not None:
        return wrapped
    model = resolve_model(student.source)
    if student.chat_template is None or student.chat_template.endswith(".jinja"):
        donor = load_tokenizer(model)
    else:
        source = resolve_tokenizer(student.chat_template)
        donor = load_tokenizer(ModelSource(source, None, student.trust_remote_code))
    if student.chat_template is not None and student.chat_template.endswith(".jinja"):
        template = Path(resolve_file(student.chat_template)).read_text(encoding="utf-8")
    elif donor.chat_template is not None:
        template = donor.get_chat_template()
    else:
        searched = [student.chat_template] if student.chat_template else [student.tokenizer, student.model]
        raise ValueError(
            f"student.chat_template: there is no chat template in {' or '.join(filter(None, searched))}, "
            "but the dump holds chats; "
            "give a .jinja file, or the source of a tokenizer that has one"
        )
    wrapped.chat_template = template
    written = [t for t in donor.added_tokens_decoder.values() if t.special and t.content in template]
    known = wrapped.get_vocab()
    lacking = [t.content for t in written if t.content not in known]
    wrapped.add_tokens([AddedToken(name, normalized=False, special=True) for name in lacking], special_tokens=True)
    return wrapped
