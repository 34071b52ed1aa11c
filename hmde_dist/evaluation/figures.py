"""Figures of the HTML report: SVG and HTML written by hand, one string each.

They need nothing but the page's own style sheet (`STYLE`): no script, no font, no picture from elsewhere. Drawn 360
units wide so that text is legible on a narrow screen, where each is shown at about that width; on a wide one they lie
side by side. Every text that is not ours is escaped here.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 50, 8, 8, 22
COLOURS = 8

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1a1d21; --soft: #5b6470; --rule: #dde1e6; --heat: #164a9c;
  --on-heat: #fff; --c0: #1f66d1; --c1: #c2570c; --c2: #1b8a5a; --c3: #8a4fc9; --c4: #b02a5b; --c5: #0e7f8c; --c6: #8a6d00; --c7: #68707a; }
@media (prefers-color-scheme: dark) { :root { --page: #101215; --card: #181b20; --ink: #e8eaed; --soft: #a2abb6; --rule: #30353c;
  --heat: #6f9fe8; --on-heat: #0b1220; --c0: #6ea8fe; --c1: #f2994a; --c2: #4fc78e; --c3: #c099f0; --c4: #f07fa8; --c5: #4cc3d0; --c6: #d9b93b; --c7: #a2abb6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 78rem; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
p { margin: 0 0 .8rem; color: var(--soft); max-width: 46rem; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 1rem; align-items: start; margin-top: 1rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1rem; min-width: 0; } section.wide { grid-column: 1 / -1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin-top: 1rem; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: .6rem .8rem; min-width: 0; }
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; } .tiles span { color: var(--soft); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1.2rem; align-items: start; }
figure { margin: 0; min-width: 0; max-width: 28rem; } figure.heat-map { max-width: none; } figcaption { font-weight: 600; font-size: .9rem; display: flex; justify-content: space-between; gap: .5rem; }
figcaption b { font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem; color: var(--soft); } .legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .3rem; }
svg { display: block; width: 100%; height: auto; margin-top: .3rem; } svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); } svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .over { fill: transparent; } svg .over:hover { fill: var(--soft); fill-opacity: .18; }
.scroll { overflow: auto; max-height: 32rem; } .heat { max-height: none; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; } th { font-weight: 600; }
td:first-child, th:first-child { text-align: left; } table.left td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.heat table { table-layout: fixed; border-spacing: 2px; border-collapse: separate; } .heat th { font-size: .72rem; padding: .1rem .2rem; border: 0; text-align: center; }
.heat th:first-child { position: sticky; left: 0; background: var(--card); text-align: right; } .heat td { padding: .25rem 0; min-width: 1.7rem; text-align: center; border: 0; border-radius: 4px;
  background: color-mix(in srgb, var(--heat) calc(var(--v) * 100%), var(--card)); } .heat td:first-child { text-align: center; } .heat td.high { color: var(--on-heat); } .heat td.none { background: none; color: var(--soft); }
.scale { height: .6rem; width: 9rem; border-radius: 4px; border: 1px solid var(--rule); background: linear-gradient(to right, var(--card), var(--heat)); display: inline-block; margin: 0 .4rem; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--c0); font-size: .88rem; }
"""


def show(value) -> str:
    """A cell of a table: whole numbers with thousands, others to four significant digits."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}" if 0.01 <= abs(value) <= 1 else f"{value:.4g}"
    return str(value)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span [low, high]."""
    from matplotlib.ticker import MaxNLocator

    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high).tolist()


