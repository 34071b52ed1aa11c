"""How fast does the way from Wikipedia's dumps to shards go? Writes dumps of any size, and measures the commands on them.

`generate` writes the dumps of made-up Wikipedias (`made_up_wikipedias` says what is in them).

`run` measures the commands of the project on such dumps, or real ones.
"""

import contextlib
import gzip
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from hmde_dist.benchmark import machine, markdown
from hmde_dist.command import (
    FAILED,
    InputError,
    argument_parser,
    output_file,
    output_folder,
    positive,
    progress,
    run_command,
)
from hmde_dist.corpus.cirrus import find_dumps, language_of
from made_up_wikipedias.content import content_folder, write_content
from made_up_wikipedias.languages import LANGUAGES
from made_up_wikipedias.tables import TABLES, tables_folder, write_table
from made_up_wikipedias.task import Task
from made_up_wikipedias.words import words_of
from made_up_wikipedias.world import Kind, World

TOOLS = Path(__file__).resolve().parent
PART_PAGES = 5000

# --- generate

_WORLD: list[World] = []  # set before processes are forked


def _write(task: Task) -> tuple[str, Counter]:
    return task.language, (write_table if task.table else write_content)(_WORLD[0], task)


def generate(out: Path, pages: int, languages: Sequence[str], seed: int) -> None:
    unknown = sorted(set(languages) - set(LANGUAGES))
    if unknown or not 1 < len(languages) == len(set(languages)):
        raise InputError(f"--languages needs two or more of {', '.join(LANGUAGES)}, each once")
    if seed < 0:
        raise InputError(f"--seed is {seed}; it must not be negative")
    world = World(seed, pages, languages)
    _WORLD[:] = [world]
    for language in languages:
        words_of(language)
    present = world.exists(np.arange(min(world.items, 20_000))).mean(axis=0) * world.items
    start = time.perf_counter()
    counts: dict[str, Counter] = {language: Counter() for language in (*languages, "")}
    with output_folder(out) as folder:
        tasks = [Task(folder, "", "wb_items_per_site")]
        tasks += [Task(folder, language, table) for table in TABLES for language in languages]
        tables_folder(folder, "wikidatawiki").mkdir(parents=True)
        for language, expected in zip(languages, present.tolist(), strict=True):
            tables_folder(folder, f"{language}wiki").mkdir(parents=True)
            base = content_folder(folder, language)
            base.mkdir(parents=True)
            (base / "_SUCCESS").touch()
            parts = max(2, round(expected / PART_PAGES))
            tasks += [Task(folder, language, "", part, parts) for part in range(parts)]
        processes = multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)))
        with progress(total=pages, desc="generate", unit="page") as bar, processes as pool:
            for language, found in pool.imap_unordered(_write, tasks):
                counts[language] += found
                bar.update(found["pages"])
    seconds = time.perf_counter() - start
    rows = [("wiki", "pages", "characters", "text", "wikitext", "bytes a page", "bz2", "ratio")]
    for language in languages:
        c = counts[language]
        rows.append((
            f"{language}wiki", f"{c['pages']:,}", f"{c['characters'] / max(1, c['pages with text']):,.0f}",
            f"{c['text bytes'] / c['bytes']:.1%}", f"{c['source bytes'] / c['bytes']:.1%}",
            f"{c['bytes'] / c['pages']:,.0f}", f"{c['compressed bytes'] / c['pages']:,.0f}", f"{c['bytes'] / c['compressed bytes']:.1f}",
        ))  # fmt: skip
    print(markdown(rows))
    total = sum(counts.values(), Counter())
    print("\nkinds: " + "  ".join(f"{kind.name.lower()} {total[kind.name.lower()]:,}" for kind in Kind if 0 < kind < Kind.CATEGORY))  # fmt: skip
    print(
        f"{total['pages']:,} pages: {total['compressed bytes'] / 1e6:,.1f} MB of content, {total['sql bytes'] / 1e6:,.1f} MB of "
        f"SQL dumps; {seconds:.1f} s, {total['pages'] / seconds:,.0f} pages/s; written to {out}"
    )


# --- run

