"""A file to write, and what content and tables both write into theirs."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """A file to write: a table of a wiki, or if `table` is empty part `part` of `parts` of its content."""

    folder: Path
    language: str
    table: str = ""
    part: int = 0
    parts: int = 1


def timestamp(draw: int, between: str, end: str) -> str:
    return (
        f"20{10 + draw % 16}-{1 + draw % 12:02}-{1 + draw % 28:02}{between}"
        f"{draw // 64 % 24:02}:{draw // 512 % 60:02}:{draw // 4096 % 60:02}{end}"
    )
