"""What the product does in a cell, against brute force."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Recipe
from pipeline.corpus import Document
from pipeline.recipe import save_recipe
from pipeline.targets import Targets
from stage1_teacher.dump import run_teacher
from stage1_teacher.engine_vllm import generate_engine
from stage1_teacher.pieces import cut_pieces
from stage1_teacher.teacher import load_tokenizer, open_teacher
from stage2_student.start import export_start
from tests.zoo import checks
from tests.zoo.cells import Cell, Outcome
from tests.zoo.families import OF_VLLM_ALONE
from tests.zoo.models import save_tiny, tiny_config
from tests.zoo.spellings import Spelling

TEXTS = ("the thing and é", " in the end", "naïve 日本 42", "def f(x):\n    return x")
MOST_KL = 0.02  # nats a byte that a dump's rounding makes
PADDING = 3  # rows of a head beyond the tokenizer's tokens
MOST_MASS = 0.01  # on all tokens together that the tokenizer never yields


class WrongError(AssertionError):
    """What the product says is not what the model says."""


class Place(NamedTuple):
    """What a check is given: an empty folder, how to come by a tokenizer, and the seed of the weights."""

    work: Path
    spelling: Callable[[str], Spelling]
    seed: int


def run(cell: Cell, place: Place) -> Outcome:
    """The outcome of a cell; nothing is raised for what the product does."""
    try:
        return Outcome("right", CHECKS[cell.check](cell, place))
    except WrongError as wrong:
        return Outcome("wrong", str(wrong))
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
        return Outcome("refused" if names_it(str(error), cell) else "wrong", said)
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}")


_WAYS_OUT = re.compile(r"\b(use|give|choose|set|take|instead|add|raise|lower|another|supported)\b", re.IGNORECASE)


def names_it(message: str, cell: Cell) -> bool:
    """Whether a refusal says what is refused (family, its class or the tokenizer) and how to go on."""
    kind, architecture = OF_VLLM_ALONE.get(cell.family, (cell.family, cell.family))
    names = {kind, architecture, type(tiny_config(cell.family, 300)).__name__.removesuffix("Config"), cell.tokenizer}
    flat = _flat(message)
    return any(_flat(name) in flat for name in names) and _WAYS_OUT.search(message) is not None


def _flat(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _texts(spelling: Spelling) -> list[str]:
    """Those that the tokenizer's tokens spell."""
    spelled = {text: b"".join(spelling.token_bytes[i] or b"" for i in spelling.encode(text)) for text in TEXTS}
    return [text for text, have in spelled.items() if have == spelling.prefix + text.encode()]


def _own_model(folder: Path) -> Any:
    """transformers' own model of a folder, in float64 where it can."""
    return checks.in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))


def write_corpus(work: Path, texts: Sequence[str]) -> Path:
    corpus = work / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return corpus


def recipe_of(cell: Cell, place: Place, model: Path, texts: Sequence[str]) -> Recipe:
    """A dump of `texts` that stores everything, and a student of the same model."""
    spelling = place.spelling(cell.tokenizer)
    corpus = write_corpus(place.work, texts)
    teacher = {
        "model": str(model), "engine": cell.engine or "transformers", "dtype": "float32", "max_tokens": 64,
        "overlap_tokens": 8, "start": spelling.start, "end": [spelling.end],
    }  # fmt: skip
    values: dict[str, Any] = {
        "corpus": {"source": str(corpus)},
        "teacher": teacher,
        "dump": {"path": str(place.work / "dump"), "top_k": 256, "min_prob": 0, "audit_documents": 0},
    }
    if cell.target:
        target = place.spelling(cell.target)
        values["student"] = {
            "model": str(model), "tokenizer": target.folder, "path": str(place.work / "student"),
            "start": target.start, "end": target.end,
        }  # fmt: skip
    return Recipe.model_validate(values)


def _control(spelling: Spelling, name: str) -> int:
    return int(spelling.wrapped.convert_tokens_to_ids(name))


