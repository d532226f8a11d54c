"""Next-byte distributions of genlm-bytes for some documents.

Run by the Python that has the library; imports nothing of this project.

    X/bin/python genlm_worker.py --documents documents.jsonl --model FOLDER --start NAME --end NAME.. --beam 5 --out out

Reads one {"doc_id", "hex"} a line. Writes out.npz, a float32 array of natural logs for each document, its bytes + 1
positions by 256 symbols (END is 0xFF, a byte that no UTF-8 text has), and out.json, what the model had to compute for
them.

The walk is the one of the library's own `greedy` and `sample`: `logp_next`, then `prune() << byte`. Not its `prefill`,
whose beam takes end tokens for text that spells their names. All names in `--end` feed one END, where a token may
begin.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genlm.backend.llm import AsyncTransformer
from genlm.bytes import BeamParams, ByteBeamState
from scipy.special import logsumexp
from transformers import AutoModelForCausalLM, AutoTokenizer

END = 0xFF
_GENLM_END = 257  # its index of the end among 256 bytes, end of token, end of text
_WARM_UP = b"The first words"


class Count:
    """Count of what goes through the model: calls, contexts (rows of a batch), tokens without padding."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls = self.contexts = self.tokens = 0
        model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BT, mask_BT = args[0], kwargs["attention_mask"]
        self.calls += 1
        self.contexts += len(ids_BT)
        # The mask spans what is cached as well; only the last columns are computed now.
        self.tokens += int(mask_BT[:, -ids_BT.shape[1] :].sum())


async def walk(first: ByteBeamState, document: bytes) -> tuple[np.ndarray, float]:
    """Return (positions by 256 logs, the natural log of the prefix mass of the whole document)."""
    beam, rows = first, []
    for byte in document:
        rows.append((await beam.logp_next()).ps)
        beam = await (beam.prune() << byte)
    rows.append((await beam.logp_next()).ps)
    logprobs_PV = np.stack(rows)[:, :256]
    logprobs_PV[:, END] = np.stack(rows)[:, _GENLM_END]
    # A token with a 0xFF byte has no place; the rest sums to 1.
    logprobs_PV -= logsumexp(logprobs_PV, axis=1, keepdims=True)
    return logprobs_PV.astype(np.float32), float(beam.logZ)


async def run(options: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return (doc_id -> logs, counts)."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.bos_token = options.start  # what every context begins with
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    count = Count(model)
    llm = AsyncTransformer(model, tokenizer)
    params = BeamParams(
        K=options.beam,
        prune_threshold=options.prune_threshold,
        eos_byte_strings=[name.encode() for name in options.end],
    )
    first = await ByteBeamState.initial(llm, params)
    await walk(first, _WARM_UP)
    found: dict[str, np.ndarray] = {}
    log_mass: dict[str, float] = {}
    num_bytes, seconds, cpu_seconds = 0, 0.0, 0.0
    count.calls = count.contexts = count.tokens = 0
    for line in options.documents.read_text().splitlines():
        item = json.loads(line)
        document = bytes.fromhex(item["hex"])
        llm.clear_cache()  # else a later document finds what an earlier one computed
        started, cpu_started = time.perf_counter(), time.process_time()
        found[item["doc_id"]], log_mass[item["doc_id"]] = await walk(first, document)
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started
        num_bytes += len(document)
    await first.cleanup()
    counted = {"calls": count.calls, "contexts": count.contexts, "tokens": count.tokens}
    return found, {**counted, "bytes": num_bytes, "seconds": seconds, "cpu_seconds": cpu_seconds, "log_mass": log_mass}


def main() -> None:
    """Parse the command line, walk the documents, write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--start", required=True, help="name of the token before every document")
    parser.add_argument("--end", nargs="+", required=True, help="names of the tokens that mean END")
    parser.add_argument("--beam", type=int, required=True, help="K")
    parser.add_argument("--prune-threshold", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    options = parser.parse_args()
    found, counts = asyncio.run(run(options))
    np.savez(options.out.with_suffix(".npz"), **found)
    options.out.with_suffix(".json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
