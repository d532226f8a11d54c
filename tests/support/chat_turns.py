"""Chat templates that write reasoning and tool calls.

Models' own, out of a package, and two that no package has, cut to what decides where things stand; each on the tiny
tokenizer with its control tokens.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from pipeline.sources.resolve import resolve_file
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.conversation import Conversation
from tests.support.chats import CHAT_MERGES
from tests.support.tiny import save_tiny, tiny_tokenizer

_PACKAGE = "pypi:trl==1.16.0/trl/chat_templates/{}.jinja"
_CONTROL = re.compile(r"<\|[a-z_]+\|>|<｜[^｜]+｜>|\[/?[A-Z_]+\]")
_TEXT = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)  # one token each in Qwen3's tokenizer, but no control tokens

# The tools stand before the user's last message.
_MISTRAL = """{{ bos_token }}{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and m == (messages | selectattr('role', 'equalto', 'user') | list | last) %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id | length != 9 %}{{
                raise_exception('ids should be alphanumeric strings with length 9!') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id
            + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""

# Reasoning is a part of the content; the system's message says whether there is any.
_SMOLLM3 = """{%- set thinking = enable_thinking if enable_thinking is defined else true %}
{{- '<|im_start|>system\\nReasoning Mode: ' + ('/think' if thinking else '/no_think') + '\\n' }}
{%- if tools %}{{- '<tools>' + (tools | tojson) + '</tools>\\n' }}{%- endif %}{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + ('' if thinking else '<think>\\n\\n</think>\\n') + m.content.lstrip('\\n') }}
        {%- for call in m.tool_calls or [] %}{{-
            '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{-
        '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{-
    '<|im_start|>assistant\\n' + ('' if thinking else '<think>\\n\\n</think>\\n') }}{%- endif %}"""

_OWN = {"mistral": _MISTRAL, "smollm3": _SMOLLM3}
LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}


def turn_tokenizer(name: str, merges: Sequence[str] = CHAT_MERGES) -> PreTrainedTokenizerFast:
    """Make the tiny tokenizer with that template and the control tokens it names."""
    text = _OWN.get(name) or Path(resolve_file(_PACKAGE.format(name))).read_text(encoding="utf-8")
    backend = tiny_tokenizer(list(merges)).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    control = sorted(set(_CONTROL.findall(text)))
    added = [AddedToken(token, special=True, normalized=False) for token in control]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _TEXT])
    tokenizer.chat_template = text
    return tokenizer


def load_turns(name: str, merges: Sequence[str] = CHAT_MERGES) -> ChatTokenizer:
    wrapped = turn_tokenizer(name, merges)
    return ChatTokenizer(ByteTokenizer.from_wrapped(wrapped, name), wrapped)


def turn_model(folder: Path, name: str, seed: int = 0, merges: Sequence[str] = CHAT_MERGES) -> Path:
    """Write a tiny random Llama with that tokenizer as a Hugging Face folder; see `tests.support.tiny`."""
    return save_tiny(folder, turn_tokenizer(name, merges), seed, positions=2048)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, reasoning: str = "", **arguments: Any) -> dict[str, Any]:
    """Make a turn of the assistant; with arguments it calls `look`."""
    made: dict[str, Any] = {"role": "assistant", "content": content}
    made |= {"reasoning": reasoning} if reasoning else {}
    return made | (
        {"tool_calls": [{"id": "call_number_0", "name": "look", "arguments": arguments}]} if arguments else {}
    )


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "call_number_0", "name": "look"}


def talk(*messages: dict[str, Any], tools: bool = False) -> Conversation:
    return Conversation(messages, (LOOK,) if tools else ())


REASONED = talk(
    user("the?"), answer("and yes é", "in and"), user("in?"), answer("no", "so"), user("the"), answer("thing")
)
CALLED = talk(
    user("the?"), answer("", where='an "é"', n=3), result("7"), answer("yes, 7"), user("in?"), answer("no"), tools=True
)