def check_targets(cell: Cell, place: Place) -> str:
    """Targets and token log-probabilities through an engine, against the model's own logits."""
    spelling = place.spelling(cell.tokenizer)
    folder = save_tiny(place.work / "model", cell.family, spelling.wrapped, place.seed, padding=PADDING)
    texts = _texts(spelling)
    recipe = recipe_of(cell, place, folder, texts)
    named = load_tokenizer(recipe)
    teacher = open_teacher(recipe, *named)
    try:
        pieces = [
            piece for text in texts for piece in cut_pieces(Document(text, text.encode(), None), named.tokenizer, 64, 8)
        ]
        found = teacher.targets(pieces, teacher.ask(pieces))
    finally:
        teacher.engine.close()
    own = _own_model(folder)
    start = _control(spelling, spelling.start)
    rows = [checks.row_logprobs(own, start, spelling.encode(text)) for text in texts]
    worst = _worst_difference(spelling, texts, found, rows)
    if worst.is_small or cell.engine != "vllm":
        return worst.held_right()
    served = _worst_difference(spelling, texts, found, _rows_of_vllm(recipe, folder, spelling, texts))
    return f"vLLM's own logits: {served.held_right()}; transformers' are others: {worst}"


class Difference(NamedTuple):
    """The largest of all documents: of a target's probability, and of a token's log-probability (nats)."""

    probability: float
    nats: float

    @property
    def is_small(self) -> bool:
        return self.probability < 1e-3 and self.nats < 5e-3

    def held_right(self) -> str:
        """In words. Raises WrongError where it is not small."""
        if not self.is_small:
            raise WrongError(str(self))
        return str(self)

    def __str__(self) -> str:
        return f"targets differ by {self.probability:.1e}, tokens by {self.nats:.1e} nats"


def _worst_difference(
    spelling: Spelling, texts: Sequence[str], found: Sequence[Targets], rows: Sequence[np.ndarray]
) -> Difference:
    """Between what the product found and brute force from `rows`, the log-probabilities of each text's rows."""
    brute = checks.Targets(spelling, [_control(spelling, spelling.end)])
    probability, nats = 0.0, 0.0
    for text, targets, logprobs_RV in zip(texts, found, rows, strict=True):
        ids = spelling.encode(text)
        off = targets.probs_PV[len(spelling.prefix) :] - brute.of(logprobs_RV, ids, text.encode())
        probability = max(probability, float(np.abs(off).max()))
        tokens = targets.token_logprobs - checks.token_logprobs(logprobs_RV, ids)
        nats = max(nats, float(np.abs(tokens).max()))
    return Difference(probability, nats)


def _rows_of_vllm(recipe: Recipe, folder: Path, spelling: Spelling, texts: Sequence[str]) -> list[np.ndarray]:
    """[R, V] of each text: what vLLM itself says of a prompt's tokens, by its prompt log-probabilities."""
    width = len(spelling.token_bytes) + PADDING
    generate = generate_engine(str(folder), recipe.teacher, recipe.placement, max_logprobs=width)
    start = _control(spelling, spelling.start)
    prompts = [[start, *spelling.encode(text), start] for text in texts]  # the last for the row before it
    found = []
    for output in generate(prompts, width, False):
        rows = np.full((len(output.prompt_logprobs) - 1, width), -np.inf)
        for row, listed in zip(rows, output.prompt_logprobs[1:], strict=True):
            for token, said in listed.items():
                row[token] = said.logprob
        found.append(rows)
    return found


