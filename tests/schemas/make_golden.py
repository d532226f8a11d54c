"""Write the golden shard of the version that is written now: `python -m tests.schemas.make_golden`.

Run it once, when a version of the format is released; after that the file is history, and readers answer to it.
"""

import json
from pathlib import Path

import numpy as np

from pipeline.dumps.positions import positions
from schemas import SCHEMA_VERSION
from schemas.record import Record
from schemas.shard import commit_shard, read_shard, to_table
from schemas.token_alternatives import TokenAlternatives
from tests.support.readable_dumps import cut_positions, make_record, varied_record, with_tokens

FOLDER = Path(__file__).with_name("golden")
IDENTITY = {"golden": SCHEMA_VERSION, "tokens": {"top_k": 4, "min_prob": 0.0}}  # whatever the version knows


def golden_records() -> list[Record]:
    """Make a document with all that varies, and one in two windows, the second supervising only its end."""
    first = make_record("windows", "aé  ".encode(), has_end=False)
    second = cut_positions(make_record("windows", b"  end", window_start=3), start=2)
    return [with_tokens(record) for record in (varied_record("varied", seed=1, document=b"golden"), first, second)]


def golden_values(path: Path) -> list[dict[str, object]]:
    """Return the values of a shard's records, plain and decoded."""
    return [
        {
            "doc_id": record.doc_id,
            "window_start": record.window_start,
            "document": list(record.document),
            "token_lengths": record.teacher_token_lengths.tolist(),
            "token_logprobs": [round(float(value), 4) for value in record.teacher_token_logprobs],
            "positions": [
                {
                    "offset": position.offset,
                    "symbols": [[symbol, round(probability, 3)] for symbol, probability in position.symbols],
                    "tail": round(position.tail, 3),
                    "shares": [round(share, 3) for share in position.measures.values()],
                }
                for position in positions(record)
            ],
            **({} if record.tokens is None else {"tokens": token_values(record.tokens)}),
        }
        for record in read_shard(path)
    ]


def token_values(tokens: TokenAlternatives) -> dict[str, object]:
    """Return the alternatives of a record's tokens as JSON values."""
    log_probs = [round(float(value), 4) for value in tokens.log_probs]
    ends = [None if np.isnan(value) else round(float(value), 4) for value in tokens.end_log_probs]
    columns = {name: getattr(tokens, name).tolist() for name in ("offsets", "ids", "token_ids")}
    return columns | {"log_probs": log_probs, "end_log_probs": ends}


if __name__ == "__main__":
    shard = FOLDER / f"version-{SCHEMA_VERSION}.parquet"
    FOLDER.mkdir(exist_ok=True)
    commit_shard(to_table(golden_records(), IDENTITY), shard, zstd_level=19)
    shard.with_suffix(".json").write_text(json.dumps(golden_values(shard), separators=(",", ":")) + "\n")
    print(f"{shard}: {shard.stat().st_size} bytes")
