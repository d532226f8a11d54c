"""Tasks of lm-evaluation-harness for a Hugging Face model; only this module imports the harness.

The model is the harness' own `hf`, so that its figures are the same as anyone else's, except for three things. Text
that spells a control token is text, whether it is in a question, in an option or in a message of a chat. A chat
template gets the same date as in training, so that a figure does not change with the date. And an answer in a chat ends
with the template's end of a turn, which need not be among the end tokens in the model's files.
"""

import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from tokenizers import normalizers

from pipeline.config import TasksConfig
from pipeline.runtime.devices import compute_device
from pipeline.runtime.dtypes import natural_dtype
from pipeline.runtime.model_source import ModelSource
from pipeline.runtime.padding import padded_groups
from pipeline.sources.resolve import resolve_model
from pipeline.tokenization.chat_template import ASSISTANT, TODAY

LOCAL_TASKS = Path(__file__).parents[2] / "pipeline" / "tasks"
_CPU_TOKENS = 2048  # in a forward pass; the harness' own search for a batch size ends only when memory runs out
# Noncharacters, which Unicode excludes from text. A rendered chat begins with one; the other, inside the name of a
# control token, keeps the tokenizer from finding it, and is then dropped by the normalizer.
_RENDERED, _BROKEN = "\ufdd0", "\ufdd1"


