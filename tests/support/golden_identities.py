"""Identities that an earlier release gave to dumps and runs, kept as files.

They show that what it began continues.

    python -m tests.support.golden_identities CHECKOUT TAG

asks the source tree in CHECKOUT, a work tree of commit ca1beac (or of another release, once `_ASK` names its modules),
for what it would write of the recipes below as `manifest.json` of the dumps and `identity.json` of the runs. They are
put beside the tests, as `manifest-TAG-NAME.json` and `identity-TAG-NAME.json`; those of `arithmetic-2` are of that
commit. Run it once for a release; after that the files are history.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.support.chat_turns import turn_model
from tests.support.tiny import tiny_model

DUMPS = Path(__file__).parents[1] / "stage1_teacher/dump/golden"
RUNS = Path(__file__).parents[1] / "stage2_student/runs/golden"
TEXTS = [f"the thing number {i} and the other thing, é or {'in ' * (i % 7)}{i}" for i in range(12)]
OBJECTIVE = '"""The student\'s own tokens."""\n\n\ndef objective(seen):\n    return seen.nats_N.sum()\n'

# The required keys alone, with `engine` so that it runs anywhere.
_DEFAULT: dict[str, Any] = {
    "corpus": {"source": "plain.jsonl"},
    "teacher": {"model": "model", "engine": "transformers"},
    "dump": {"path": "default"},
    "student": {"model": "model", "path": "run-default"},
    "train": {"steps": 1},
}
# Every key that decides a dump or a run and can be set for a local model, away from its default.
_EVERYTHING: dict[str, Any] = {
    "corpus": {
        "source": "chats.jsonl",
        "field": "messages",
        "strip": True,
        "reasoning": "drop",
        "id_field": "name",
        "limit": 8,
        "skip": 1,
        "unique": True,
    },
    "teacher": {
        "model": "chat",
        "tokenizer": "chat",
        "engine": "transformers",
        "dtype": "float32",
        "max_tokens": 128,
        "overlap_tokens": 8,
        "end": ["<|im_end|>", "</s>"],
        "trust_remote_code": True,
    },
    "dump": {
        "path": "everything",
        "covering": {"beam_width": 2, "branch_threshold": 0.05, "merge_after": 2, "spread_dropped": True},
        "top_k": 256,
        "min_prob": 0.0,
        "shard_bytes": 100,
        "zstd_level": 3,
        "audit_documents": 2,
    },
    "student": {
        "model": "chat",
        "path": "run-everything",
        "averaged_scale": 0.9,
        "interface": "causal",
        "drop_layers": [1],
        "lora_rank": 2,
        "lora_alpha": 4.0,
        "lora_targets": ["q_proj"],
        "lora_embeddings": True,
        "max_doubt": 0.5,
        "max_token_end": 0.5,
        "max_dropped": 0.5,
        "mix": "geometric",
        "dumps": [{"path": "everything", "weight": 2.0}, {"path": "other", "weight": 1.0}],
    },
    "train": {
        "steps": 1,
        "batch_tokens": 256,
        "max_tokens": 128,
        "lr": 1e-3,
        "warmup_steps": 0,
        "min_lr_ratio": 0.5,
        "interface_lr": 2.0,
        "embedding_lr": 3.0,
        "weight_decay": 0.1,
        "betas": [0.8, 0.9],
        "grad_clip": 2.0,
        "seed": 7,
        "dtype": "float32",
        "objectives": {"ce": 0.5, "byte_ce": 0.2, "kl": 0.7, "own.py": 0.1},
        "kl_direction": "jensen_shannon",
        "kl_temperature": 2.0,
        "alm_tau": 50.0,
        "alm_debias": 0.2,
        "deepspeed": {"zero_stage": 1, "config": "deepspeed.json"},
    },
}
RECIPES = {"default": _DEFAULT, "everything": _EVERYTHING}
OTHER = (
    "teacher.model=other-chat",
    "teacher.tokenizer=other-chat",
    "dump.path=other",
)  # the second dump of `everything`


def lay_out(folder: Path, num_texts: int = 6) -> None:
    """Write models, corpora and recipes into a folder; paths in the recipes are relative to it."""
    tiny_model(folder / "model")
    for seed, name in enumerate(("chat", "other-chat")):
        turn_model(folder / name, "smollm3", seed)
        (folder / name / "modeling_own.py").write_text("SCALE = 1.0\n", encoding="utf-8")
    write_texts(folder, num_texts)
    (folder / "own.py").write_text(OBJECTIVE, encoding="utf-8")
    (folder / "deepspeed.json").write_text('{"gradient_accumulation_dtype": "fp32"}\n', encoding="utf-8")
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def write_texts(folder: Path, num_texts: int) -> None:
    """Write both corpora: that many documents, and chats of as many."""
    rows = [{"text": text} for text in TEXTS[:num_texts]]
    chats = [
        {
            "name": f"chat {i}",
            "messages": [
                {"role": "user", "content": f"number {i}?"},
                {"role": "assistant", "content": f"<think>{i}</think>{text}"},
            ],
        }
        for i, text in enumerate(TEXTS[:num_texts])
    ]
    for name, lines in (("plain", rows), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


# What `bld teacher` and `bld student` of commit ca1beac do before an engine is opened and a rank trained.
_ASK = """
import json, sys
from pathlib import Path
from pipeline.config import student_config
from pipeline.corpus import Corpus
from pipeline.recipe import load_recipe
from stage1_teacher.begun import as_begun
from stage1_teacher.dump import prepare
from stage1_teacher.fit_windows import with_fitting_windows
from stage1_teacher.teacher import load_tokenizer
from stage2_student import run_folder
from stage2_student.sized import sized
from stage2_student.start import end_tokens, student_tokenizer

def planned(name, overrides=()):
    recipe = as_begun(load_recipe(name + ".yaml", overrides))
    teacher = load_tokenizer(recipe)
    recipe = with_fitting_windows(recipe, teacher.model)
    return prepare(recipe, Corpus(recipe.corpus, recipe.dump.arithmetic_used), teacher).manifest

def begun(name, manifest, others):
    recipe = sized(load_recipe(name + ".yaml"))[0]
    student = student_config(recipe)
    tokenizer, chat, _ = student_tokenizer(student, manifest.has_chats)
    identity = run_folder.run_identity(recipe, manifest, tokenizer.sha256, end_tokens(student, tokenizer, chat), others)
    if chat is not None:
        identity["student"]["template_sha256"] = chat.template.sha256
    return identity

for name in ("default", "everything"):
    manifest = planned(name)
    others = [planned(name, sys.argv[1:])] if name == "everything" else []
    folder = Path("manifest-" + name)
    folder.mkdir()
    manifest.save(folder)
    Path("identity-" + name + ".json").write_text(json.dumps(begun(name, manifest, others), indent=1) + chr(10))
"""


def main(checkout: str, tag: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve()), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder)
        subprocess.run([sys.executable, "-c", _ASK, *OTHER], cwd=folder, env=environment, check=True)
        for kind in RECIPES:
            for source, target in (
                (folder / f"manifest-{kind}" / "manifest.json", DUMPS / f"manifest-{tag}-{kind}.json"),
                (folder / f"identity-{kind}.json", RUNS / f"identity-{tag}-{kind}.json"),
            ):
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