def short(value: float) -> str:
    """The number at a tick, in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}".replace("e-0", "e-")


def _legend(names: Sequence[str], last: Sequence[float | None] | None = None) -> str:
    items = []
    for number, name in enumerate(names):
        value = f" {show(last[number])}" if last and last[number] is not None else ""
        items.append(f'<span><i style="background:var(--c{number % COLOURS})"></i>{escape(name)}{value}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def lines(title: str, x_name: str, xs: Sequence[float], series: dict[str, Sequence[float | None]]) -> str:
    """A line for each of `series` over `xs` (increasing); a value that is None or not finite is a gap.

    Hovering shows the numbers. Raises nothing: a chart without a value says so.
    """
    clean = {
        name: [y if y is not None and math.isfinite(y) else None for y in values] for name, values in series.items()
    }
    known = [y for values in clean.values() for y in values if y is not None]
    last = [next((y for y in reversed(values) if y is not None), None) for values in clean.values()]
    alone = len(clean) == 1
    head = f"<figcaption><span>{escape(title)}</span>" + (f"<b>{show(last[0])}</b>" if alone and known else "")
    head += "</figcaption>" + ("" if alone else _legend(list(clean), last))
    if not known:
        return f"<figure>{head}<p>no finite value</p></figure>"
    height = 200
    y_ticks = ticks(min(known), max(known))
    x_ticks = [tick for tick in ticks(xs[0], xs[-1], 5) if xs[0] <= tick <= xs[-1]] if len(xs) > 1 else [xs[0]]
    span = xs[-1] - xs[0] or 1

    def at_x(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - xs[0]) / span if len(xs) > 1 else 0.5)

    def at_y(y: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0])

    parts = []
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 5}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        where = "end" if at_x(tick) > WIDTH - 20 else "middle"
        parts.append(f'<text x="{at_x(tick):.1f}" y="{height - 6}" text-anchor="{where}">{short(tick)}</text>')
    for number, values in enumerate(clean.values()):
        colour, path, pen_up = f"var(--c{number % COLOURS})", [], True
        for x, y in zip(xs, values, strict=True):
            if y is not None:
                path.append(f"{'M' if pen_up else 'L'}{at_x(x):.1f} {at_y(y):.1f}")
            pen_up = y is None
        parts.append(f'<path class="line" style="stroke:{colour}" d="{"".join(path)}"/>')
        if len(xs) <= 30:
            dots = [(x, y) for x, y in zip(xs, values, strict=True) if y is not None]
            parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.6" style="fill:{colour}"/>' for x, y in dots]
    edges = [LEFT, *((at_x(a) + at_x(b)) / 2 for a, b in pairwise(xs)), WIDTH - RIGHT]
    for number, x in enumerate(xs):
        values = [f"{name} {show(ys[number])}" for name, ys in clean.items() if ys[number] is not None]
        parts.append(
            f'<rect class="over" x="{edges[number]:.1f}" width="{max(0.0, edges[number + 1] - edges[number]):.1f}" '
            f'y="{TOP}" height="{height - TOP - BOTTOM}"><title>{escape(x_name)} {show(x)}: {escape(", ".join(values))}'
            "</title></rect>"
        )
    label = escape(f"{title} by {x_name}")
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure>{head}{svg}</figure>"


def dots(title: str, rows: dict[str, Sequence[float | None]], names: Sequence[str]) -> str:
    """A row for each key of `rows` with a dot for each of `names`, over one axis."""
    known = [v for values in rows.values() for v in values if v is not None and math.isfinite(v)]
    if not known:
        return ""
    left = min(150, 14 + 6.8 * max(map(len, rows)))
    within = min(known) >= 0 and max(known) <= 1
    scale = ticks(0 if within else min(known), max(known))
    step, height = 20, 20 * len(rows) + TOP + BOTTOM

    def at(value: float) -> float:
        return left + (WIDTH - left - 26) * (value - scale[0]) / (scale[-1] - scale[0])

    parts = []
    for tick in scale:
        parts.append(f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{at(tick):.1f}" y="{height - 6}" text-anchor="middle">{short(tick)}</text>')
    for number, (row, values) in enumerate(rows.items()):
        y = TOP + step * (number + 0.5)
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(row if len(row) <= 24 else row[:23] + "…")}</text>'
        )
        # The first is drawn last: it is the one that the page is about.
        for place in reversed(range(len(values))):
            value = values[place]
            if value is not None and math.isfinite(value):
                size = 5 if place == 0 else 3.6
                tip = escape(f"{row}: {names[place]} {show(value)}")
                parts.append(
                    f'<circle cx="{at(value):.1f}" cy="{y:.1f}" r="{size}" style="fill:var(--c{place % COLOURS})">'
                    f"<title>{tip}</title></circle>"
                )
    legend = _legend(names) if len(names) > 1 else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{svg}</figure>"


def bars(title: str, values: dict[str, float | None]) -> str:
    """A bar for each of `values`, with its name above and its number at the end; all at least 0."""
    known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    if not known:
        return ""
    longest, step = max(known.values()) or 1, 38
    parts = []
    for number, (name, value) in enumerate(known.items()):
        y, width = step * number + 14, (WIDTH - 50) * max(0.0, value) / longest
        parts.append(f'<text x="0" y="{y}">{escape(name)}</text>')
        colour = f"var(--c{number % COLOURS})"
        parts.append(f'<rect x="0" y="{y + 5}" width="{width:.1f}" height="12" rx="3" style="fill:{colour}"/>')
        parts.append(f'<text x="{width + 6:.1f}" y="{y + 15}">{show(value)}</text>')
    height = step * len(known)
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def heat_map(title: str, values: dict[tuple[str, str], float], across: str, down: str) -> str:
    """A square table of `values` in [0, 1] by (row, column), in hundredths; colours span what occurs, at least 0.2."""
    languages = sorted({name for pair in values for name in pair})
    low, high = min(values.values()), max(values.values())
    low, high = (max(0.0, high - 0.2), high) if high - low < 0.2 else (low, high)
    rows = ["<tr><th></th>" + "".join(f"<th>{escape(name)}</th>" for name in languages) + "</tr>"]
    for row in languages:
        cells = []
        for column in languages:
            if (row, column) not in values:
                cells.append('<td class="none">' + ("" if row != column else "–") + "</td>")
                continue
            value = values[row, column]
            share = (value - low) / ((high - low) or 1)
            tip = escape(f"{row} to {column}: {show(value)}")
            style = ' class="high"' if share > 0.75 else ""
            cells.append(f'<td{style} style="--v:{share:.2f}" title="{tip}">{100 * value:.0f}</td>')
        rows.append(f"<tr><th>{escape(row)}</th>{''.join(cells)}</tr>")
    return (
        f'<figure class="heat-map"><figcaption>{escape(title)}</figcaption><div class="legend"><span>{escape(down)} ↓ {escape(across)} →'
        f'</span><span>{100 * low:.0f}<span class="scale"></span>{100 * high:.0f}</span></div>'
        f'<div class="scroll heat"><table>{"".join(rows)}</table></div></figure>'
    )


def table(rows: Sequence[Sequence], words: bool = False) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    lines_ = ["<tr>" + "".join(f"<th>{escape(show(cell))}</th>" for cell in head) + "</tr>"]
    lines_ += ["<tr>" + "".join(f"<td>{escape(show(cell))}</td>" for cell in row) + "</tr>" for row in body]
    style = ' class="left"' if words else ""
    return f'<div class="scroll"><table{style}>{"".join(lines_)}</table></div>'
