"""What the benchmark tools share: tables in Markdown, and the machine that a number was measured on."""

import os
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import psutil


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head; columns but the first are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if n else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (width + 1) + (":" if n else "-") for n, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def machine() -> str:
    """Processor, cores, memory and date."""
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().total / 2**30
    return f"{names[0] if names else 'unknown processor'}, {cores} cores, {memory:.0f} GiB, {date.today().isoformat()}"
