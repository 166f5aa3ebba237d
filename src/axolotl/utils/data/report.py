"""What became of the data: rows, tokens, trained tokens, lengths, what was dropped and why."""

from __future__ import annotations

import itertools
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from axolotl.utils.data.rows import IGNORE_INDEX, count_trained_tokens
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers.utils import get_dataset_lengths

LOG = get_logger(__name__)

NUM_BARS = 24


def summarize(dataset: Dataset, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of a prepared dataset, as plain values that go into JSON.

    Args:
        dataset: prepared rows.
        entries: per source dataset, `name`, `rows_read`, `rows_made`, `rows_kept`, `dropped` and `truncated`.
    """
    lengths = get_dataset_lengths(dataset)
    trained = int(count_trained_tokens(dataset).sum()) if "labels" in dataset.column_names else None
    return {
        "rows": len(dataset),
        "tokens": int(lengths.sum()),
        "trained_tokens": trained,
        "length": {
            "shortest": int(lengths.min(initial=2**31)) if len(lengths) else 0,
            "median": float(np.median(lengths)) if len(lengths) else 0.0,
            "mean": float(lengths.mean()) if len(lengths) else 0.0,
            "longest": int(lengths.max(initial=0)),
        },
        "histogram": histogram(lengths),
        "datasets": entries,
    }


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """How many of the lengths (int, any number of them) fall between neighbouring `borders`, of which the right one is not included."""
    if not len(lengths):
        return {"counts": [], "borders": []}
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = math.ceil((longest - shortest + 1) / NUM_BARS)
    counts = np.bincount((lengths - shortest) // width)
    return {"counts": counts.tolist(), "borders": [shortest + width * bar for bar in range(len(counts) + 1)]}


def log_report(report: dict[str, Any]) -> None:
    """One line with the numbers that say whether a run will train on what was meant."""
    tokens = report["tokens"]
    share = (
        f", {report['trained_tokens'] / tokens:.1%} of them trained"
        if report["trained_tokens"] is not None and tokens
        else ""
    )
    LOG.info(f"{report['rows']:,} rows, {tokens:,} tokens{share}, longest row {report['length']['longest']:,}")


def print_report(report: dict[str, Any]) -> None:
    """The report as a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Dataset", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in headline(report):
        table.add_row(name, value)
    for entry in report["datasets"]:
        table.add_section()
        table.add_row(entry["name"], f"{entry['rows_kept']:,} of {entry['rows_made']:,} rows")
        for reason, count in losses(entry):
            table.add_row(f"  {reason}", f"{count:,}")
    table.add_section()
    for label, count, share in bars(report):
        table.add_row(label, f"{'█' * round(30 * share)} {count:,}")
    Console(stderr=True).print(table)


def headline(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers that matter, as (name, text)."""
    tokens, length = report["tokens"], report["length"]
    lines = [("rows", f"{report['rows']:,}"), ("tokens", f"{tokens:,}")]
    if report["trained_tokens"] is not None:
        lines.append(
            ("trained tokens", f"{report['trained_tokens']:,} ({report['trained_tokens'] / max(tokens, 1):.1%})")
        )
    lines.append(
        (
            "length",
            f"{length['shortest']:,} to {length['longest']:,}, median {length['median']:,.0f}, mean {length['mean']:,.1f}",
        )
    )
    if report.get("duplicates"):
        lines.append(("duplicates dropped", f"{report['duplicates']:,}"))
    if "rows_to_train" in report:
        lines.append(("rows to train / evaluate", f"{report['rows_to_train']:,} / {report['rows_to_evaluate']:,}"))
        lines.append(("optimizer steps", f"{report['steps']:,}"))
    packing = report.get("packing")
    if packing:
        lines.append(("packed rows", f"{packing['bins']:,} of {packing['capacity']:,} tokens"))
        lines.append(("packing efficiency", f"{packing['efficiency']:.2%}, {packing['rows_per_bin']:.1f} rows each"))
    return lines


def losses(entry: dict[str, Any]) -> list[tuple[str, int]]:
    """What a dataset lost, as (reason, rows)."""
    found = [(f"dropped: {reason}", count) for reason, count in entry["dropped"].items()]
    return [*found, ("cut to the longest length", entry["truncated"])] if entry["truncated"] else found


def bars(report: dict[str, Any]) -> list[tuple[str, int, float]]:
    """The length histogram, as (range, rows, share of the tallest bar)."""
    counts, borders = report["histogram"]["counts"], report["histogram"]["borders"]
    tallest = max(counts, default=0) or 1
    ranges = [f"{a:,} to {b - 1:,}" if b - a > 1 else f"{a:,}" for a, b in itertools.pairwise(borders)]
    return [(label, count, count / tallest) for label, count in zip(ranges, counts, strict=True)]


def write_html_report(path: Path, report: dict[str, Any], examples: Dataset, tokenizer: Any) -> None:
    """The report and some rows, token by token, as one HTML file that needs nothing else.

    Args:
        path: file to write.
        report: see `summarize`.
        examples: prepared rows to show. Trained tokens are green, masked ones grey.
        tokenizer: turns token ids into text.
    """
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in headline(report))
    for entry in report["datasets"]:
        rows += (
            f"<tr><th>{escape(entry['name'])}</th><td>{entry['rows_kept']:,} of {entry['rows_made']:,} rows</td></tr>"
        )
        rows += "".join(
            f"<tr><th class=sub>{escape(reason)}</th><td>{count:,}</td></tr>" for reason, count in losses(entry)
        )
    histogram = "".join(
        f"<tr><th>{label}</th><td><div style='width:{20 * share:.2f}em'></div></td><td>{count:,}</td></tr>"
        for label, count, share in bars(report)
    )
    shown = "".join(
        f"<h2>Row {number}</h2><p class=tokens>{_spans(row, tokenizer)}</p>" for number, row in enumerate(examples)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PAGE.format(rows=rows, histogram=histogram, shown=shown), encoding="utf-8")


def _spans(row: dict[str, Any], tokenizer: Any) -> str:
    spans = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        text = escape(tokenizer.decode([token])).replace("\n", "⏎<br>")
        spans.append(
            f"<span class={'t' if label != IGNORE_INDEX else 'm'} title='id {token}, label {label}'>{text}</span>"
        )
    return "".join(spans)


PAGE = """<!doctype html><meta charset=utf-8><title>Dataset report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }} th, td {{ text-align: left; padding: .15em 1em .15em 0; font-weight: normal }}
td {{ font-variant-numeric: tabular-nums }} .sub {{ padding-left: 1.5em; color: #777 }}
.histogram div {{ background: #4a7fb5; height: .8em }}
.tokens {{ font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap }}
.t {{ background: #cdeccd }} .m {{ color: #888; background: #f2f2f2 }} span:hover {{ outline: 1px solid #444 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #181818; color: #ddd }} .t {{ background: #1f4d2b }} .m {{ background: #262626 }} }}
</style>
<h1>Dataset report</h1><table>{rows}</table>
<h2>Lengths in tokens</h2><table class=histogram>{histogram}</table>
<p><span class=t>trained</span> <span class=m>masked</span> (hover for token id and label)</p>{shown}
"""