SAMPLE_DOCUMENTS = 10_000
VOCABULARY = 24_000
WIKIPEDIA_PAGES = 70_100_000
ENWIKI_BYTES = 39e9
SOURCES = """\
70.1 million pages are the sitelinks of Wikidata to the Wikipedias of the 50 largest languages (wb_items_per_site), and
39 GB the 64 content files of enwiki: both as others report them of the dumps of autumn 2026."""
_STEP = re.compile(r"^step \S+: .*", re.MULTILINE)


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        cpu: seconds of all its processes.
        peak: bytes of memory of all its processes together, sampled; pages that they share count once.
        units, read: pages or documents, and compressed bytes, that it was given.
        workers: processes it was told to use, 0 if it cannot be told.
    """

    name: str
    wall: float
    cpu: float
    peak: int
    units: int
    read: int
    workers: int
    steps: list[str]


def measure(name: str, command: Sequence[str | Path], log: Path) -> tuple[float, float, int]:
    """Run a command, its output into `log`; returns (wall seconds, CPU seconds, peak memory).

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    print(f"{name}: {' '.join(map(str, command))}", file=sys.stderr)
    peak = 0
    start = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT)
        while True:
            # CPU time of a tree is known to the system when its processes have ended, however short they lived.
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            peak = max(peak, _tree_memory(process.pid))
            time.sleep(0.2)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [str(part) for part in command])
    return wall, usage.ru_utime + usage.ru_stime, peak


def _tree_memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            # A process may end between two lines, and that of another user hides its page tables.
            with contextlib.suppress(psutil.NoSuchProcess):
                try:
                    total += process.memory_full_info().pss
                except psutil.AccessDenied:
                    total += process.memory_info().rss
    return total


def _takes_workers(*command: str) -> bool:
    told = subprocess.run([sys.executable, TOOLS / command[0], *command[1:], "--help"], capture_output=True, text=True)
    return "--workers" in told.stdout


