"""Chat templates of the families, cut to what decides where contents stand.

They run on a tiny tokenizer with the families' control tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from tests.support.tiny import MERGES, save_tiny, tiny_tokenizer

# A template's line breaks are joined to what the assistant says; an "a" behind a break, too.
CHAT_MERGES = [*MERGES, "Ċ Ċ", "Ċ a", "Ġ y", "Ġy e", "Ġye s"]


class ChatFamily(NamedTuple):
    """A family of chat templates.

    `control`: the tokens that its template writes; `end`: the one after a turn; `strips`: the ends of what the
    assistant says.
    """

    template: str
    control: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    strips: bool = False


_LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}{{- message.content }}{{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}"""

_QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}"""

# The reasoning of turns before the last is dropped, and the last one gets an empty one.
_QWEN3 = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == "assistant" and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}"""

_GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}{{
        message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}"""

_SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}"""

# The system's message goes before the last question of the user.
_MISTRAL = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%-
    set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.index >= loop.length - 1 and system is defined %}{{
            '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""

CHAT_FAMILIES = {
    "llama3": ChatFamily(
        _LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        strips=True,
    ),
    "qwen": ChatFamily(_QWEN, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"),
    "qwen3": ChatFamily(_QWEN3, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"),
    "gemma": ChatFamily(
        _GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        strips=True,
    ),
    "smollm2": ChatFamily(
        _SMOLLM2, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_start|>", "<|im_end|>", "<|im_end|>"
    ),
    "mistral": ChatFamily(_MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>", strips=True),
}


def chat_tokenizer(name: str, merges: Sequence[str] = CHAT_MERGES) -> PreTrainedTokenizerFast:
    """Make the tiny tokenizer with a family's control tokens and template."""
    family = CHAT_FAMILIES[name]
    backend = tiny_tokenizer(list(merges)).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        additional_special_tokens=[token for token in family.control if token not in (family.bos, family.eos)],
    )
    tokenizer.chat_template = family.template
    return tokenizer


def load_chat(name: str, merges: Sequence[str] = CHAT_MERGES) -> ChatTokenizer:
    wrapped = chat_tokenizer(name, merges)
    return ChatTokenizer(ByteTokenizer.from_wrapped(wrapped, name), wrapped)


def chat_model(folder: Path, name: str, seed: int = 0, merges: Sequence[str] = CHAT_MERGES) -> Path:
    """Write a tiny random Llama with that tokenizer as a Hugging Face folder; see `tests.support.tiny`."""
    return save_tiny(folder, chat_tokenizer(name, merges), seed)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of a user and an assistant in turn."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
