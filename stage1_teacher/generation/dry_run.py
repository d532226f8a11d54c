"""`bld generate --dry-run`: what would be written, from the recipe and the prompts, without a model."""

from pipeline.config import Recipe, generate_config
from pipeline.corpus.documents import Corpus
from pipeline.runtime.format import count_of
from schemas import dump_files
from schemas.storage.locations import location
from schemas.text_corpus import TextManifest
from stage1_teacher.generation.writer import writer_section


def print_plan(recipe: Recipe) -> None:
    """Print what would be written, a line each. Raises ValueError for a recipe that would fail on any machine."""
    config, section = generate_config(recipe), writer_section(recipe)
    corpus = Corpus(config.prompts)
    num_prompts = sum(1 for _ in corpus.documents())
    num_shards = -(-num_prompts // config.shard_prompts)
    most = num_prompts * config.completions
    left_out = ", ".join(f"{key} {number}" for key, number in corpus.counts.items() if key.startswith("left out"))
    folder, state = location(config.path), "nothing there yet"
    if (folder / dump_files.TEXT_MANIFEST).exists():
        begun = TextManifest.load(folder)
        done = len(begun.shards) - len(begun.missing(folder))
        state = f"{done} of {count_of(len(begun.shards), 'shard')} there"
    how = "greedy" if not config.temperature else f"temperature {config.temperature:g}, top_p {config.top_p:g}"
    lines = [
        ("writer", f"{section.model} ({config.writer}), by {section.engine}"),
        ("prompts", f"{num_prompts:,} of {config.prompts.source}" + (f"; {left_out}" if left_out else "")),
        ("completions", f"{config.completions} each, {most:,} in all, of at most {config.max_new_tokens:,} tokens"),
        ("sampling", f"{how}, seed {config.seed}"),
        ("at most", f"{most * config.max_new_tokens:,} tokens written"),
        (config.path, f"{count_of(num_shards, 'shard')} of up to {count_of(config.shard_prompts, 'prompt')}; {state}"),
    ]
    for what, said in lines:
        print(f"{what}: {said}")
