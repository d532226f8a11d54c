"""What a student gains: the demo's student before and after, beside a CE-only control on the same text, steps and seed.

    .venv/bin/python -m tests.bench.quality [--out runs/quality] [--recipe pipeline/recipes/demo.yaml]

Resumable: what is there is not done again. Prints bits per byte on both eval corpora and the byte divergence to the teacher on
held-out text, nats per position (`stage2_student.divergence`), against a dump of the held-out text with every symbol stored.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config import Objectives, Recipe
from pipeline.recipe import load_recipe, save_recipe

OBJECTIVES = {"bld": None, "sft": Objectives(ce=1.0, byte_ce=0.0, kl=0.0)}


def bld(*arguments: str) -> None:
    """One command of the product, as an operator would run it."""
    print("$ bld " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "pipeline", *arguments], check=True)


def variants(recipe: Recipe, out: Path) -> dict[str, Recipe]:
    """The recipe itself, so that a finished demo is not trained again, and once for each other objective in a folder of its own."""
    assert recipe.student is not None
    found = {}
    for name, objectives in OBJECTIVES.items():
        student = recipe.student if objectives is None else recipe.student.model_copy(update={"path": str(out / name)})
        train = recipe.train.model_copy(update={"objectives": objectives or recipe.train.objectives})
        found[name] = recipe.with_values(student=student, train=train)
    return found


def held_out(recipe: Recipe, out: Path, limit: int) -> Recipe:
    """A recipe that dumps the first documents of the eval corpus with everything stored."""
    assert recipe.eval is not None
    values = recipe.eval.model_dump(exclude={"out_of_domain", "limit"})
    corpus = type(recipe.corpus).model_validate({**values, "limit": limit})
    dump = recipe.dump.model_copy(update={"path": str(out / "held_out"), "top_k": 256, "min_prob": 0.0})
    return recipe.with_values(corpus=corpus, dump=dump)


def evaluate(recipes: dict[str, Recipe], out: Path) -> dict[str, dict[str, Any]]:
    """model -> bits per byte of each corpus, and divergence."""
    from pipeline.source import resolve_model
    from stage2_student.evaluate import run_eval

    first = next(iter(recipes.values()))
    assert first.student is not None and first.eval is not None
    models = {"teacher": resolve_model(first.teacher.model), "start": str(Path(first.student.path) / "start")}
    models |= {name: str(Path(r.student.path) / "export") for name, r in recipes.items() if r.student is not None}
    corpora: dict[str, Any] = {"in_domain": first.eval}
    if first.eval.out_of_domain is not None:
        corpora["out_of_domain"] = first.eval.out_of_domain
    found = {}
    for name, model in models.items():
        start = first.teacher.start if name == "teacher" else first.student.start
        end = first.teacher.end[0] if name == "teacher" else first.student.end
        found[name] = run_eval(model, corpora, out / "held_out", start, end)
    return found


def main(
    recipe: str = "pipeline/recipes/demo.yaml",
    out: Path = Path("runs/quality"),
    held_out_documents: Annotated[
        int, typer.Option(help="documents of the eval corpus that the divergence is measured on")
    ] = 30,
) -> None:
    """Run everything that is missing, then print the table."""
    base = load_recipe(recipe, [])
    out.mkdir(parents=True, exist_ok=True)
    recipes = variants(base, out)
    files = {"held_out": held_out(base, out, held_out_documents), **recipes}
    for name, variant in files.items():
        save_recipe(variant, out / f"{name}.yaml")
    bld("teacher", str(out / "bld.yaml"))
    bld("teacher", str(out / "held_out.yaml"))
    for name in recipes:
        bld("student", str(out / f"{name}.yaml"))
    table = evaluate(recipes, out)
    print(
        "| model | in domain, bits/byte | out of domain, bits/byte | JSD to teacher, nats | KL at clear positions, nats | clear |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, values in table.items():
        bits = [f"{values[c]['bits_per_byte']:.3f}" if c in values else "" for c in ("in_domain", "out_of_domain")]
        divergence = values["dump"]
        figures = f"{divergence['jsd_nats']:.4f} | {divergence['kl_clear_nats']:.4f} | {divergence['clear_share']:.0%}"
        print(f"| {name} | {bits[0]} | {bits[1]} | {figures} |")


if __name__ == "__main__":
    typer.run(main)
