"""`bld generate --dry-run`: what would be written and by which engines, from recipe and prompts, without a model."""

from pipeline.config import Recipe, generate_config
from pipeline.corpus.documents import Corpus
from pipeline.planning.engine_shares import describe_shares, engine_shares
from pipeline.runtime.format import are, count_of
from schemas import dump_files
from schemas.storage.locations import Location, location
from schemas.text_corpus import TextManifest
from stage1_teacher.dump.shard_plan import corpus_sha256
from stage1_teacher.generation.plan import known_identity, plan_shards, require_identity
from stage1_teacher.generation.writer import writer_section

Line = tuple[str, str]  # what, and what is planned for it


def print_plan(recipe: Recipe, worker: tuple[int, int] | None = None, on_ray: bool = False) -> None:
    """Print what would be written and by which engines, a line each.

    Args:
        worker: (i, n): of every n-th shard, by one engine; None: of all.
        on_ray: by engines of a Ray cluster, which is not asked.
    Raises:
        ValueError: the recipe would fail on any machine, or the folder holds text by other settings.
    """
    config = generate_config(recipe)
    settings = settings_lines(recipe)
    corpus = Corpus(config.prompts)
    shards, _ = plan_shards(corpus, config.shard_prompts)
    num_prompts, num_shards = sum(shard.num_documents for shard in shards), len(shards)
    max_completions = num_prompts * config.completions
    left_out = ", ".join(f"{key} {number}" for key, number in corpus.counts.items() if key.startswith("left out"))
    folder, state, todo = location(config.path), "nothing there yet", list(range(num_shards))
    if (begun := _begun(folder)) is not None:
        ours = known_identity(config, corpus_sha256(shards))
        require_identity(folder, {key: begun.identity[key] for key in ours}, ours)
        missing = begun.missing(folder)
        todo = [shard.index for shard in missing]
        state = f"{len(begun.shards) - len(missing)} of {count_of(len(begun.shards), 'shard')} there"
    index, count = worker or (0, 1)
    num_todo = sum(shard % count == index for shard in todo)
    lines = [
        ("prompts", f"{num_prompts:,} of {config.prompts.source}" + (f"; {left_out}" if left_out else "")),
        *settings,
        ("in all", f"{max_completions:,} completions, at most {max_completions * config.max_new_tokens:,} tokens"),
        (config.path, f"{count_of(num_shards, 'shard')} of up to {count_of(config.shard_prompts, 'prompt')}; {state}"),
        ("engines", _engines(recipe, num_todo, worker, on_ray)),
    ]
    for what, said in lines:
        print(f"{what}: {said}")


def settings_lines(recipe: Recipe) -> list[Line]:
    """Return what the recipe alone says of the text. Raises ValueError for one that would fail on any machine."""
    config, section = generate_config(recipe), writer_section(recipe)
    how = "greedy" if not config.temperature else f"temperature {config.temperature:g}, top_p {config.top_p:g}"
    return [
        ("writer", f"{section.model} ({config.writer}), by {section.engine}"),
        ("completions", f"{config.completions} of each prompt, of at most {config.max_new_tokens:,} tokens"),
        ("sampling", f"{how}, seed {config.seed}"),
    ]


def _begun(folder: Location) -> TextManifest | None:
    return TextManifest.load(folder) if (folder / dump_files.TEXT_MANIFEST).exists() else None


def _engines(recipe: Recipe, num_shards: int, worker: tuple[int, int] | None, on_ray: bool) -> str:
    """Return which engines write the shards that are to be written."""
    shards = f"{count_of(num_shards, 'shard')} {are(num_shards)} to be written"
    if worker is not None:
        return f"{shards} by worker {worker[0]} of {worker[1]}, with one engine"
    if on_ray:
        fitting = recipe.placement.max_engines
        return f"{shards} by engines on a Ray cluster, " + ("as many as fit" if fitting is None else f"up to {fitting}")
    shares = engine_shares(recipe.with_values(teacher=writer_section(recipe)))
    engines = describe_shares(recipe, shares)
    enough = f", of which {count_of(num_shards, 'engine')} will do" if 0 < num_shards < len(shares) else ""
    return f"{shards} by {engines}{enough}"
