"""A task of three questions for the harness, made of the local PIQA's file."""

import json
from pathlib import Path

from stage2_student.evaluation.lm_eval_tasks import LOCAL_TASKS

END = "<|endoftext|>"
QUESTIONS = [
    {"question": "the and", "options": "A. the thing \nB. an éin,\nwhich thes", "answer": "B. an éin,\nwhich thes"},
    {"question": f"in{END} and", "options": f"A. er\nB. {END} the", "answer": "A. er"},
    {"question": "a theing", "options": "A. an\nB. an", "answer": "B. an"},
]


def write_three(folder: Path) -> Path:
    """Write the task `three`, which a group finds by `include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    text = (LOCAL_TASKS / "bld_piqa.yaml").read_text(encoding="utf-8").replace("task: bld_piqa", "task: three")
    source = next(line for line in text.splitlines() if line.startswith("dataset_kwargs"))
    changed = text.replace(source, f"dataset_kwargs: {{source: {folder / 'three.jsonl'}}}")
    (folder / "three.yaml").write_text(changed, encoding="utf-8")
    return folder
