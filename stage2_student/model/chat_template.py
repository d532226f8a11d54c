"""The student's chat template: its tokenizer's own, or, for a student that has moved, the one that the recipe or its
model gives.

A template writes control tokens. Those that the tokenizer lacks are added to it: a moved student brings its rows along.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pipeline.config import StudentConfig
from pipeline.runtime.huggingface import load_tokenizer
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.resolve import resolve_file, resolve_model, resolve_tokenizer


def with_template(wrapped: Any, student: StudentConfig) -> Any:
    """A transformers tokenizer with the chat template that the student is to have, and the control tokens that this
    writes.

    Raises ValueError where nobody has a template.
    """
    if student.chat_template is None and wrapped.chat_template is not None:
        return wrapped
    model = resolve_model(student.source)
    if student.chat_template is None or student.chat_template.endswith(".jinja"):
        donor = load_tokenizer(model)
    else:
        found = resolve_tokenizer(student.chat_template)
        donor = load_tokenizer(ModelSource(found, None, student.trust_remote_code))
    if student.chat_template is not None and student.chat_template.endswith(".jinja"):
        template = Path(resolve_file(student.chat_template)).read_text(encoding="utf-8")
    elif donor.chat_template is not None:
        template = donor.get_chat_template()
    else:
        source = student.chat_template or f"neither {student.tokenizer} nor {student.model}"
        raise ValueError(
            f"student.chat_template: {source} has a chat template, and the dump holds chats; give a .jinja file, or the source of "
            "a tokenizer that has one"
        )
    wrapped.chat_template = template
    written = [t for t in donor.added_tokens_decoder.values() if t.special and t.content in template]
    known = wrapped.get_vocab()
    lacking = [t.content for t in written if t.content not in known]
    wrapped.add_tokens([AddedToken(name, normalized=False, special=True) for name in lacking], special_tokens=True)
    return wrapped
