"""What the benchmark tools share: tables in Markdown, peaks of memory and of arithmetic, and the machine of a number."""

import os
import re
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import psutil
import torch


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


def peak_bytes(device: str, reset: bool = False) -> int:
    """The most that the process has held, since the reset; a reset starts at what it holds now."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss: a process inherits it from the one that started it, and it cannot be reset.
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def matmul_flops(dtype: torch.dtype, clock: Callable[[], float], size: int = 1024, times: int = 8) -> float:
    """FLOP/s of the fastest of several products of square matrices on the CPU, with the threads torch has.

    Args:
        clock: gives seconds.
    """
    matrix = torch.randn(size, size).to(dtype)
    fastest = float("inf")
    for _ in range(times + 1):
        began = clock()
        torch.mm(matrix, matrix)
        fastest = min(fastest, clock() - began)
    return 2 * size**3 / fastest
