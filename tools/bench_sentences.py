"""How well sentences are split (precision, recall, F1 of the boundaries against gold sentences) and how fast.

The gold folder holds one file for each language, `<lang>.txt`, with one sentence a line. Sentences without a final mark
are left out. ICU is measured too where PyICU is installed.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hmde_dist.command import InputError, argument_parser, positive, run_command
from hmde_dist.corpus.sentences import sentence_splitter, splitter_version

FINAL_MARKS = ".!?…。！？｡؟۔।॥։።፧។៕᙮။།"
LOCAL_MARKS = {"el": ";", "hy": ":"}
CLOSERS = "\"'»”’“)]」』》〉）】› \u00a0\u202f"
WITHOUT_SPACES = ("zh", "ja")
ROUNDS = 3
SPEED_BYTES = 20_000_000


class Score(NamedTuple):
    """Of the boundaries inside lines; the end of a line is none."""

    precision: float
    recall: float
    f1: float


def main() -> None:
    parser = argument_parser(__doc__, "python tools/bench_sentences.py --gold build/gold --per-line 50")
    parser.add_argument("--gold", type=Path, required=True, metavar="FOLDER", help="<lang>.txt, one sentence a line")
    parser.add_argument(
        "--per-line", type=positive, default=50, metavar="N", help="sentences joined to one line (%(default)s)"
    )
    args = parser.parse_args()
    gold = read_gold(args.gold)
    splitters = {}
    for name in ("rules", "icu"):
        try:
            splitters[splitter_version(name)] = sentence_splitter(name)
        except ValueError as error:
            print(f"not measured: {error}")
    print_scores(gold, splitters, args.per_line)
    print_speeds(gold, splitters, args.per_line)


def read_gold(folder: Path) -> dict[str, list[str]]:
    """The sentences of every language that end with a final mark."""
    gold = {}
    for path in sorted(folder.glob("*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        marks = FINAL_MARKS + LOCAL_MARKS.get(path.stem, "")
        sentences = [line.strip() for line in lines if line.rstrip(CLOSERS).endswith(tuple(marks))]
        if sentences:
            gold[path.stem] = sentences
    if not gold:
        raise InputError(f"--gold {folder}: holds no <lang>.txt with sentences")
    return gold


def join_lines(sentences: list[str], lang: str, per_line: int) -> list[tuple[str, list[str]]]:
    """Lines of `per_line` sentences, each with its sentences."""
    space = "" if lang.split("-")[0] in WITHOUT_SPACES else " "
    groups = [sentences[start : start + per_line] for start in range(0, len(sentences), per_line)]
    return [(space.join(group), group) for group in groups]


def boundaries(sentences: list[str]) -> set[int]:
    """Where sentences meet, counted in characters that are no white space."""
    ends, count = set(), 0
    for sentence in sentences[:-1]:
        count += len("".join(sentence.split()))
        ends.add(count)
    return ends


def score(sentences: list[str], lang: str, per_line: int, split: Callable[..., list[str]]) -> Score:
    """How well `split` finds the boundaries between `sentences` that were joined to lines."""
    right = found = wanted = 0
    for line, group in join_lines(sentences, lang, per_line):
        gold, guess = boundaries(group), boundaries(split(line, lang))
        right, found, wanted = right + len(gold & guess), found + len(guess), wanted + len(gold)
    precision = right / found if found else float(not wanted)
    recall = right / wanted if wanted else 1.0
    return Score(precision, recall, 2 * precision * recall / (precision + recall) if right else float(not wanted))


def print_scores(gold: dict[str, list[str]], splitters: dict[str, Callable], per_line: int) -> None:
    """A row for each language and the mean over languages."""
    print(f"boundaries, {per_line} sentences a line; precision, recall, F1 in %")
    print("lang  sentences  " + "  ".join(f"{name:^20}" for name in splitters))
    rows = {lang: [score(gold[lang], lang, per_line, split) for split in splitters.values()] for lang in gold}
    for lang, scores in rows.items():
        print_row(lang, len(gold[lang]), scores)
    means = [
        Score(*(sum(of) / len(rows) for of in zip(*column, strict=True))) for column in zip(*rows.values(), strict=True)
    ]
    print_row("mean", sum(map(len, gold.values())), means)


def print_row(head: str, sentences: int, scores: list[Score]) -> None:
    cells = ["  ".join(f"{100 * part:5.1f}" for part in each) for each in scores]
    print(f"{head:<5} {sentences:>9,}  " + "  ".join(f"{cell:^20}" for cell in cells))


def print_speeds(gold: dict[str, list[str]], splitters: dict[str, Callable], per_line: int) -> None:
    """MB/s of one core, the best of rounds in which the splitters take turns."""
    lines = [(line, lang) for lang, sentences in gold.items() for line, _ in join_lines(sentences, lang, per_line)]
    size = sum(len(line.encode()) for line, _ in lines)
    repeats = -(-SPEED_BYTES // size)
    best = dict.fromkeys(splitters, float("inf"))
    for _ in range(ROUNDS):
        for name, split in splitters.items():
            started = time.perf_counter()
            for _ in range(repeats):
                for line, lang in lines:
                    split(line, lang)
            best[name] = min(best[name], time.perf_counter() - started)
    print(f"speed on one core, {repeats * size / 1e6:.1f} MB of UTF-8, best of {ROUNDS}")
    fastest = {name: repeats * size / seconds / 1e6 for name, seconds in best.items()}
    for name, speed in fastest.items():
        print(f"{name}: {speed:.1f} MB/s, {speed / next(iter(fastest.values())):.2f} times the rules")


if __name__ == "__main__":
    run_command(main)