class TextModel(HFLM):
    """The harness' `hf`, with control tokens only where a chat template writes them.

    Args:
        pretrained: a folder, or the model itself, which is then used as it is.
    """

    def __init__(self, pretrained: Any, **options: Any) -> None:
        super().__init__(pretrained, chat_template_args={"strftime_now": TODAY.strftime}, **options)
        special = [token for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted((token.content for token in special), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._normalized = {token.content for token in special if token.normalized or len(token.content) == 1}
        backend = self.tokenizer.backend_tokenizer
        own = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([normalizers.Replace(_BROKEN, ""), *own])
        self._ends = self.model.generation_config.eos_token_id
        self._sizes: list[int] = []  # batch size by request, on a CPU

    def ask_with(self, group: TasksConfig) -> None:
        """Apply the options of a group of tasks.

        Raises:
            ValueError: the tokenizer lacks the group's start token, or a chat template.
        """
        names = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items()}
        if group.start is not None and group.start not in names:
            near = difflib.get_close_matches(group.start, names, n=3, cutoff=0.3)
            raise ValueError(
                f"the tokenizer has no control token {group.start!r}; the nearest: {', '.join(near) or 'none'}"
            )
        if group.apply_chat_template and self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.pretrained}: its tokenizer has no chat template; leave apply_chat_template out for this model"
            )
        self.custom_prefix_token_id = None if group.start is None else names[group.start]
        self.batch_size_per_gpu = group.batch_size or "auto"
        turn_ends, own = self._ends_of_turn() if group.apply_chat_template else [], self._ends
        ends = {*turn_ends, *(own if isinstance(own, list) else [own, self.tokenizer.eos_token_id])} - {None}
        self.model.generation_config.eos_token_id = sorted(ends) if turn_ends else own

    def _ends_of_turn(self) -> list[int]:
        """Return the control token that the template puts after an answer; none if it puts text there."""
        chat = [{"role": "user", "content": "Is it there?"}, {"role": ASSISTANT, "content": "Yes, it is."}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **self.chat_template_args)
        name = self._control.match(text.rpartition("Yes, it is.")[2].lstrip())
        return [] if name is None else [self.tokenizer.convert_tokens_to_ids(name[0])]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat with the template, and mark it as rendered."""
        messages = [message | {"content": self._as_text(message["content"])} for message in chat_history]
        return _RENDERED + str(super().apply_chat_template(messages, add_generation_prompt))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Encode text.

        The start token comes first unless `add_special_tokens` is False, or a template has written it.
        """
        rendered, text = string.startswith(_RENDERED), string.removeprefix(_RENDERED)
        start = None if rendered or add_special_tokens is False else self.custom_prefix_token_id
        if start is not None or (rendered and text.startswith(self.tokenizer.decode(self.prefix_token_id))):
            add_special_tokens = False
        own_rule = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = self.tokenizer.encode(text, split_special_tokens=not rendered, **own_rule)
        return [*([] if start is None else [start]), *ids][-left_truncate_len if left_truncate_len else None :]

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode texts; return padded tokens and the attention mask."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return int(super()._detect_batch_size(requests, pos))
        return max(1, _CPU_TOKENS // self.max_length)

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """Return the size of this request's batch.

        The harness asks at each request, the longest first, whether it is the batch's last.
        """
        if self.device.type != "cpu":
            return int(super()._batch_scheduler(pos, n_reordered_requests))
        if pos == 0:
            groups = padded_groups([len(request[1]) + len(request[2]) for request in n_reordered_requests], _CPU_TOKENS)
            self._sizes = [len(group) for group in groups for _ in group]
        return self._sizes[pos]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        in_chat = context.startswith(_RENDERED)  # elsewhere everything is text
        return super()._encode_pair(context, self._as_text(continuation) if in_chat else continuation)

    def _as_text(self, text: str) -> str:
        """Insert a mark into the name of each control token that the text spells.

        Raises:
            ValueError: a mark would not help.
        """
        return self._control.sub(self._broken, text)

    def _broken(self, name: re.Match[str]) -> str:
        if name[0] in self._normalized:
            raise ValueError(
                f"a message spells the control token {name[0]!r}, which this tokenizer looks for in normalised text, "
                "so the two are indistinguishable in a chat; leave apply_chat_template out for this model"
            )
        return name[0][0] + _BROKEN + name[0][1:]


def run_tasks(
    model: ModelSource | str, groups: Mapping[str, TasksConfig], log_samples: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the harness' results of each group of tasks, in its JSON form.

    With `log_samples`, `samples` holds every answer.

    Raises:
        ValueError: a task is unknown, or its data is unavailable; raised before any weights are loaded.
    """
    tasks = {name: load_group(group) for name, group in groups.items()}
    resolved = resolve_model(model)
    if Path(resolved.source).exists():
        resolved = resolved.at(str(Path(resolved.source).absolute()))  # a relative path would be taken for a hub name
    results: dict[str, dict[str, Any]] = {}
    for dtype in dict.fromkeys(group.dtype for group in groups.values()):
        lm = TextModel(
            resolved.source,
            revision=resolved.revision or "main",
            device=compute_device(),
            dtype="float32" if dtype == "auto" and natural_dtype() == "float32" else dtype,
            trust_remote_code=resolved.trust_remote_code,
        )
        same_dtype = {name: group for name, group in groups.items() if group.dtype == dtype}
        results |= {name: run_group(lm, group, *tasks[name], log_samples) for name, group in same_dtype.items()}
    return results


def load_group(group: TasksConfig) -> tuple[TaskManager, list[Any]]:
    """Load the group's tasks with their data, and return them with the manager that loaded them.

    Raises ValueError if a task is unknown, or its data is unavailable.
    """
    # It warns about every task that comes with its own data.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    manager = _manager(group)
    return manager, [task for name in group.names for task in _task(manager, name)]


def _manager(group: TasksConfig) -> TaskManager:
    """Make a manager that knows our tasks and the user's.

    It knows the harness' own tasks only if one is named, because listing them takes seconds.
    """
    folders = [str(LOCAL_TASKS), *([group.include_path] if group.include_path is not None else [])]
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"include_path {folder} is not a folder; give a folder with task files (YAML)")
    local = TaskManager(include_path=folders, include_defaults=False)
    manager = local if set(group.names) <= set(local.all_tasks) else _with_all_tasks(*folders)
    for name in group.names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            raise ValueError(
                f"the harness has no task {name!r}; the nearest: {', '.join(near) or 'none'}. {_without_hub(local)}"
            )
    return manager


@cache
def _with_all_tasks(*folders: str) -> TaskManager:
    return TaskManager(include_path=list(folders))


def _task(manager: TaskManager, name: str) -> list[Any]:
    """Load the task or group with this name, or the tasks of a tag."""
    try:
        loaded = manager.load([name])
    except OSError as error:
        raise ValueError(f"the data of task {name} is unavailable: {error}. {_without_hub(manager)}") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _without_hub(manager: TaskManager) -> str:
    return f"Tasks that need no hub: {', '.join(name for name in manager.all_tasks if name.startswith('bld_'))}"


def run_group(
    lm: TextModel, group: TasksConfig, manager: TaskManager, tasks: list[Any], log_samples: bool = False
) -> dict[str, Any]:
    """Ask a model a group's tasks, as `load_group` has loaded them; returns the harness' results in its JSON form."""
    lm.ask_with(group)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    results = simple_evaluate(
        model=lm,
        tasks=tasks,
        num_fewshot=group.num_fewshot,
        limit=group.limit,
        gen_kwargs=None if group.max_gen_toks is None else {"max_gen_toks": group.max_gen_toks},
        apply_chat_template=group.apply_chat_template,
        task_manager=manager,
        log_samples=log_samples,
        **(dict.fromkeys(seeds, group.seed) if group.seed is not None else {}),
    )
    return dict(json.loads(json.dumps(results, default=handle_non_serializable, ensure_ascii=False)))
