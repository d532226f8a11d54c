"""The line that tells a dump's figures, for a person: no names of documents, no nested values."""

from stage1_teacher.dump.summary import summary_text


def test_figures_are_told_with_what_is_left_out_counted_by_reason() -> None:
    summary = {
        "documents": 1200,
        "stored_bytes_per_text_byte": 5.25,
        "cost": {"seconds": 3.0},
        "left_out_by_corpus": {"left out: empty text": 2},
        "left_out_unspellable": {"7": "the tokenizer cannot spell it", "9": "the tokenizer cannot spell it"},
        "shards_by_engine": {"vllm-0.32.0": 3},
        "shards": [{"name": "part-00000.parquet"}],
    }
    expected = (
        "documents 1,200; stored_bytes_per_text_byte 5.25; left out: empty text 2; the tokenizer cannot spell it 2"
    )
    assert summary_text(summary) == expected
    assert summary_text({"documents": 1}) == "documents 1"  # of an earlier release
