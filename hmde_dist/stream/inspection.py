"""What is in a shard set, as numbers, as a picture and as text: languages, their pairs, lengths, categories, one group.

Every number comes from the memory-mapped columns of the index, without opening a shard and without a Python loop over
groups or documents, so that 20 million groups take some ten seconds. Only groups shown as text are read from the shards.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from hmde_dist.command import InputError, output_file, progress
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader

CHUNK = 1 << 18  # groups counted at one time
BINS = 8  # of a length histogram, per doubling of the length
PLOTTED_LANGUAGES = 12
QUANTILES = {"min": 0, "10%": 10, "median": 50, "90%": 90, "max": 100}
NO_CATEGORY = 0  # position in the manifest's `clusters`

# Twelve colours that stay apart on white, and the one of everything else.
_COLOURS = "#3366cc #dc3912 #109618 #ff9900 #990099 #0099c6 #dd4477 #66aa00 #8b5a2b #316395 #aaaa11 #22aa99".split()
_OTHER = "#999999"


def inspect(index: ShardIndex) -> dict:
    """The report: counts, and by language, pair of languages and category what `by_language`, ... return."""
    manifest = index.manifest
    counts = ("groups", "documents", "sentences", "tokens", "sentence_tokens", "vocabulary", "long_sentences_cut")
    held = np.bincount(np.diff(index.columns["group_documents"]))
    return {
        "container": manifest["container"],
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "hash": index.hash,
        **{name: manifest[name] for name in counts},
        "dropped": manifest["dropped"],
        "groups_by_number_of_languages": {str(n): int(held[n]) for n in np.flatnonzero(held)},
        "languages": by_language(index),
        "pairs": by_pair(index),
        "categories": by_category(index),
    }


def by_language(index: ShardIndex) -> dict[str, dict]:
    """Documents (which are also groups), sentences and tokens of each language, and how long its documents are.

    Returns:
        by language `documents`, `sentences`, `tokens`, `tokens_per_sentence` (mean), and `document_sentences` and
        `document_tokens`: the `QUANTILES` and `histogram`, whose position k counts lengths in 2 ** [k, k + 1) / BINS.
    """
    report = {}
    for number, language in enumerate(index.languages):
        mine = index.columns["document_language"] == number
        if not mine.any():
            continue  # the language had documents, but none with a token
        sentences, tokens = (index.columns[name][mine] for name in ("document_sentences", "document_tokens"))
        report[language] = {
            "documents": len(tokens),
            "sentences": int(sentences.sum(dtype=np.int64)),
            "tokens": int(tokens.sum(dtype=np.int64)),
            "tokens_per_sentence": float(tokens.sum(dtype=np.int64) / sentences.sum(dtype=np.int64)),
            "document_sentences": _lengths(sentences),
            "document_tokens": _lengths(tokens),
        }
    return report


def _lengths(values: np.ndarray) -> dict:
    quantiles = np.percentile(values, list(QUANTILES.values()))
    histogram = np.bincount((BINS * np.log2(values)).astype(np.int64))
    return dict(zip(QUANTILES, quantiles.tolist(), strict=True)) | {"histogram": histogram.tolist()}


def by_pair(index: ShardIndex) -> list[dict]:
    """Each pair of languages that some group holds: `languages`, `groups` that hold both, `tokens` of their two documents.

    Ordered by groups, the most first.
    """
    columns, width = index.columns, len(index.languages)
    groups, tokens = np.zeros((2, width, width), dtype=np.int64)
    for first in range(0, index.groups, CHUNK):
        starts = np.asarray(columns["group_documents"][first : first + CHUNK + 1], dtype=np.int64)
        here = slice(starts[0], starts[-1])
        languages, starts = columns["document_language"][here].astype(np.int32), starts - starts[0]
        shape = (len(starts) - 1, width)
        # Sparse, for a group has a few of perhaps 300 languages: [groups, languages], whether it has it, and tokens.
        has = csr_array((np.ones(len(languages), dtype=np.int64), languages, starts), shape)
        counts = csr_array((columns["document_tokens"][here].astype(np.int64), languages, starts), shape)
        groups += (has.T @ has).toarray()
        tokens += (counts.T @ has).toarray()  # [i, j]: tokens in i of the groups that also have j
    pairs = [
        {
            "languages": [index.languages[i], index.languages[j]],
            "groups": int(groups[i, j]),
            "tokens": int(tokens[i, j] + tokens[j, i]),
        }
        for i, j in np.argwhere(np.triu(groups, 1))
    ]
    return sorted(pairs, key=lambda pair: (-pair["groups"], pair["languages"]))


def by_category(index: ShardIndex) -> dict:
    """How many categories there are and how large, in groups.

    Returns:
        `count`; `groups_without` and `share_without` one; `quantiles` of the sizes; the five `largest`; and the sizes
        by rank, thinned to `ranks` that lie evenly on a log axis.
    """
    names = index.manifest["clusters"]
    sizes = np.bincount(index.columns["group_cluster"], minlength=len(names))
    without, sizes[NO_CATEGORY] = int(sizes[NO_CATEGORY]), 0
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    by_rank = sizes[order]
    ranks = np.unique(np.geomspace(1, max(1, len(order)), 200).round().astype(np.int64))[: len(order)]
    quantiles = np.percentile(by_rank, list(QUANTILES.values())).tolist() if len(order) else []
    return {
        "count": len(order),
        "groups_without": without,
        "share_without": without / index.groups,
        "quantiles": dict(zip(QUANTILES, quantiles, strict=False)),
        "largest": [{"name": names[number], "groups": int(sizes[number])} for number in order[:5]],
        "ranks": ranks.tolist(),
        "sizes_at_ranks": by_rank[ranks - 1].tolist(),
    }


def find_group(index: ShardIndex, id_: str) -> int:
    """The number of the group with that id. Ids are in the samples only, so they are read one by one until it is found.

    Raises:
        InputError: no group has that id.
    """
    reader = GroupReader(index)
    for group in progress(range(index.groups), desc=f"look for {id_}", unit="group"):
        if reader[group].id == id_:
            return group
    raise InputError(f'{index.folder}: none of its {index.groups} groups has the id "{id_}"')


def read_groups(index: ShardIndex, tokenizer, groups: Sequence[int], sentences: int) -> list[dict]:
    """Groups as text: `id`, `category`, and per document `language`, `sentences`, `tokens` and the `first` sentences.

    Args:
        tokenizer: the one of the shard set.
        groups: their numbers.
        sentences: most sentences of a document that are decoded.
    """
    reader, names, report = GroupReader(index), index.manifest["clusters"], []
    for group in groups:
        sample, documents = reader[group], []
        for number, language in enumerate(sample.languages):
            tokens, lengths = sample.document(number)
            pieces = np.split(tokens, np.cumsum(lengths))[: min(sentences, len(lengths))]
            first = [{"tokens": len(piece), "text": tokenizer.decode(piece.tolist())} for piece in pieces]
            documents.append({"language": language, "sentences": len(lengths), "tokens": len(tokens), "first": first})
        category = names[index.columns["group_cluster"][group]]
        report.append({"id": sample.id, "category": category, "documents": documents})
    return report


def plot(report: dict, path: str | Path) -> None:
    """Draw what `inspect` reported as a PNG: lengths of documents, sizes of languages, sizes of categories."""
    from matplotlib.figure import Figure  # heavy: only where a picture is asked for

    series = _plotted(report["languages"])
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15, wspace=0.04, hspace=0.04)
    figure.suptitle(
        f"{report['groups']:,} groups, {report['documents']:,} documents, {report['tokens']:,} tokens "
        f"in {len(report['languages'])} languages",
        fontsize=15,
    )
    axes = figure.subplots(2, 2)
    for ax, column, what in (
        (axes[0, 0], "document_tokens", "tokens"),
        (axes[0, 1], "document_sentences", "sentences"),
    ):
        _plot_lengths(ax, series, column)
        ax.set(title=f"Length of documents in {what}", xlabel=f"{what} per document")
        ax.set_ylabel("share of the language's documents")
    axes[0, 0].legend(frameon=False, ncols=2 if len(series) > 6 else 1, fontsize=9)
    _plot_languages(axes[1, 0], series)
    _plot_categories(axes[1, 1], report["categories"])
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set(fontsize=12, fontweight="bold")
        ax.set_axisbelow(True)
    with output_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _plotted(languages: dict[str, dict]) -> list[tuple[str, str, dict]]:
    """(name, colour, numbers) of the largest languages, and of all others together."""
    ordered = sorted(languages.items(), key=lambda item: -item[1]["documents"])
    series = [(name, colour, facts) for (name, facts), colour in zip(ordered, _COLOURS, strict=False)]
    if rest := [facts for _, facts in ordered[PLOTTED_LANGUAGES:]]:
        other: dict = {name: sum(facts[name] for facts in rest) for name in ("documents", "tokens")}
        for column in ("document_tokens", "document_sentences"):
            histograms = [facts[column]["histogram"] for facts in rest]
            summed = np.zeros(max(map(len, histograms)), dtype=np.int64)
            for histogram in histograms:
                summed[: len(histogram)] += histogram
            other[column] = {"histogram": summed.tolist()}
        series.append((f"{len(rest)} others", _OTHER, other))
    return series


def _plot_lengths(ax, series: list[tuple[str, str, dict]], column: str) -> None:
    """A density over log2 of the length for each language, smoothed by a normal kernel of Silverman's width."""
    grid = np.linspace(-1, max(len(facts[column]["histogram"]) for _, _, facts in series) / BINS + 1, 1000)
    densities = []
    for _, _, facts in series:
        histogram = np.asarray(facts[column]["histogram"])
        bins = np.flatnonzero(histogram)
        share = histogram[bins] / histogram.sum()
        # Lengths are whole numbers: a bin stands for those in it, from half a one before to half a one behind them.
        low, high = np.ceil(2 ** (bins / BINS)) - 0.5, np.ceil(2 ** ((bins + 1) / BINS)) - 0.5
        at = np.log2(low * high) / 2
        deviation = np.sqrt(share @ (at - share @ at) ** 2)
        width = np.maximum(max(0.2, 1.06 * deviation * histogram.sum() ** -0.2), np.log2(high / low))
        densities.append(np.exp(-0.5 * ((grid[:, None] - at) / width) ** 2) @ (share / width))
    for (name, colour, _), density in zip(series, densities, strict=True):
        ax.plot(2**grid, density, color=colour, linewidth=1.8, label=name)
        ax.fill_between(2**grid, density, color=colour, alpha=0.4 / len(series), linewidth=0)
    seen = grid[np.max(densities, axis=0) > 0.005 * np.max(densities)]
    ax.set_xscale("log")
    ax.set_xlim(2 ** seen[0], 2 ** seen[-1])
    _log_ticks(ax.xaxis)
    ax.set_ylim(bottom=0)
    ax.set_yticks([])  # a density has no number that says anything
    ax.grid(axis="x", alpha=0.25)


