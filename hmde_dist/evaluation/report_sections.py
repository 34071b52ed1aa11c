"""Reports of `tools/evaluate.py` as sections of the HTML report: what each task's numbers look like.

A part that a report lacks is left out. A task that has no form of its own here is shown as plain tables, so that no
number is hidden.
"""

from collections import Counter
from collections.abc import Iterable

from hmde_dist.evaluation import figures
from hmde_dist.evaluation.retrieval import METRICS


def evaluation_sections(report: dict, source: str) -> list[dict]:
    """`title`, `text`, `table` and `drawn` of the sections of one report."""
    makers = {"retrieval": retrieval_sections}
    maker = makers.get(report["task"], plain_sections)
    return maker(report, source)


def split_pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The two languages of each pair ("de-en"). Codes contain hyphens themselves ("zh-cn-ru"): of the ways to cut a
    name the one is taken whose halves are halves of the most names."""
    cuts = {}
    for name in names:
        parts = name.split("-")
        cuts[name] = [("-".join(parts[:i]), "-".join(parts[i:])) for i in range(1, len(parts))] or [(name, "")]
    heard = Counter(half for options in cuts.values() for option in options for half in option)
    return {name: max(options, key=lambda o: min(heard[o[0]], heard[o[1]])) for name, options in cuts.items()}


def retrieval_sections(report: dict, source: str) -> list[dict]:
    """Systems side by side, R@1 by language, and the model's R@1 of every pair."""
    systems = {name: system for name, system in report.get("systems", {}).items() if isinstance(system, dict)}
    if not systems:
        return plain_sections(report, source)
    names = list(systems)
    rows = [["system", *METRICS, "queries"]]
    rows += [[n, *(s.get("macro", {}).get(m) for m in (*METRICS, "queries"))] for n, s in systems.items()]
    text = (
        f"{source}: for each document of one language, the documents of another are ranked; right is the one with the "
        "same id. Means over all language pairs."
    )
    drawn = [figures.bars("R@1, mean over pairs", {row[0]: row[1] for row in rows[1:]})]
    sections = [{"title": "Retrieval", "text": text, "table": rows, "drawn": [d for d in drawn if d]}]
    pairs = split_pairs({pair for system in systems.values() for pair in system.get("pairs", {})})
    languages = sorted({language for pair in pairs.values() for language in pair})
    if not pairs:
        return sections
    by_language: dict[str, list[float | None]] = {}
    for language in languages:
        by_language[language] = []
        for system in systems.values():
            values = [v["R@1"] for name, v in system.get("pairs", {}).items() if language in pairs[name] and "R@1" in v]
            by_language[language].append(sum(values) / len(values) if values else None)
    ordered = dict(sorted(by_language.items(), key=lambda item: -(item[1][0] or 0.0)))
    sections.append(
        {
            "title": "R@1 by language",
            "text": "Mean over all pairs that the language is part of, as query or as candidate.",
            "table": [["language", *names], *([language, *values] for language, values in ordered.items())],
            "drawn": [figures.dots("R@1", ordered, names)],
        }
    )
    first = systems[names[0]].get("pairs", {})
    values = {pairs[name]: metrics["R@1"] for name, metrics in first.items() if "R@1" in metrics}
    if values:
        table = [["query", "candidates", *METRICS, "queries"]]
        table += [[*pairs[name], *(first[name].get(m) for m in (*METRICS, "queries"))] for name in sorted(first)]
        sections.append(
            {
                "title": f"R@1 of every pair: {names[0]}",
                "text": "In hundredths.",
                "table": table,
                "drawn": [figures.heat_map("R@1, %", values, "candidates", "query")],
            }
        )
    return sections


def plain_sections(report: dict, source: str) -> list[dict]:
    """Every number of a report, by its path."""
    rows = [["", report["task"]]]

    def walk(tree, path: str) -> None:
        if isinstance(tree, dict):
            for name, value in tree.items():
                walk(value, f"{path} · {name}" if path else str(name))
        elif isinstance(tree, list):
            rows.append([path, ", ".join(map(figures.show, tree))])
        else:
            rows.append([path, tree])

    walk({name: value for name, value in report.items() if name != "task"}, "")
    return [{"title": f"{report['task']}".capitalize(), "text": f"{source}.", "table": rows}]
