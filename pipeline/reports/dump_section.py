"""What a report says of a dump. Every cell is escaped."""

import shlex

from pipeline.reports.html import shown
from pipeline.reports.runs import Dump
from pipeline.reports.tables import escape, escaped_table, is_number, table
from pipeline.runtime.format import decimal_size
from schemas.manifest import flatten


def dump_section(dump: Dump) -> str:
    """A dump: its size, what it left out, how true it is by its own audit, and the documents that are least so."""
    title = f"<h3><code>{shown(str(dump.path or dump.name))}</code></h3>"
    if dump.path is None:
        return f"{title}<p>Not on this machine, so nothing is known of it here.</p>"
    facts = "".join(f"<div><dt>{shown(k)}</dt><dd>{shown(v)}</dd></div>" for k, v in dump_facts(dump))
    left_out = {**dump.corpus_counts, **flatten(dump.summary.get("left_out_unspellable", {}), "the teacher: ")}
    left = [
        [key.removeprefix("left out: "), value] for key, value in left_out.items() if key not in ("documents", "bytes")
    ]
    parts = [title, f"<dl>{facts}</dl>", _worst(dump)]
    if left:
        parts.append(f"<details><summary>Left out</summary>{escaped_table(['reason', 'documents'], left)}</details>")
    rows = [[key, str(value)] for key, value in flatten(dump.identity).items()]
    parts.append(f"<details><summary>Identity</summary>{escaped_table(['key', 'value'], rows, 2)}</details>")
    return "".join(parts)


def dump_facts(dump: Dump) -> list[tuple[str, str]]:
    """What stands at a dump's head, by name; what is not known is not there."""
    summary, audit = dump.summary, dump.audit
    wide = dict(audit.get("wide_covering") or {})
    there, planned = dump.shards
    facts = [("shards", f"{there:,}" if there == planned else f"{there:,} of {planned:,}: not complete")]
    facts += [(key, f"{summary[key]:,}") for key in ("documents", "positions") if key in summary]
    if "bytes" in summary:
        facts += [("text", decimal_size(summary["bytes"])), ("stored", decimal_size(summary["stored_bytes"]))]
        facts.append(("stored per text byte", f"{summary['stored_bytes_per_text_byte']:.2f} bytes"))
    if audit.get("positions"):
        facts.append(("documents audited", f"{audit['documents']:,}"))
        facts.append(("mass kept", f"{audit['kept_mass']:.2%}"))
        facts.append(("mass dropped", f"{audit['dropped_mass']:.2%}"))
        facts.append(("doubt", f"{audit['doubt']:.4f}"))
        facts.append(("teacher, bits per byte", f"{audit['realised_bits_per_byte']:.3f}"))
    if is_number(wide.get("kl_nats")):
        facts.append(("KL to a wide covering", f"{wide['kl_nats']:.4f} nats"))
        facts.append(("off by more than 0.05", f"{wide['share_off_by_0.05']:.1%} of positions"))
    return facts


def _worst(dump: Dump) -> str:
    """The audited documents whose targets are furthest from a wide covering's."""
    worst = list(dump.audit.get("worst_documents") or ())
    if not worst:
        return ""
    rows = [[shown(str(d["doc_id"])), escape(d.get("kl_nats")), escape(d.get("total_variation"))] for d in worst]
    command = shown(
        shlex.join(["bld", "inspect", str(dump.path), "--doc", str(worst[0]["doc_id"]), "--html", "page.html"])
    )
    found = table(["document", "KL, nats per position", "total variation"], rows)
    return (
        f"<details><summary>Audited documents furthest from a wide covering ({len(rows)})</summary>{found}"
        f"<p>Look at one: <code>{command}</code></p></details>"
    )