def _plot_languages(ax, series: list[tuple[str, str, dict]]) -> None:
    names, colours, facts = zip(*series, strict=True)
    bars = ax.barh(names, [numbers["documents"] for numbers in facts], color=colours, height=0.72)
    labels = [f"{short(numbers['documents'])}   {short(numbers['tokens'])} tokens" for numbers in facts]
    ax.bar_label(bars, labels, padding=5, fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.3)
    ax.xaxis.set_major_formatter(lambda value, _: short(value))
    ax.set(title="Documents and tokens by language", xlabel="documents")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.25)


def _plot_categories(ax, categories: dict) -> None:
    without = f"{categories['share_without']:.1%} of groups in none"
    ax.set(title=f"{categories['count']:,} categories, {without}", xlabel="rank of the category", ylabel="groups in it")
    if categories["count"]:
        ranks, sizes = categories["ranks"], categories["sizes_at_ranks"]
        ax.loglog(ranks, sizes, color=_COLOURS[0], linewidth=1.8, marker="o" if len(ranks) < 50 else "", markersize=4)
        ax.set(xlim=(0.9, ranks[-1] * 1.2 + 1), ylim=(0.9, sizes[0] * 1.3 + 1))
        for axis in (ax.xaxis, ax.yaxis):
            _log_ticks(axis)
        ax.grid(alpha=0.25)


def _log_ticks(axis) -> None:
    """Ticks at 1, 2, 5, 10, ... or, over many decades, at powers of ten, written as counts."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,)))
    axis.set_major_formatter(lambda value, _: short(value))
    axis.set_minor_formatter(NullFormatter())


def short(number: float) -> str:
    """A count in few characters: 9999, 12.3k, 4.56M."""
    for unit in ("", "k", "M", "G", "T"):
        if number < (999.5 if unit else 9999.5) or unit == "T":
            break
        number /= 1000
    return f"{number:.0f}{unit}" if not unit or number >= 100 else f"{number:.3g}{unit}"