def check_eval(cell: Cell, place: Place) -> str:
    """`bld eval MODEL` against the model's own nats."""
    spelling = place.spelling(cell.tokenizer)
    folder = save_tiny(place.work / "model", cell.family, spelling.wrapped, place.seed, padding=PADDING)
    texts = _texts(spelling)
    corpus, said = write_corpus(place.work, texts), place.work / "said.json"
    asked = ["eval", str(folder), "--corpus", str(corpus), "--start", spelling.start, "--json", str(said)]
    CliRunner().invoke(app, asked, catch_exceptions=False)
    figures = json.loads(said.read_text(encoding="utf-8"))[str(folder)][corpus.name]
    found = figures["bits_per_byte"]
    if figures["num_bytes"] != sum(len(text.encode()) for text in texts):
        raise WrongError(f"{figures['num_bytes']} bytes are scored, of {sum(len(text.encode()) for text in texts)}")
    own = _own_model(folder)
    expected = checks.bits_per_byte(own, spelling, _control(spelling, spelling.start), texts)
    measured = f"{found:.5f} bits per byte, the model's own are {expected:.5f}"
    if not abs(found - expected) < 1e-3 * expected:
        raise WrongError(measured)
    return measured


def check_moved(cell: Cell, place: Place) -> str:
    """A student moved to another tokenizer: whose rows tokens of the same bytes have, and what the tokens get that no text contains."""
    old, new = place.spelling(cell.tokenizer), place.spelling(cell.target)
    folder = save_tiny(place.work / "model", cell.family, old.wrapped, place.seed)
    start = export_start(recipe_of(cell, place, folder, TEXTS))
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval() for path in (folder, start))
    yielded = [{s: i for i, s in enumerate(one.token_bytes) if s and i not in one.never_yielded} for one in (old, new)]
    both = sorted(yielded[0].keys() & yielded[1].keys())
    olds, news = ([ids[spelled] for spelled in both] for ids in yielded)
    rows = [model.get_input_embeddings().weight.detach().float() for model in (before, after)]
    strange = int((rows[1][news] - rows[0][olds]).abs().amax(-1).gt(1e-6).sum())
    mass = checks.mass_never_yielded(checks.in_float64(after), new, _control(new, new.start), _texts(new))
    measured = f"{strange} of {len(both)} common tokens have another row, {mass:.2%} of the mass on tokens that no text contains"
    if strange or mass > MOST_MASS:
        raise WrongError(measured)
    return measured


def check_trained(cell: Cell, place: Place) -> str:
    """One step of training on a family's own dump: the losses it says, and the model that it exports, against the model's own logits.

    A student that is its own teacher, with its own tokenizer, starts at a divergence of 0 but for the dump's rounding.
    """
    from stage2_student.train import train as train_student  # with DeepSpeed: seconds to import

    spelling = place.spelling(cell.target or cell.tokenizer)
    source = place.spelling(cell.tokenizer)
    folder = save_tiny(place.work / "model", cell.family, source.wrapped, place.seed)
    texts = [text for text in _texts(source) if text in _texts(spelling)]
    num_tokens = sum(len(spelling.encode(text)) + 1 for text in texts)
    recipe = recipe_of(cell, place, folder, texts)
    train = {
        "steps": 1, "batch_tokens": num_tokens, "micro_batch_tokens": 64, "max_tokens": 64, "warmup_steps": 0, "lr": 1e-3,
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
    marks = [_control(spelling, name) for name in (spelling.start, spelling.end)]
    nats = sum(checks.document_nats(start, marks[0], [*spelling.encode(text), marks[1]]) for text in texts)
    ce = nats / told["supervised_bytes"]
    moved = _export_differs(start, run, [marks[0], *spelling.encode(texts[0])])
    measured = (
        f"ce {told['ce']:.5f}, the model's own {ce:.5f}; kl {told['kl']:.1e}; exported logits differ by {moved:.1e}"
    )
    if abs(told["ce"] - ce) > 1e-3 * ce or moved > 1e-3 or (not cell.target and told["kl"] > MOST_KL):
        raise WrongError(measured)
    return measured


@torch.no_grad()
def _export_differs(start: Any, run: Path, tokens: list[int]) -> float:
    """By how much the exported model's logits differ from the start's with the checkpoint's weights in it."""
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


CHECKS: dict[str, Callable[[Cell, Place], str]] = {
    "targets": check_targets,
    "eval": check_eval,
    "moved": check_moved,
    "trained": check_trained,
}
