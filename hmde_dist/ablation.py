"""Ablations: cells (a recipe with overrides) times seeds, each trained, evaluated on the same documents and compared.

    OUT/
      evaluation.json                          what every cell is evaluated on
      NAME/seed-0/
        recipe.yaml                            the resolved recipe
        run/                                   the run folder, with its export
        retrieval.json, classification.json    reports of tools/evaluate.py
        log.txt                                what the commands printed
        result.json                            the cell's numbers, written last: what has them is not run again
      table.md, table.json, plot.svg

Every cell must see the same number of document pairs, else it would be told by how much it has seen. Cells run as
commands of their own, so that one that fails or is killed takes no other with it; a training resumes by itself.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from hmde_dist.command import InputError, RunError, output_file, progress
from hmde_dist.evaluation.ablation_table import compare_cells, write_table
from hmde_dist.evaluation.labelled import read_labelled
from hmde_dist.evaluation.run_report import minutes_of, read_journal
from hmde_dist.preflight import check_validation, check_world, open_mixture, open_shards
from hmde_dist.recipe import Recipe, dump_recipe, load_recipe

PACKAGE = Path(__file__).parent
EVALUATE = PACKAGE.parent / "tools" / "evaluate.py"
STEPS = {"cells": True}  # what jobs of a Slurm array share
MEASURES = ("R@1", "MRR@10", "accuracy", "macro-F1")
SPLITS = 3  # of the labelled documents, in every classification
POLL = 2.0  # seconds between looks at the journals
PATIENCE = 90.0  # seconds that ranks of an ablation that was killed have to save and end

_libc = ctypes.CDLL(None)
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


@dataclass(frozen=True)
class Evaluation:
    """What every cell is evaluated on."""

    documents: tuple[Path, ...]
    train_language: str
    label_field: str

    def facts(self) -> dict:
        """As `evaluation.json` has it."""
        return {
            "documents": [[path.name, path.stat().st_size] for path in self.documents],
            "train_language": self.train_language,
            "label_field": self.label_field,
        }

    def check(self) -> None:
        """Refuse, before anything is trained, documents that classification could not use.

        Raises:
            InputError: no such file, no labels, or no second language.
        """
        if missing := [str(path) for path in self.documents if not path.exists()]:
            raise InputError(f"--documents {missing[0]}: no such file of documents")
        data = read_labelled(self.documents, self.label_field)
        for seed in range(SPLITS):
            tested = {data.documents[row].lang for row in data.split(self.train_language, seed).test}
            if tested <= {self.train_language}:
                raise InputError(
                    f"--documents: no labelled test document but in {self.train_language}: nothing to transfer to"
                )


@dataclass(frozen=True)
class Cell:
    """One training: a recipe with a seed of its own, in a folder of its own."""

    name: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def pairs(self) -> int:
        return self.recipe.run.steps * self.recipe.data.pairs_per_batch

    def result(self) -> dict | None:
        """Its numbers, if it is complete."""
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def steps_done(self) -> int:
        """As its journal says."""
        with contextlib.suppress(InputError):
            return max((record.get("step") or 0 for record in read_journal(self.recipe.run.folder)), default=0)
        return 0


def read_cells(texts: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], out: Path) -> list[Cell]:
    """The cells, each with all seeds, seed by seed.

    Args:
        texts: `recipe.yaml`, or `name=recipe.yaml,section.key=value,...`.
        overrides: settings of every cell.

    Raises:
        InputError: bad recipes, a name twice, or cells that would not see the same number of document pairs.
    """
    named: dict[str, tuple[Path, list[str]]] = {}
    for text in texts:
        name, separator, rest = text.partition("=")
        path, *own = re.split(r",(?=\w+\.[\w.]+=)", rest if separator else text)
        name = name if separator else Path(path).stem
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f'"{name}" is no name of a cell: use letters, digits, - and _ (name={path})')
        if name in named:
            raise InputError(f'two cells are called "{name}": write name={path}')
        named[name] = Path(path), own
    if repeated := sorted({seed for seed in seeds if list(seeds).count(seed) > 1}):
        raise InputError(f"--seeds: {repeated[0]} occurs twice")
    cells = []
    for seed in seeds:
        for name, (path, own) in named.items():
            folder = out / name / f"seed-{seed}"
            wanted = [*overrides, *own, f"run.seed={seed}", f"run.folder={json.dumps(str(folder / 'run'))}"]
            try:
                cells.append(Cell(name, seed, load_recipe(path, wanted), folder))
            except InputError as error:
                raise InputError(f"cell {name}: {error}") from None
    if len({cell.pairs for cell in cells}) > 1:
        listed = ", ".join(
            f"{cell.name} {cell.recipe.run.steps:,} x {cell.recipe.data.pairs_per_batch:,} = {cell.pairs:,}"
            for cell in cells[: len(named)]
        )
        raise InputError(
            f"cells see different numbers of document pairs (run.steps x data.pairs_per_batch): {listed}; set them alike"
        )
    return cells


def check_cells(cells: Sequence[Cell], ranks: int) -> None:
    """Refuse, before anything is trained, what no rank could train, and cells that were begun with other settings.

    Raises:
        InputError: shards that cannot be opened, a batch that the ranks do not divide, or another recipe in a cell's folder.
    """
    for cell in cells:
        path, wanted = cell.folder / "recipe.yaml", yaml.safe_load(dump_recipe(cell.recipe))
        if path.is_file() and (was := yaml.safe_load(path.read_text(encoding="utf-8"))) != wanted:
            changed = [
                f"{section}.{name}"
                for section in wanted
                if was.get(section) != wanted[section]
                for name in (wanted[section] if isinstance(wanted[section], dict) else [""])
                if not isinstance(wanted[section], dict) or was[section].get(name) != wanted[section][name]
            ]
            listed = ", ".join(name.rstrip(".") for name in changed)
            raise InputError(f"{cell.folder} was begun with another {listed}: remove the folder, or name another --out")
    for name in {cell.name for cell in cells}:
        cell = next(cell for cell in cells if cell.name == name)
        try:
            check_world(cell.recipe, ranks)
            mixture = open_mixture(cell.recipe)
            if cell.recipe.data.validation:
                check_validation(open_shards(cell.recipe, cell.recipe.data.validation), mixture.indexes[0])
        except InputError as error:
            raise InputError(f"cell {name}: {error}") from None


def begin(cells: Sequence[Cell], evaluation: Evaluation, out: Path) -> None:
    """Write down what was asked for: `evaluation.json` and the recipe of each cell; what is there already stays.

    Raises:
        InputError: cells in `out` were evaluated on something else.
    """
    path, wanted = out / "evaluation.json", evaluation.facts()
    if path.is_file():
        was = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in wanted.items() if was.get(name) != value]:
            raise InputError(f"{out}: its cells were evaluated with other {', '.join(changed)}: name another --out")
    texts = {path: json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"}
    texts |= {cell.folder / "recipe.yaml": dump_recipe(cell.recipe) for cell in cells}
    for path, text in texts.items():
        if not path.is_file():
            with output_file(path) as file:
                file.write(text)


def run_cells(cells: Sequence[Cell], evaluation: Evaluation, ranks: int, parallel: int = 1) -> list[Cell]:
    """Run every cell that is not complete; returns those that failed, each of which was told of on stderr.

    Args:
        ranks: of each training, on this machine.
        parallel: cells at a time; on GPUs each has `ranks` of them for itself.

    Raises:
        InputError: more ranks at a time than GPUs.
    """
    todo = [cell for cell in cells if cell.result() is None]
    parallel = max(1, min(parallel, len(todo)))
    shares = _shares(ranks, parallel)
    failed: list[Cell] = []
    alive: set[subprocess.Popen] = set()

    def run(cell: Cell) -> None:
        share = shares.get()
        try:
            run_cell(cell, evaluation, ranks, share, alive)
        finally:
            shares.put(share)

    total, before = sum(cell.recipe.run.steps for cell in todo), sum(cell.steps_done() for cell in todo)
    with (
        progress(total=total, initial=before, desc="ablation", unit="step", smoothing=0) as bar,
        ThreadPoolExecutor(parallel) as pool,
    ):
        running = {pool.submit(run, cell): cell for cell in todo}
        try:
            while running:
                ended, _ = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in ended:
                    cell = running.pop(future)
                    what = f"{cell.name}, seed {cell.seed}"
                    try:
                        future.result()
                        found = cell.result()
                        numbers = ", ".join(f"{name} {value:.3f}" for name, value in found["scores"].items())
                        bar.write(f"{what}: {numbers}; {found['minutes']} min", file=sys.stderr)
                    except RunError as error:
                        failed.append(cell)
                        bar.write(f"{what}: FAILED: {error}", file=sys.stderr)
                bar.set_postfix_str(f"{len(todo) - len(running)} of {len(todo)} cells", refresh=False)
                bar.update(sum(cell.steps_done() for cell in todo) - bar.n)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(alive):
                process.terminate()
            raise
    return failed


def _shares(ranks: int, parallel: int) -> "queue.SimpleQueue[dict[str, str]]":
    """For each of `parallel` cells at a time, the variables that leave room for the others: its GPUs, or its threads."""
    shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    gpus = torch.cuda.device_count()
    if gpus and ranks * parallel > gpus:
        raise InputError(f"--parallel {parallel} with --ranks {ranks} needs {ranks * parallel} GPUs, there are {gpus}")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = given.split(",") if given else [str(number) for number in range(gpus)]
    for number in range(parallel):
        threads = max(1, len(os.sched_getaffinity(0)) // (ranks * parallel))
        share = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(names[number * ranks : (number + 1) * ranks])
        shares.put(share)
    return shares


def run_cell(cell: Cell, evaluation: Evaluation, ranks: int, share: dict[str, str], alive: set) -> None:
    """Train, export and evaluate one cell, and write its `result.json`.

    Args:
        share: environment variables of its commands.
        alive: where the running command is entered, so that it can be ended.

    Raises:
        RunError: a command failed; says which, and where its output is.
    """
    run, log = cell.recipe.run.folder, cell.folder / "log.txt"
    with open(cell.folder / "lock", "w") as lock:
        _lock(lock, cell.folder)
        if cell.result():
            return  # another ablation made it meanwhile
        for command in commands(cell, evaluation, ranks):
            with open(log, "a", encoding="utf-8") as output:
                output.write(f"\n$ {shlex.join(map(str, command))}\n")
                output.flush()
                begin = output.tell()
                process = subprocess.Popen(
                    list(map(str, command)),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | share,
                    # Of its own session: an interrupt ends it by SIGTERM, on which ranks save. It holds the lock, too.
                    start_new_session=True,
                    pass_fds=[lock.fileno()],
                    preexec_fn=_end_with_parent,
                )
                alive.add(process)
                try:
                    code = process.wait()
                finally:
                    alive.discard(process)
            if code:
                raise RunError(f"{_program(command)} ended with {code}: {_last_words(log, begin)}; see {log}")
        scores = read_scores(cell.folder)
        result = {"cell": cell.name, "seed": cell.seed, "ranks": ranks, "pairs": cell.pairs, "scores": scores}
        with output_file(cell.folder / "result.json") as file:
            json.dump(result | {"minutes": minutes_of(read_journal(run))}, file, indent=1)


def commands(cell: Cell, evaluation: Evaluation, ranks: int) -> Iterator[list]:
    """The commands of a cell, in order. Training leaves its export in the run folder."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks > 1 else []
    yield [sys.executable, *launcher, PACKAGE / "train.py", cell.folder / "recipe.yaml"]
    of = ["--model", cell.recipe.run.folder / "export", "--documents", *evaluation.documents]
    labels = ["--train-lang", evaluation.train_language, "--label-field", evaluation.label_field, "--seeds", SPLITS]
    yield [sys.executable, EVALUATE, "retrieval", *of, "--out", cell.folder / "retrieval.json"]
    yield [sys.executable, EVALUATE, "classification", *of, *labels, "--out", cell.folder / "classification.json"]


