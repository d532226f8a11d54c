"""The card of a written corpus names its writer without the folders of this machine."""

from pathlib import Path

from pipeline.dumps.text_card import text_card
from schemas.text_corpus import TextManifest


def test_a_writer_in_a_local_folder_is_named_without_it(tmp_path: Path) -> None:
    identity = {
        "writer": {"model": str(tmp_path / "private" / "tiny"), "revision": None, "dtype": "float32"},
        "prompts": {"sha256": "ab", "field": "text"},
        "sampling": {"temperature": 1.0},
    }
    summary = {"kept": 3, "left_out_prompts": {"empty text": {"number": 2, "first": "x"}}, "left_out_completions": {}}
    card = text_card(TextManifest(identity=identity, prompt_counts={}, shards=()), summary, None)
    assert "| model | tiny |" in card and "| left out: empty text | 2 |" in card
    assert "private" not in card
