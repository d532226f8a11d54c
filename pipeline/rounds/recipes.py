"""The recipe of each round: the operator's own, with the round's folders, writer, seed, dumps and steps."""

from pathlib import Path

from pipeline.config import CorpusConfig, DumpRef, GenerateConfig, Recipe, generate_config, student_config
from pipeline.config.text.rounds import RoundsConfig

FIRST = 0  # number of the round on the teacher's text; without a cold start, of the student as the rounds find it
OWN = "round"  # name of a round's text in a union with the recipe's own corpora
REPLAYED = "first"  # name of the recipe's own corpus there, if it has none


def rounds_config(recipe: Recipe) -> RoundsConfig:
    """Return the recipe's rounds section.

    Raises ValueError if it, or something that it needs, is missing.
    """
    if recipe.rounds is None:
        raise ValueError("the recipe has no rounds section; add one (rounds: {path: ...})")
    student, prompts = student_config(recipe), generate_config(recipe).prompts
    if recipe.eval is None:
        raise ValueError(
            "the recipe has no eval section, by which rounds are compared; add one (eval: {source: ...}) of text that "
            "no prompt is from"
        )
    if any(ref.corpus == OWN for ref in student.dumps):
        raise ValueError(f"a corpus of student.dumps is called {OWN}, as a round's own text is: give it another name")
    if recipe.rounds.next_prompts and prompts.limit is None:
        raise ValueError("rounds.next_prompts takes the next prompts in every round: give generate.prompts.limit, too")
    return recipe.rounds


def trained_numbers(rounds: RoundsConfig) -> range:
    """Return the numbers of the rounds that train the student."""
    return range(FIRST if rounds.cold_start else FIRST + 1, rounds.count + 1)


def folder_of(rounds: RoundsConfig, number: int) -> Path:
    """Return the folder of a round."""
    return Path(rounds.path) / f"round-{number:02d}"


def round_recipe(recipe: Recipe, number: int, steps_before: int) -> Recipe:
    """Return the recipe of a round.

    Args:
        steps_before: optimizer steps of the student's run before it.
    """
    rounds, generate = rounds_config(recipe), _generate(recipe, number)
    dump = recipe.dump.model_copy(update={"path": str(folder_of(rounds, number) / "dump")})
    is_trained = number in trained_numbers(rounds)
    train = {
        "steps": steps_before + is_trained * rounds.steps,
        "change": tuple(dict.fromkeys((*recipe.train.change, "dump"))),
    }
    assert recipe.eval is not None
    return recipe.with_values(
        corpus=CorpusConfig(source=generate.path, field="messages" if generate.prompts.has_chats else "text"),
        generate=generate,
        dump=dump,
        student=student_config(recipe).model_copy(update={"dumps": _dumps(recipe, dump.path)}),
        train=recipe.train.model_copy(update=train),
        eval=recipe.eval.model_copy(update={"tasks": {}}),
        rounds=None,
    )


def _generate(recipe: Recipe, number: int) -> GenerateConfig:
    rounds, generate = rounds_config(recipe), generate_config(recipe)
    prompts = generate.prompts
    if rounds.next_prompts and prompts.limit is not None:
        done = number - trained_numbers(rounds)[0]
        prompts = prompts.model_copy(update={"skip": prompts.skip + done * prompts.limit})
    return generate.model_copy(
        update={
            "path": str(folder_of(rounds, number) / "text"),
            "prompts": prompts,
            "writer": "teacher" if number == FIRST else "student",
            "seed": generate.seed + number,
        }
    )


def _dumps(recipe: Recipe, of_round: str) -> tuple[DumpRef, ...]:
    """Return the dumps of a round: its own, and with replay the recipe's, by their shares."""
    replay = rounds_config(recipe).replay
    if not replay:
        return ()
    own = student_config(recipe).dumps or (DumpRef(path=recipe.dump.path),)
    total = sum(ref.weight for ref in own)
    replayed = (
        ref.model_copy(update={"weight": replay * ref.weight / total, "corpus": ref.corpus or REPLAYED}) for ref in own
    )
    return (DumpRef(path=of_round, weight=1 - replay, corpus=OWN), *replayed)