def run(dumps: Path, languages: Sequence[str], out: Path, workers: int) -> int:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: remove it or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    inputs = _dump_files(dumps, languages)
    documents, tokenizer = out / "documents", out / "tokenizer"
    stages: list[Measured] = []

    def stage(tool: str, arguments: list, count: Callable[[], int], files: Sequence[Path], source: str = "") -> None:
        told = workers if _takes_workers(tool, *[source] * bool(source)) else 0
        command = [TOOLS / tool, *[source] * bool(source), *arguments, *(["--workers", str(told)] if told else [])]
        log = out / f"{Path(tool).stem}.log"
        wall, cpu, peak = measure(Path(tool).stem, command, log)
        steps = _STEP.findall(log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n"))
        read = sum(path.stat().st_size for path in files)
        stages.append(Measured(Path(tool).stem, wall, cpu, peak, count(), read, told, steps))

    def pages() -> int:
        report = json.loads((documents / "report.json").read_text(encoding="utf-8"))
        return sum(counts["pages"] for counts in report["filters"].values())

    try:
        asked = ["--dumps", dumps, "--languages", ",".join(languages), "--out", documents]
        stage("build_documents.py", asked, pages, inputs, "wikipedia")
        train, sample = documents / "train.jsonl.gz", out / "sample.jsonl.gz"
        kept, sampled, text_bytes = _count_and_sample(train, sample)
        asked = ["--documents", sample, "--vocabulary", str(VOCABULARY), "--out", tokenizer]
        stage("train_tokenizer.py", asked, lambda: sampled, [sample])
        asked = ["--documents", train, "--tokenizer", tokenizer, "--out", out / "shards", "--format", "mds"]
        stage("build_shards.py", asked, lambda: kept, [train])
    except subprocess.CalledProcessError as error:
        log = out / f"{Path(error.cmd[0]).stem}.log"
        print(
            f"{log.read_text(encoding='utf-8', errors='replace')}\n{log.stem} ended with exit code {error.returncode}"
        )
        return FAILED
    shards = sum(path.stat().st_size for path in (out / "shards").rglob("*") if path.is_file())
    closing = f"{kept:,} training documents with {text_bytes / 1e6:,.1f} MB of text; {shards / 1e6:,.1f} MB of shards"
    text = report_text(stages, sum(path.stat().st_size for path in inputs if "_content-" in path.name), closing)
    with output_file(out / "report.md") as file:
        file.write(text + "\n")
    print(text)
    return 0


def _dump_files(folder: Path, languages: Sequence[str]) -> list[Path]:
    dumps = find_dumps(folder)
    files = list(dumps.sql.get("wikidatawiki", {}).values())
    for wiki, parts in dumps.wikis.items():
        with contextlib.suppress(InputError):
            if language_of(wiki) in languages:
                files += [*parts, *dumps.sql.get(wiki, {}).values()]
    return files


def _count_and_sample(train: Path, sample: Path) -> tuple[int, int, int]:
    """(documents, documents of the sample, bytes of text) of `train`; writes its first documents to `sample`.

    The documents of a bucket are in no order of topic, so the first are as good as any.
    """
    documents = sampled = text_bytes = 0
    with gzip.open(train, "rb") as lines, gzip.open(sample, "wb", 6) as out:
        for line in progress(lines, desc="count", unit="document"):
            record = json.loads(line)
            documents += 1
            text_bytes += len("".join(record.get("sentences", [])).encode()) + len(record.get("text", "").encode())
            if sampled < SAMPLE_DOCUMENTS:
                sampled += 1
                out.write(line)
    return documents, sampled, text_bytes


def report_text(stages: Sequence[Measured], content: int, closing: str) -> str:
    """What is printed; `content` are the bytes of the dumps without SQL."""
    rows = [("command", "wall s", "CPU s", "pages/s", "MB/s read", "peak MiB", "processes")]
    for s in stages:
        rows.append((
            s.name, f"{s.wall:,.1f}", f"{s.cpu:,.1f}", f"{s.units / s.wall:,.0f}", f"{s.read / s.wall / 1e6:.2f}",
            f"{s.peak / 2**20:,.0f}", str(s.workers or 1),
        ))  # fmt: skip
    build, _, shards = stages
    factor = WIKIPEDIA_PAGES / build.units
    cores = (2, 64, 512)
    whole = [("all of Wikipedia", "CPU hours", "core hours", *(f"wall h on {n}" for n in cores))]
    for s, name, times in (
        (build, build.name, factor),
        (shards, shards.name, factor),
        (build, "build_documents of enwiki, by bytes", ENWIKI_BYTES / content),
    ):
        hours = s.wall * times / 3600
        # Cores that wait are paid for; a command of one process gains nothing by more.
        spread = [hours * s.workers / n if s.workers else hours for n in cores]
        whole.append((
            name, f"{s.cpu * times / 3600:,.0f}", f"{hours * (s.workers or 1):,.0f}", *(f"{value:,.2f}" for value in spread),
        ))  # fmt: skip
    lines = [f"{s.name}: {line}" for s in stages for line in s.steps]
    return "\n".join([
        markdown(rows),
        "",
        f"{machine()}.",
        f"{build.units:,} pages, {build.read / 1e6:,.1f} MB of dumps; {closing}.",
        f"Of train_tokenizer ({VOCABULARY:,} pieces) and build_shards, a page is a document. MB are of compressed files.",
        "",
        *lines,
        *[""] * bool(lines),
        markdown(whole),
        "",
        SOURCES,
        "Time is taken to grow with pages (in the last row with bytes) and, where a command has processes, to fall with",
        "cores, one process on each. The time of train_tokenizer is that of its sample, whatever the size of the corpus.",
    ])  # fmt: skip


def main() -> int | None:
    parser = argument_parser(
        __doc__.partition("\n")[0],
        "python tools/bench_corpus.py generate --pages 300000 --languages en,de,fr,ru,hi,ja --out build/dumps\n"
        "  python tools/bench_corpus.py run --dumps build/dumps --languages en,de,fr,ru,hi,ja --out build/bench",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("generate", help="write the dumps of made-up Wikipedias")
    making.add_argument("--pages", type=positive, required=True, help="of all wikis together, about")
    making.add_argument("--seed", type=int, default=0, help="another seed, other dumps (%(default)s)")
    running = actions.add_parser("run", help="measure the commands from dumps to shards")
    running.add_argument("--dumps", type=Path, required=True, metavar="DIR", help="generated ones, or real ones")
    running.add_argument("--workers", type=positive, default=2, help="processes of a command (%(default)s)")
    for action in (making, running):
        action.add_argument("--languages", required=True, help="comma-separated, such as en,de,ja")
        action.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    if args.action == "generate":
        return generate(args.out, args.pages, args.languages.split(","), args.seed)
    return run(args.dumps, args.languages.split(","), args.out, args.workers)


if __name__ == "__main__":
    run_command(main)
