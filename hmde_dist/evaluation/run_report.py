"""What a run learned, for people: one list of sections, written as JSON, as Markdown and as one HTML page.

    OUT/
      report.json    every number that the page shows, unrounded
      report.md      the tables, for an issue or a README
      report.html    the page: self-contained, no network, no script; light and dark, narrow and wide

A section is a table and the figures that are drawn from it, so no figure is without its numbers. Sources are the run
folder alone (`journal.jsonl`, `config.yaml`, `env.json`) and reports of `tools/evaluate.py`; whatever of these is missing
leaves its section out, and says so where a reader would look for it.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path

import yaml

from hmde_dist.command import InputError, output_file
from hmde_dist.evaluation import figures
from hmde_dist.evaluation.report_sections import evaluation_sections

POINTS = 200  # of a training curve, at most

# What of a logged step is drawn, in this order: its title, and what it is multiplied with.
CURVES = {
    "loss": ("Loss", 1),
    "accuracy": ("Accuracy in the batch", 1),
    "grad_norm": ("Norm of the gradient", 1),
    "learning_rate": ("Learning rate", 1),
    "scale": ("Scale of the cosine", 1),
    "documents_per_second": ("Documents per second", 1),
    "tokens_per_second": ("Tokens per second", 1),
    "padding_fraction": ("Padding, %", 100),
    "token_imbalance": ("Imbalance of tokens over ranks, %", 100),
    "data_wait_fraction": ("Time waiting for data, %", 100),
    "slowest_over_median": ("Slowest rank's work over the median", 1),
    "mfu": ("Model FLOP utilisation, %", 100),
}
RETRIEVAL = ("R@1", "R@10", "MRR@10", "nDCG@10")


@dataclass
class Section:
    """A heading, a sentence or two, a table (its first row is the head) and the figures drawn from it."""

    title: str
    text: str
    table: Sequence[Sequence]
    drawn: list[str] = field(default_factory=list)
    words: bool = False  # cells are words rather than numbers


def write_report(run: Path, reports: Sequence[Path], out: Path) -> list[Section]:
    """Write the three files of the report on `run` into the folder `out`; returns the sections.

    Args:
        reports: reports of `tools/evaluate.py`.

    Raises:
        InputError: no run folder, or a report that cannot be read.
    """
    run, loaded = Path(run), [(str(path), _read_report(path)) for path in reports]
    records = read_journal(run)
    facts = headline(run, records, [report for _, report in loaded])
    sections = [Section(**parts) for source, report in loaded for parts in evaluation_sections(report, source)]
    sections += [*training_sections(records), *background_sections(run, records)]
    # Of build/demo/run the last name alone says little.
    title = "Run " + "/".join(run.resolve().parts[-2:])
    if not loaded:
        title_note = "No report of tools/evaluate.py was given or found: training curves only."
    else:
        title_note = "Evaluated by " + ", ".join(source for source, _ in loaded) + "."
    texts = {
        "report.json": json.dumps(
            {
                "run": str(run),
                "facts": facts,
                "sections": [{"title": s.title, "text": s.text, "table": _finite(s.table)} for s in sections],
            },
            indent=1,
            ensure_ascii=False,
            allow_nan=False,
        ),
        "report.md": as_markdown(title, title_note, facts, sections),
        "report.html": as_html(title, title_note, facts, sections),
    }
    for name, text in texts.items():
        with output_file(out / name) as file:
            file.write(text + "\n")
    return sections


def find_reports(run: Path) -> list[Path]:
    """Reports of `tools/evaluate.py` in the run folder and beside it, where `make demo` writes them."""
    found = []
    for path in sorted([*run.glob("*.json"), *run.resolve().parent.glob("*report*.json")]):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and "task" in report:
            found.append(path)
    return found


def read_journal(run: Path) -> list[dict]:
    """The records of the journal. A line that a kill cut short is left out.

    Raises:
        InputError: no journal.
    """
    try:
        lines = (run / "journal.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(
            f"{run}: no run folder ({error.strerror}: journal.jsonl); train with hmde_dist/train.py"
        ) from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _read_report(path: Path) -> dict:
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: no report ({error.strerror}); make one with tools/evaluate.py") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); make it anew with tools/evaluate.py") from None
    if not isinstance(report, dict) or "task" not in report:
        raise InputError(f"{path}: no report of tools/evaluate.py")
    return report


def by_step(records: Sequence[dict]) -> list[dict]:
    """One record a step, in order: after a kill steps occur twice, and the later line counts."""
    kept = {record["step"]: record for record in records}
    return [kept[step] for step in sorted(kept)]


def thinned(records: list[dict], names: Sequence[str]) -> list[dict]:
    """At most `POINTS` records: the mean of each of so many runs of neighbours, at the step of the last of them."""
    if len(records) <= POINTS:
        return records
    means = []
    for number in range(POINTS):
        run = records[number * len(records) // POINTS : (number + 1) * len(records) // POINTS]
        mean = {"step": run[-1]["step"]}
        for name in names:
            values = [r[name] for r in run if isinstance(r.get(name), int | float) and math.isfinite(r[name])]
            mean[name] = sum(values) / len(values) if values else None
        means.append(mean)
    return means


def training_sections(records: list[dict]) -> list[Section]:
    """Curves of validation and training."""
    sections = []
    validations = by_step([r for r in records if r.get("event") == "validation"])
    if validations:
        names = [name for name in validations[0] if name not in ("time", "event", "step")]
        steps = [r["step"] for r in validations]
        columns = {name: [r.get(name) for r in validations] for name in names}
        retrieval = {name: columns[name] for name in RETRIEVAL if name in columns}
        drawn = [figures.lines("Retrieval", "step", steps, retrieval)] if retrieval else []
        drawn += [figures.lines(name, "step", steps, {name: columns[name]}) for name in names if name not in retrieval]
        rows = [["step", *names], *([r["step"], *(r.get(name) for name in names)] for r in validations)]
        text = "On validation documents, which training never saw in any language; mean over all language pairs."
        sections.append(Section("Validation while training", text, rows, drawn))
    steps = by_step([r for r in records if "loss" in r])
    ranks = {r["step"]: r for r in records if r.get("event") == "ranks"}
    steps = [{**ranks.get(r["step"], {}), **r} for r in steps]
    if steps:
        names = [name for name in CURVES if name in steps[-1]]
        text = f"{len(steps):,} logged steps"
        if len(steps) > POINTS:
            text += f"; drawn are the means of {POINTS} runs of neighbours"
        steps = thinned(steps, names)
        xs = [r["step"] for r in steps]
        drawn = []
        for name in names:
            title, factor = CURVES[name]
            values = [None if r.get(name) is None else factor * r[name] for r in steps]
            drawn.append(figures.lines(title, "step", xs, {name: values}))
        rows = [["step", *names], *([r["step"], *(r.get(name) for name in names)] for r in steps)]
        sections.append(Section("Training", text + ". All ranks together.", rows, drawn))
    return sections


def background_sections(run: Path, records: list[dict]) -> list[Section]:
    """What happened to the run, its settings, its machine."""
    sections = []
    events = Counter(r["event"] for r in records if r.get("event", "ranks") != "ranks")
    if events:
        last = {r["event"]: r.get("step") for r in records if "event" in r}
        rows = [["event", "times", "last at step"], *([name, times, last[name]] for name, times in events.items())]
        sections.append(Section("Events", "As the journal has them.", rows))
    settings = _flat(_tree(run / "config.yaml"))
    if settings:
        sections.append(Section("Settings", "config.yaml.", [["setting", "value"], *settings], words=True))
    machine = _flat(_tree(run / "env.json"))
    if machine:
        sections.append(Section("Machine", "env.json, of the last start.", [["", ""], *machine], words=True))
    return sections


def headline(run: Path, records: list[dict], reports: Sequence[dict]) -> dict[str, object]:
    """The numbers that a reader wants first, by name."""
    facts: dict[str, object] = {}
    steps = by_step([r for r in records if "loss" in r])
    if steps:
        wanted = (_tree(run / "config.yaml").get("run") or {}).get("steps")
        facts |= {"steps" if wanted in (None, steps[-1]["step"]) else f"of {wanted:,} steps": steps[-1]["step"]}
        facts |= {name: steps[-1][name] for name in ("documents", "tokens") if name in steps[-1]}
        facts["loss at the end"] = float(steps[-1]["loss"])
        rates = [r["documents_per_second"] for r in steps if "documents_per_second" in r]
        if rates:
            facts["documents per second, median"] = round(sorted(rates)[len(rates) // 2])
    for report in reports:
        if report["task"] == "retrieval" and report.get("systems"):
            first = next(iter(report["systems"].values()))
            facts["R@1 on test documents"] = first.get("macro", {}).get("R@1")
    if minutes := minutes_of(records):
        facts["minutes"] = minutes
    return {name: value for name, value in facts.items() if value is not None and math.isfinite(value)}


def minutes_of(records: Sequence[dict]) -> float | None:
    """Minutes from each start to the last record before the next one, together."""
    total, began, last = 0.0, None, None
    for record in records:
        try:
            time = datetime.fromisoformat(record["time"])
        except (KeyError, TypeError, ValueError):
            continue
        if record.get("event") == "start":
            total += (last - began).total_seconds() if began else 0.0
            began = time
        last = time
    if began is None:
        return None
    return round((total + (last - began).total_seconds()) / 60, 1)


def as_markdown(title: str, note: str, facts: dict, sections: Sequence[Section]) -> str:
    parts = [f"# {title}", note, markdown_table([list(facts), list(facts.values())])] if facts else [f"# {title}", note]
    for section in sections:
        parts += [f"## {section.title}", section.text, markdown_table(section.table)]
    return "\n\n".join(part for part in parts if part)


def markdown_table(rows: Sequence[Sequence]) -> str:
    """A table whose first row is its head."""
    head, *body = [[figures.show(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def as_html(title: str, note: str, facts: dict, sections: Sequence[Section]) -> str:
    tiles = "".join(f"<div><b>{escape(figures.show(v))}</b><span>{escape(k)}</span></div>" for k, v in facts.items())
    parts = []
    for section in sections:
        rows = figures.table(section.table, section.words)
        drawn = "".join(section.drawn)
        parts.append(
            f"<section{' class=wide' if len(section.drawn) > 1 else ''}><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>"
            + (f'<div class="figures">{drawn}</div>' if drawn else "")
            + f"<details{'' if drawn or section.words else ' open'}><summary>The numbers</summary>{rows}</details></section>"
        )
    # An empty icon: a browser would ask for one otherwise.
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{figures.STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p>{escape(note)}</p><div class="tiles">{tiles}</div><main>{"".join(parts)}</main></body></html>'
    )


def _tree(path: Path) -> dict:
    """The settings in a YAML or JSON file; nothing where there is none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _flat(tree: dict, prefix: str = "") -> list[list[str]]:
    rows = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append([f"{prefix}{name}", json.dumps(value, ensure_ascii=False) if value is not None else "none"])
    return rows


def _finite(rows: Sequence[Sequence]) -> list[list]:
    """Cells as JSON takes them."""
    return [[None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in rows]
