"""The summary of a written corpus: counts over its shards, read from the shards alone."""

from typing import Any

from schemas.file_seal import check_seal
from schemas.manifest import ShardPlan
from schemas.storage.locations import Location
from schemas.text_corpus import TextManifest, text_shard_counts
from stage1_teacher.coordination.thread_map import thread_map
from stage1_teacher.generation.segmentation import Counts, add_counts

_SUMMED = ("prompts", "completions", "kept", "ended", "supervised_bytes", "prompt_tokens", "written_tokens")


def summarise(folder: Location, manifest: TextManifest) -> dict[str, Any]:
    """Return the content of `summary.json`; reads every byte.

    Raises ValueError for a shard that is damaged or was written from other prompts than planned.
    """

    def read(shard: ShardPlan) -> tuple[dict[str, Any], dict[str, Any]]:
        path = shard.path(folder)
        try:
            digest = check_seal(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete it and run the same command again, which writes it again") from error
        counted = text_shard_counts(path)
        if counted["documents_sha256"] != shard.sha256:
            raise ValueError(f"{path} was written from other prompts than planned; delete it and run the command again")
        return counted, {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}

    found = thread_map(read, manifest.shards)
    totals: dict[str, Any] = {name: sum(counted[name] for counted, _ in found) for name in _SUMMED}
    for name in ("left_out_prompts", "left_out_completions"):
        reasons: dict[str, dict[str, Any]] = {}
        for counted, _ in found:
            for reason, of_shard in counted[name].items():
                total = reasons.setdefault(reason, {"number": 0, "first": of_shard["first"]})
                total["number"] += of_shard["number"]
        totals[name] = reasons
    own: Counts = {}
    for counted, _ in found:
        add_counts(own, counted["segmentation"])
    left_out = {key: value for key, value in manifest.prompt_counts.items() if key.startswith("left out")}
    return {
        **totals,
        "segmentation": own,
        "stored_bytes": sum(listed["bytes"] for _, listed in found),
        "left_out_rows": left_out,
        "engines": sorted({counted["engine"] for counted, _ in found}),
        "shards": [listed for _, listed in found],
    }
