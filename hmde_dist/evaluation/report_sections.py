"""Reports of `tools/evaluate.py` as sections of the HTML report: what each task's numbers look like.

A part that a report lacks is left out. A task that has no form of its own here is shown as plain tables, so that no
number is hidden.
"""

from collections import Counter
from collections.abc import Iterable

from hmde_dist.evaluation import figures


def evaluation_sections(report: dict, source: str) -> list[dict]:
    """`title`, `text`, `table` and `drawn` of the sections of one report."""
    makers = {
        "retrieval": retrieval_sections,
        "classification": classification_sections,
        "bias": bias_sections,
        "mteb": mteb_sections,
    }
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
    """Systems side by side, the main measure by language, and of the model for every pair."""
    systems = _systems(report, "pairs")
    if not systems:
        return plain_sections(report, source)
    names, collection = list(systems), report.get("collection")
    first = systems[names[0]]
    measures = [name for name in first["macro"] if name != "queries" and isinstance(first["macro"][name], float)]
    main = next((name for name in ("R@1", "MAP") if name in measures), measures[0])
    text = (
        f"{source}: topics of {collection}, ranked against its documents."
        if collection
        else f"{source}: for each document of one language, the documents of another are ranked; right is the one with the "
        "same id."
    )
    rows = [["system", *measures, "queries"]]
    rows += [[name, *(s["macro"].get(m) for m in (*measures, "queries"))] for name, s in systems.items()]
    drawn = [figures.bars(f"{main}, mean over pairs", {row[0]: row[1 + measures.index(main)] for row in rows[1:]})]
    sections = [{"title": "Retrieval", "text": f"{text} Means over all language pairs.", "table": rows, "drawn": drawn}]
    pairs = split_pairs({pair for system in systems.values() for pair in system["pairs"]})
    by_language: dict[str, list[float | None]] = {}
    for language in sorted({language for pair in pairs.values() for language in pair}):
        by_language[language] = []
        for system in systems.values():
            values = [v[main] for name, v in system["pairs"].items() if language in pairs[name] and main in v]
            by_language[language].append(sum(values) / len(values) if values else None)
    text = "Mean over all pairs that the language is part of, as query or as candidate."
    sections.append(_by_language(f"{main} by language", text, main, by_language, names))
    values = {pairs[name]: numbers[main] for name, numbers in first["pairs"].items() if main in numbers}
    if values:
        table = [["query", "candidates", *measures, "queries"]]
        for name in sorted(first["pairs"]):
            table.append([*pairs[name], *(first["pairs"][name].get(m) for m in (*measures, "queries"))])
        sections.append(
            {
                "title": f"{main} of every pair: {names[0]}",
                "text": "In hundredths.",
                "table": table,
                "drawn": [figures.heat_map(f"{main}, %", values, "candidates", "query")],
            }
        )
    return sections


def classification_sections(report: dict, source: str) -> list[dict]:
    """Accuracy of every system in every language; the table also has F1 and the intervals."""
    systems = _systems(report, "languages")
    if not systems:
        return plain_sections(report, source)
    names, trained = list(systems), report.get("train_language", "one language")
    text = f"{source}: {report.get('method', 'a head')}, trained on {trained}, tested on all. Intervals: 95 %."
    rows = [["language", "system", "accuracy", "from", "to", "macro-F1", "from", "to", "documents", "kind"]]
    for name, system in systems.items():
        lines = system["languages"] | {f"mean of {kind}": found for kind, found in system["macro"].items()}
        for language, found in lines.items():
            numbers = []
            for measure in ("accuracy", "macro_f1"):
                numbers += [found.get(measure), *(found.get(f"{measure}_interval") or (None, None))]
            rows.append([language, name, *numbers, found.get("documents"), found.get("kind")])
    languages = {language for system in systems.values() for language in system["languages"]}
    accuracies: dict[str, list[float | None]] = {}
    for language in languages:
        accuracies[language] = [s["languages"].get(language, {}).get("accuracy") for s in systems.values()]
    section = _by_language("Classification", text, f"Accuracy, trained on {trained}", accuracies, names)
    return [section | {"table": rows}]


def bias_sections(report: dict, source: str) -> list[dict]:
    """What vectors favour: places in a document, the query's language, lengths."""
    systems = {name: system for name, system in report.get("systems", {}).items() if isinstance(system, dict)}
    makers = {"position": _position, "language": _language, "length": _length}
    sections = []
    for part, maker in makers.items():
        found = {name: system[part] for name, system in systems.items() if system.get(part)}
        if found and (section := maker(found, source)):
            sections.append(section)
    return sections or plain_sections(report, source)


