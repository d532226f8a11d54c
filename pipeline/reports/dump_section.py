"""A report's section on a dump. Every cell is escaped."""

import shlex

from pipeline.reports.html import html_text
from pipeline.reports.runs import Dump
from pipeline.reports.tables import escape, escaped_table, is_number, table
from pipeline.runtime.format import decimal_size
from schemas.manifest import flatten


def dump_section(dump: Dump) -> str:
    """Return a dump's section: its size, what it left out, its audit, and the least faithful documents."""
    title = f"<h3><code>{html_text(str(dump.path or dump.name))}</code></h3>"
    if dump.path is None:
        return f"{title}<p>Not on this machine, so nothing is known about it here.</p>"
    facts = "".join(f"<div><dt>{html_text(k)}</dt><dd>{html_text(v)}</dd></div>" for k, v in dump_facts(dump))
    counts = {**dump.corpus_counts, **flatten(dump.summary.get("left_out_unspellable", {}), "the teacher: ")}
    left_out = [
        [key.removeprefix("left out: "), value] for key, value in counts.items() if key not in ("documents", "bytes")
    ]
    parts = [title, f"<dl>{facts}</dl>", _worst(dump)]
    if left_out:
        counts_table = escaped_table(["reason", "documents"], left_out)
        parts.append(f"<details><summary>Left out</summary>{counts_table}</details>")
    rows = [[key, str(value)] for key, value in flatten(dump.identity).items()]
    parts.append(f"<details><summary>Identity</summary>{escaped_table(['key', 'value'], rows, 2)}</details>")
    return "".join(parts)


def dump_facts(dump: Dump) -> list[tuple[str, str]]:
    """Return the figures at the head of a dump's section, by name; unknown ones are left out."""
    summary, audit = dump.summary, dump.audit
    reference = dict(audit.get("wide_covering") or {})
    existing, planned = dump.shards
    facts = [("shards", f"{existing:,}" if existing == planned else f"{existing:,} of {planned:,}: incomplete")]
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
    if is_number(reference.get("kl_nats")):
        facts.append(("KL to a wide covering", f"{reference['kl_nats']:.4f} nats"))
        facts.append(("off by more than 0.05", f"{reference['share_off_by_0.05']:.1%} of positions"))
    return facts


def _worst(dump: Dump) -> str:
    """Return the audited documents whose targets differ most from those of a wide covering."""
    worst = list(dump.audit.get("worst_documents") or ())
    if not worst:
        return ""
    rows = [[html_text(str(d["doc_id"])), escape(d.get("kl_nats")), escape(d.get("total_variation"))] for d in worst]
    command = html_text(
        shlex.join(["bld", "inspect", str(dump.path), "--doc", str(worst[0]["doc_id"]), "--html", "page.html"])
    )
    worst_table = table(["document", "KL, nats per position", "total variation"], rows)
    return (
        f"<details><summary>Audited documents furthest from a wide covering ({len(rows)})</summary>{worst_table}"
        f"<p>To view one: <code>{command}</code></p></details>"
    )
