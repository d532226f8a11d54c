"""Checks of stage 2 in a cell: evaluation, a moved tokenizer, training and export."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Recipe
from pipeline.config.loading import save_recipe
from stage1_teacher.dump.run import run_teacher
from stage2_student.model.initial_student import export_start
from tests.zoo import checks
from tests.zoo.cells import Cell
from tests.zoo.models import save_tiny
from tests.zoo.subject import (
    PADDING,
    TEXTS,
    Place,
    WrongError,
    control_id,
    own_model,
    recipe_of,
    spelled_texts,
    write_corpus,
)

MAX_KL = 0.02  # nats a byte that a dump's rounding makes
MAX_MASS = (
    0.03  # on all tokens together that no text contains; logits are spread by 3 here, and capped at 4 in some families
)


def check_eval(cell: Cell, place: Place) -> str:
    """Check `bld eval MODEL` against the model's own nats."""
    spelling = place.spelling(cell.tokenizer)
    folder = save_tiny(place.work / "model", cell.family, spelling.wrapped, place.seed, padding=PADDING)
    texts = spelled_texts(spelling)
    corpus, said = write_corpus(place.work, texts), place.work / "said.json"
    asked = ["eval", str(folder), "--corpus", str(corpus), "--start", spelling.start, "--json", str(said)]
    CliRunner().invoke(app, asked, catch_exceptions=False)
    figures = json.loads(said.read_text(encoding="utf-8"))[str(folder)][corpus.name]
    found = figures["bits_per_byte"]
    if figures["num_bytes"] != sum(len(text.encode()) for text in texts):
        raise WrongError(f"{figures['num_bytes']} bytes are scored, of {sum(len(text.encode()) for text in texts)}")
    own = own_model(folder)
    expected = checks.bits_per_byte(own, spelling, control_id(spelling, spelling.start), texts)
    measured = f"{found:.5f} bits per byte, the model's own are {expected:.5f}"
    if not abs(found - expected) < 1e-3 * expected:
        raise WrongError(measured)
    return measured


def check_moved(cell: Cell, place: Place) -> str:
    """Check a student moved to another tokenizer.

    Whose rows tokens of the same bytes have, and what the tokens get that no text contains.
    """
    old, new = place.spelling(cell.tokenizer), place.spelling(cell.target)
    folder = save_tiny(place.work / "model", cell.family, old.wrapped, place.seed)
    start = export_start(recipe_of(cell, place, folder, TEXTS))
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval() for path in (folder, start))
    yielded = [one.yielded() for one in (old, new)]
    both = sorted(yielded[0].keys() & yielded[1].keys())
    olds, news = ([ids[spelled] for spelled in both] for ids in yielded)
    rows = [model.get_input_embeddings().weight.detach().float() for model in (before, after)]
    strange = int((rows[1][news] - rows[0][olds]).abs().amax(-1).gt(1e-6).sum())
    mass = checks.mass_never_yielded(checks.in_float64(after), new, control_id(new, new.start), spelled_texts(new))
    read = AutoTokenizer.from_pretrained(start)
    unlike = [text for text in spelled_texts(new) if read.encode(text, add_special_tokens=False) != new.encode(text)]
    measured = (
        f"{strange} of {len(both)} common tokens have another row, "
        f"{mass:.2%} of the mass on tokens that no text contains"
    )
    if unlike:
        raise WrongError(f"transformers reads {len(unlike)} texts with other tokens than were learnt, as {unlike[0]!r}")
    if strange or mass > MAX_MASS:
        raise WrongError(measured)
    return measured


def check_trained(cell: Cell, place: Place) -> str:
    """Check one step of training on a family's own dump against the model's own logits.

    Compared are the losses it reports and the model it exports.

    A student that is its own teacher, with its own tokenizer, starts at a divergence of 0 but for the dump's rounding.
    """
    from stage2_student.training.train import train as train_student  # with DeepSpeed: seconds to import

    spelling = place.spelling(cell.target or cell.tokenizer)
    source = place.spelling(cell.tokenizer)
    folder = save_tiny(place.work / "model", cell.family, source.wrapped, place.seed)
    texts = [text for text in spelled_texts(source) if text in spelled_texts(spelling)]
    num_tokens = sum(len(spelling.encode(text)) + 1 for text in texts)
    recipe = recipe_of(cell, place, folder, texts)
    train = {
        "steps": 1, "batch_tokens": num_tokens, "micro_batch_tokens": 64, "max_tokens": 64,
        "warmup_steps": 0, "lr": 1e-3,
        "dtype": "float32", "objectives": {"ce": 1.0, "kl": 1.0},
    }  # fmt: skip
    student = {"model": str(folder), "path": str(place.work / "student"), "start": spelling.start, "end": spelling.end}
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["student"] = {**student, **values.get("student", {}), "interface": "token_marginal"}
    recipe = Recipe.model_validate(values | {"train": train})
    run_teacher(recipe)
    save_recipe(recipe, place.work / "recipe.yaml")
    train_student(recipe)
    run = place.work / "student"
    told = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    if told["supervised_bytes"] != sum(len(text.encode()) for text in texts):
        raise WrongError(
            f"{told['supervised_bytes']} bytes are supervised, of {sum(len(text.encode()) for text in texts)}"
        )
    start = AutoModelForCausalLM.from_pretrained(run / "start", dtype="float32").eval()
    marks = [control_id(spelling, name) for name in (spelling.start, spelling.end)]
    nats = sum(checks.document_nats(start, marks[0], [*spelling.encode(text), marks[1]]) for text in texts)
    ce = nats / told["supervised_bytes"]
    moved = _export_differs(start, run, [marks[0], *spelling.encode(texts[0])])
    measured = (
        f"ce {told['ce']:.5f}, the model's own {ce:.5f}; kl {told['kl']:.1e}; exported logits differ by {moved:.1e}"
    )
    if abs(told["ce"] - ce) > 1e-3 * ce or moved > 1e-3 or (not cell.target and told["kl"] > MAX_KL):
        raise WrongError(measured)
    return measured


@torch.no_grad()
def _export_differs(start: Any, run: Path, tokens: list[int]) -> float:
    """Return how far the exported model's logits are from the start's with the checkpoint's weights in it."""
    [states] = (run / "checkpoints").glob("step-*/mp_rank_00_model_states.pt")
    trained = torch.load(states, weights_only=False)["module"]  # written by this very test
    before = start(torch.tensor([tokens])).logits
    missing, unexpected = start.load_state_dict(
        {name.removeprefix("lm."): value for name, value in trained.items() if name.startswith("lm.")}, strict=False
    )
    start.tie_weights()
    if unexpected:
        raise WrongError(f"the checkpoint has weights that the model has not: {unexpected[:3]}")
    own = start(torch.tensor([tokens])).logits
    if torch.equal(before, own):
        raise WrongError(f"nothing was trained; the checkpoint lacks {missing[:3]}")
    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype="float32").eval()
    return float((exported(torch.tensor([tokens])).logits - own).abs().max())
