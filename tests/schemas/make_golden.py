"""Write the golden shard of the version that is written now: `python -m tests.schemas.make_golden`.

Run it once, when a version of the format is released; after that the file is history, and readers answer to it.
"""

import json
from pathlib import Path

from pipeline.dumps.positions import positions
from schemas import SCHEMA_VERSION
from schemas.record import Record
from schemas.shard import commit_shard, read_shard, to_table
from tests.support.readable_dumps import cut_positions, make_record, varied_record

FOLDER = Path(__file__).with_name("golden")


def golden_records() -> list[Record]:
    """Make a document with all that varies, and one in two windows, the second supervising only its end."""
    first = make_record("windows", "aé  ".encode(), has_end=False)
    second = cut_positions(make_record("windows", b"  end", window_start=3), start=2)
    return [varied_record("varied", seed=1, document=b"golden"), first, second]


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
        }
        for record in read_shard(path)
    ]


if __name__ == "__main__":
    shard = FOLDER / f"version-{SCHEMA_VERSION}.parquet"
    FOLDER.mkdir(exist_ok=True)
    commit_shard(to_table(golden_records(), {"golden": SCHEMA_VERSION}), shard, zstd_level=19)
    shard.with_suffix(".json").write_text(json.dumps(golden_values(shard), separators=(",", ":")) + "\n")
    print(f"{shard}: {shard.stat().st_size} bytes")