def read_scores(folder: Path) -> dict[str, float]:
    """The measures of a cell, from its reports."""
    reports = {
        task: json.loads((folder / f"{task}.json").read_text("utf-8")) for task in ("retrieval", "classification")
    }
    pairs, languages = (report["systems"]["HMDE"]["macro"] for report in reports.values())
    transfer = languages["all other languages"]
    return {
        "R@1": pairs["R@1"],
        "MRR@10": pairs["MRR@10"],
        "accuracy": transfer["accuracy"],
        "macro-F1": transfer["macro_f1"],
    }


def write_report(cells: Sequence[Cell], out: Path) -> str:
    """Write `table.json`, `table.md` and `plot.svg` of the cells that are complete; returns the Markdown.

    Raises:
        InputError: none is.
    """
    values: dict[str, dict[int, dict]] = {}
    missing, minutes = [], {}
    for cell in cells:
        found = cell.result()
        if found is None:
            missing.append([cell.name, cell.seed])
            continue
        values.setdefault(cell.name, {})[cell.seed] = found["scores"]
        minutes.setdefault(cell.name, {})[cell.seed] = found["minutes"]
    if not values:
        raise InputError(f"{out}: no cell is complete yet")
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    facts = {"evaluation": evaluation, "pairs": cells[0].pairs, "minutes": minutes, "missing": missing}
    return write_table(facts, compare_cells(values, MEASURES), MEASURES, out)


def _lock(file, folder: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise RunError(f"{folder}: another process is at work here") from None
            time.sleep(0.5)


def _end_with_parent() -> None:
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _program(command: Sequence) -> str:
    return next(Path(part).name for part in map(str, command) if part.endswith(".py"))


def _last_words(log: Path, begin: int) -> str:
    """The last line of a log that says what went wrong, else its last line; `begin` is where the command's output begins."""
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: *)?([\w.]*[Ee]rror):? ", line)]
    return (errors or lines or ["no output"])[-1][:300]
