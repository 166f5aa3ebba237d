"""The report of a run: one HTML file with curves, readable offline, without a line of JavaScript."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A picture of the report.

    Args:
        title: its heading.
        keys: entries of the history that are drawn, with the name of each line.
        unit: of the values, for the axis.
    """

    title: str
    keys: tuple[tuple[str, str], ...]
    unit: str = ""


CURVES = (
    Curve("Loss", (("loss", "training"), ("eval_loss", "evaluation"))),
    Curve("Learning rate", (("learning_rate", "learning rate"),)),
    Curve("Gradient norm", (("grad_norm", "before clipping"),)),
    Curve(
        "Throughput",
        (("tokens/per_sec_per_gpu", "all tokens"), ("tokens/train_per_sec_per_gpu", "trained tokens")),
        "tokens per second and device",
    ),
    Curve("Model FLOPs utilisation", (("mfu", "MFU"),), "share of peak"),
    Curve(
        "Memory",
        (("memory/max_active (GiB)", "peak active"), ("memory/device_reserved (GiB)", "reserved")),
        "GiB",
    ),
)

WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
SMOOTHED_FROM = 60  # points from which a line is drawn thin, with a running mean over it

STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--soft:#667085;--line:#e4e7ec;--page:#fff;--card:#f8f9fb;--a:#3366cc;--b:#d9480f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2c3442;--page:#12161d;--card:#191f29;--a:#7aa2ff;--b:#ff9d5c}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 20px 60px}h1{font-size:24px;margin:0 0 18px}h2{font-size:15px;margin:0 0 8px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:16px;margin:22px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow:hidden}
table{border-collapse:collapse;width:100%}th{font-weight:500;color:var(--soft);text-align:left;padding:4px 16px 4px 0;white-space:nowrap;vertical-align:top}
td{padding:4px 0;overflow-wrap:anywhere}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}.rule{stroke:var(--line)}
.l0,.l1{fill:none;stroke-width:1.8;stroke-linejoin:round}.l0{stroke:var(--a)}.l1{stroke:var(--b)}.thin{stroke-width:1;opacity:.35}
.d0{fill:var(--a)}.d1{fill:var(--b)}.key{color:var(--soft);font-size:12.5px;margin-top:4px}.key b{font-weight:600}
.k0{color:var(--a)}.k1{color:var(--b)}pre{overflow:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;font-size:12.5px;line-height:1.45}
"""


def write_report(
    path: str | Path, *, title: str, history: list[dict[str, Any]], summary: dict[str, Any], config_yaml: str
) -> None:
    """Write the report as one self-contained file.

    Args:
        path: the file.
        title: heading of the page.
        history: log entries in order, each with `step` and figures (see `CURVES` for their names).
        summary: name -> figure, for the table at the top.
        config_yaml: the config as text, without secrets.
    """
    Path(path).write_text(build_report(title, history, summary, config_yaml), encoding="utf-8")


def build_report(title: str, history: list[dict[str, Any]], summary: dict[str, Any], config_yaml: str) -> str:
    """The page as text."""
    rows = "".join(f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in summary.items())
    cards = "".join(card for curve in CURVES if (card := draw_curve(curve, history)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main><h1>{_text(title)}</h1>"
        f'<div class="card"><table>{rows}</table></div><div class="grid">{cards}</div>'
        f"<h2>Config</h2><pre>{_text(config_yaml)}</pre></main></body></html>\n"
    )


def draw_curve(curve: Curve, history: list[dict[str, Any]]) -> str:
    """A card with the picture of a curve; empty when the history has no value for it."""
    lines = [(name, points) for key, name in curve.keys if (points := read_points(history, key))]
    if not lines:
        return ""
    unit = f" <span class='key'>({_text(curve.unit)})</span>" if curve.unit else ""
    key = " &nbsp; ".join(
        f"<b class='k{index}'>{_text(name)}</b> last {format_value(points[-1][1])}, lowest "
        f"{format_value(min(y for _, y in points))}, highest {format_value(max(y for _, y in points))}"
        for index, (name, points) in enumerate(lines)
    )
    picture = draw_lines([points for _, points in lines], curve.title)
    return f"<div class='card'><h2>{_text(curve.title)}{unit}</h2>{picture}<div class='key'>{key}</div></div>"


def read_points(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the entries that have a finite value."""
    points = []
    for entry in history:
        value = entry.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((float(entry.get("step", len(points))), float(value)))
    return points


def draw_lines(lines: list[list[tuple[float, float]]], label: str) -> str:
    """An SVG with axes and up to two lines."""
    xs = [x for line in lines for x, _ in line]
    ys = [y for line in lines for _, y in line]
    x_low, x_high = min(xs), max(xs)
    ticks = nice_ticks(min(ys), max(ys))
    y_low, y_high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low) if y_high > y_low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(label)} by step">']
    for tick in ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_value(tick)}</text>')
    for x in sorted({x_low, (x_low + x_high) // 2, x_high}):
        parts.append(f'<text x="{place(x, y_low)[0]:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    for index, line in enumerate(lines):
        crowded = len(line) >= SMOOTHED_FROM
        parts.append(_path([place(*point) for point in line], f"l{index}" + (" thin" if crowded else "")))
        if crowded:
            parts.append(_path([place(*point) for point in running_mean(line)], f"l{index}"))
        elif len(line) <= 12:
            parts += [
                f'<circle class="d{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in (place(*p) for p in line)
            ]
    return "".join(parts) + "</svg>"


def running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value averaged with its neighbours, a twentieth of the line on both sides, fewer at the ends."""
    half = max(1, len(points) // 40)
    smoothed = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        window = [y for _, y in points[index - reach : index + reach + 1]]
        smoothed.append((x, sum(window) / len(window)))
    return smoothed


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if high <= low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def format_value(value: float) -> str:
    """A number in few characters."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:,.2f}M"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if size < 1e-3 else f"{value:.4g}"


def _path(points: Iterable[tuple[float, float]], kind: str) -> str:
    return f'<path class="{kind}" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + '"/>'


def _text(value: Any) -> str:
    return html.escape(str(value))
