"""What an ablation found: mean and interval of every cell over its seeds, and whether it differs from the best.

Seeds are paired: the same seed draws the same initial weights and batches in every cell that has the same data and model.
Owns `table.json`, `table.md` and `plot.svg`. Knows nothing of recipes, training and files of cells.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hmde_dist.command import output_file
from hmde_dist.evaluation.run_report import markdown_table
from hmde_dist.evaluation.significance import holm, paired_tests, t_interval

LEVEL = 0.05


def compare_cells(values: Mapping[str, Mapping[int, Mapping[str, float]]], measures: Sequence[str]) -> dict:
    """Every number of the table: cell -> measure -> mean, interval, values, and the tests against the best cell.

    Args:
        values: cell -> seed -> measure -> value; cells may lack seeds, and those that have none are left out.
        measures: higher is better.

    Returns:
        For each cell and measure `values` by seed, `mean`, `interval` (95 %, Student's t over seeds; None for one seed),
        `best`, and for all but the best `against_best`: the mean `difference` over the seeds that both have, its
        `interval`, `p` (paired t) and `p_holm` over the cells; None where fewer than two seeds are common.
    """
    values = {name: dict(sorted(seeds.items())) for name, seeds in values.items() if seeds}
    cells: dict[str, dict] = {name: {} for name in values}
    for measure in measures:
        for name, seeds in values.items():
            numbers = [found[measure] for found in seeds.values()]
            cells[name][measure] = {
                "values": {seed: found[measure] for seed, found in seeds.items()},
                "mean": float(np.mean(numbers)),
                "interval": t_interval(numbers),
            }
        if not cells:
            continue
        best = max(cells, key=lambda name: cells[name][measure]["mean"])
        tested = []
        for name in cells:
            found = cells[name][measure]
            found["best"] = name == best
            if name == best:
                continue
            common = [seed for seed in values[name] if seed in values[best]]
            found["against_best"] = None
            if len(common) > 1:
                one, other = ([values[of][seed][measure] for seed in common] for of in (name, best))
                test = paired_tests(one, other)
                found["against_best"] = {
                    "seeds": common,
                    "difference": test["difference"],
                    "interval": t_interval(np.subtract(one, other)),
                    "p": test["p_t"],
                }
                tested.append(found["against_best"])
        for test, p in zip(tested, holm([test["p"] for test in tested]), strict=True):
            test |= {"p_holm": p, "significant": p < LEVEL}
    return cells


def as_markdown(cells: Mapping[str, Mapping], measures: Sequence[str]) -> str:
    """The table, the best of each measure in bold, and what its entries mean."""
    rows = [["cell", "seeds", *measures]]
    for name, found in cells.items():
        rows.append([name, len(found[measures[0]]["values"]), *(_entry(found[measure]) for measure in measures)])
    return (
        f"{markdown_table(rows)}\n\n"
        "Mean over seeds ± half of its 95 % interval (Student's t). The best mean is bold. In brackets the paired difference to "
        "it over the same seeds; worse or better: significant (paired t test, p < 0.05 after Holm over the cells); n.s.: not. "
        "The best was chosen by the same seeds, which makes it look a little better than it is.\n"
    )


def _entry(found: Mapping) -> str:
    mean = f"{found['mean']:.3f}" + _half(found["interval"])
    if found["best"]:
        return f"**{mean}**"
    test = found["against_best"]
    if test is None:
        return f"{mean} (too few seeds to compare)"
    verdict = ("better" if test["difference"] > 0 else "worse") if test["significant"] else "n.s."
    return f"{mean} ({test['difference']:+.3f}{_half(test['interval'])}, {verdict})"


def _half(interval: Sequence[float] | None) -> str:
    return f" ± {(interval[1] - interval[0]) / 2:.3f}" if interval else ""


def plot(cells: Mapping[str, Mapping], measures: Sequence[str], path: Path) -> None:
    """A panel for each measure, a row for each cell: dots for seeds, a bar for the interval, a tick for the mean (SVG)."""
    from matplotlib.figure import Figure  # heavy: only where a picture is asked for

    figure = Figure(figsize=(3.2 * len(measures) + 1.5, 1.4 + 0.42 * len(cells)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for ax, measure in zip(panels, measures, strict=True):
        for row, found in enumerate(cells.values()):
            one = found[measure]
            colour = "#1f66d1" if one["best"] else "#68707a"
            if one["interval"]:
                ax.plot(one["interval"], [row, row], color=colour, linewidth=6, alpha=0.25, solid_capstyle="butt")
            ax.plot([one["mean"]], [row], marker="|", markersize=16, markeredgewidth=2, color=colour)
            ax.plot(list(one["values"].values()), [row] * len(one["values"]), "o", markersize=4, color=colour)
        ax.set_title(measure, fontsize=11, fontweight="bold")
        ax.grid(axis="x", color="#dde1e6")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(cells)), list(cells))
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    with output_file(path, "wb") as file:
        figure.savefig(file, format="svg")


def write_table(facts: Mapping, cells: Mapping[str, Mapping], measures: Sequence[str], out: Path) -> str:
    """Write `table.json` (`facts` and every number), `table.md` and `plot.svg` into `out`; returns the Markdown."""
    text = as_markdown(cells, measures)
    with output_file(out / "table.json") as file:
        json.dump({**facts, "measures": list(measures), "cells": cells}, file, indent=1, ensure_ascii=False)
    with output_file(out / "table.md") as file:
        file.write(text)
    plot(cells, measures, out / "plot.svg")
    return text