def _position(systems: dict[str, dict], source: str) -> dict | None:
    """Slopes over the places of a document, by system, and by language for the first one."""
    by_language = {name: system.get("languages", {}) for name, system in systems.items()}
    by_language = {name: found for name, found in by_language.items() if found}
    if not by_language:
        return None
    first = next(iter(by_language.values()))
    places = len(next(iter(first.values()))["cosine_by_place"])
    xs = list(range(1, places + 1))
    means = {}
    for name, found in by_language.items():
        cosines = [language["cosine_by_place"] for language in found.values()]
        means[name] = [sum(column) / len(cosines) for column in zip(*cosines, strict=True)]
    # More lines than there are colours would not be told apart.
    shown = dict(sorted(first.items(), key=lambda item: -abs(item[1]["slope"]))[: figures.COLOURS])
    drawn = [figures.lines("Cosine with a segment, mean over languages", "place", xs, means)]
    title = f"{next(iter(by_language))}, by language" + ("" if len(shown) == len(first) else " (the steepest)")
    drawn.append(figures.lines(title, "place", xs, {name: found["cosine_by_place"] for name, found in shown.items()}))
    slopes = {language: [found.get(language, {}).get("slope") for found in by_language.values()] for language in first}
    drawn.append(figures.dots("Slope: change of the cosine per place", slopes, list(by_language)))
    rows = [["language", "system", *(f"place {x}" for x in xs), "slope", "from", "to", "p", "documents"]]
    for name, found in by_language.items():
        for language, numbers in found.items():
            interval = numbers.get("interval") or (None, None)
            rest = [numbers["slope"], *interval, numbers.get("p"), numbers.get("documents")]
            rows.append([language, name, *numbers["cosine_by_place"], *rest])
        foreign = systems[name].get("foreign", {})
        for pair, numbers in foreign.items():
            interval = numbers.get("interval") or (None, None)
            rest = [numbers["difference"], *interval, numbers.get("p"), numbers.get("documents")]
            rows.append([f"foreign segment {pair}", name, *[None] * places, *rest])
    text = (
        f"{source}: documents of {places} segments of other documents, each segment once at every place; a model that does "
        "not care has no slope. Rows of foreign segments say what the cosine loses where a segment is in another language."
    )
    return {"title": "Position bias", "text": text, "table": rows, "drawn": drawn}


def _language(systems: dict[str, dict], source: str) -> dict:
    """How much the nearest of a pool of all languages are of the query's own."""
    names = list(systems)
    languages = sorted({language for system in systems.values() for language in system.get("languages", {})})
    rows = {
        language: [s.get("languages", {}).get(language, {}).get("same_language") for s in systems.values()]
        for language in languages
    }
    text = (
        f"{source}: share of the query's language among the nearest in a pool of all languages, beyond chance; 0: none, "
        "1: only its own, negative: it is avoided."
    )
    section = _by_language("Language bias", text, "Own language, beyond chance", rows, names)
    macros = {key for system in systems.values() for key in system.get("macro", {})}
    for key in sorted(macros):
        section["table"].append([f"all: {key}", *(system.get("macro", {}).get(key) for system in systems.values())])
    return section


def _length(systems: dict[str, dict], source: str) -> dict:
    """Retrieval by queries that are cut short or buried."""
    names = list(systems)
    stresses = list(dict.fromkeys(stress for system in systems.values() for stress in system))
    rows = {s: [system.get(s, {}).get("macro", {}).get("R@1") for system in systems.values()] for s in stresses}
    text = f"{source}: R@1 of queries that are cut short, or stand before or after other documents in one."
    table = [["query", *names], *([stress, *values] for stress, values in rows.items())]
    return {"title": "Length", "text": text, "table": table, "drawn": [figures.dots("R@1", rows, names)]}


def mteb_sections(report: dict, source: str) -> list[dict]:
    """The score of every task; the table has every subset."""
    tasks = {name: task for name, task in report.get("tasks", {}).items() if "score" in task}
    if not tasks:
        return plain_sections(report, source)
    rows = [["task", "subset", "metric", "score"]]
    for name, task in tasks.items():
        rows.append([name, "mean", task.get("metric"), task["score"]])
        rows += [[name, subset, task.get("metric"), score] for subset, score in task.get("subsets", {}).items()]
    bars = {f"{name}, {task.get('metric')}": task["score"] for name, task in tasks.items()}
    drawn = [figures.bars("Score, mean over subsets", bars)]
    text = f"{source}: mteb {report.get('mteb', '')}. Metrics differ between tasks."
    return [{"title": "MTEB", "text": text, "table": rows, "drawn": drawn}]


def _systems(report: dict, part: str) -> dict[str, dict]:
    """The systems that have what a section is made of."""
    found = report.get("systems", {})
    return {name: system for name, system in found.items() if system.get("macro") and system.get(part)}


def _by_language(title: str, text: str, measure: str, rows: dict[str, list[float | None]], names: list[str]) -> dict:
    """A section of dots: a row for each language, the best of the first system on top."""
    ordered = dict(sorted(rows.items(), key=lambda row: (-(row[1][0] or 0.0), row[0])))
    table = [["language", *names], *([language, *values] for language, values in ordered.items())]
    return {"title": title, "text": text, "table": table, "drawn": [figures.dots(measure, ordered, names)]}


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
