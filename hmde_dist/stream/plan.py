"""The plan: which documents meet in which global batch, as a pure function of index, recipe, seed and epoch.

Ranks, nodes and workers do not enter, so a change of any of them changes who encodes a document and never which
documents meet. The state of the stream is one integer, the step.

Every group occurs at most once in an epoch of its part and contributes one pair of documents in two languages (or
several, `pairs_per_group`). A share
of each batch is made of category neighbours, runs of `neighbour_group` groups of one category drawn anew each epoch:
they serve as each other's hard negatives, and nothing is encoded twice for it. `stream.mixture` puts parts together.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import NO_CLUSTER
from hmde_dist.stream import draws
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.sliding_windows import SlidingWindows

PLAN_VERSION = 2


@dataclass(frozen=True)
class PlanSettings:
    """How global batches are made.

    Attributes:
        pairs: P, pairs of one global batch.
        neighbours: share of a batch (0 to 1) made of category neighbours.
        neighbour_group: groups of one category that are placed together.
        temperature: languages of a pair are drawn with probability ~ count ** temperature; 1 follows the data,
            0 treats all languages alike (HMDE's own sampler uses 0.3 over language pairs).
        sentences: segments that are encoded of a document, at most.
        window: "first": these are its first ones; "random": a document that has more gives a run of them from anywhere.
        seed: of everything random here.
        pairs_per_group: pairs of one batch that a group contributes, of different documents as far as it has them.
        windows: how a document is cut into segments; none = they are its sentences.
    """

    pairs: int
    neighbours: float
    neighbour_group: int
    temperature: float
    sentences: int
    window: str
    seed: int
    windows: SlidingWindows | None = None
    pairs_per_group: int = 1

    @property
    def groups(self) -> int:
        """Groups of a batch."""
        return self.pairs // self.pairs_per_group

    @property
    def neighbour_groups(self) -> int:
        """Groups of a batch that are category neighbours, where there are enough.

        Whole runs only, so the share is met as nearly as runs of this size allow. A share above zero is at least one.
        """
        runs = max(round(self.neighbours * self.groups / self.neighbour_group), self.neighbours > 0)
        return int(min(self.groups // self.neighbour_group, runs)) * self.neighbour_group


@dataclass(frozen=True)
class GlobalBatch:
    """One global batch of P pairs, all from one shard set."""

    source: int  # number of the shard set
    epoch: int
    groups: np.ndarray  # [P] group numbers, all different but for the pairs of one group
    documents: np.ndarray  # [P, 2] positions of the two documents inside their group
    starts: np.ndarray  # [P, 2] first segment that is encoded of each document
    imbalance: float = 0.0  # of a rank's part: the most tokens of any rank over the mean, minus 1

    def of_rank(self, rank: int, world: int, tokens: np.ndarray) -> "GlobalBatch":
        """The P / world pairs of one rank, chosen so that ranks get about the same number of tokens.

        Args:
            tokens: [P] tokens of each pair.
        """
        # Longest first, each to the rank with the fewest tokens that has a place left (Graham's LPT rule).
        places = len(tokens) // world
        loads, mine, most = [(0, 0, number) for number in range(world)], [], 0
        for pair in np.argsort(-tokens, kind="stable").tolist():
            load, count, number = heapq.heappop(loads)
            load += int(tokens[pair])
            most = max(most, load)
            if number == rank:
                mine.append(pair)
            if count + 1 < places:
                heapq.heappush(loads, (load, count + 1, number))
        chosen = np.sort(np.array(mine))
        imbalance = most * world / max(1, int(tokens.sum())) - 1
        return GlobalBatch(
            self.source, self.epoch, self.groups[chosen], self.documents[chosen], self.starts[chosen], imbalance
        )


class Plan:
    """The global batches from one shard set, or from one language pair of it.

    Args:
        source: number of the shard set, for the batches.
        groups: the groups to draw from, sorted; none = all that have two languages.
        pair: numbers of the two languages of every pair; none = drawn for each group.
    """

    def __init__(
        self,
        index: ShardIndex,
        settings: PlanSettings,
        source: int = 0,
        groups: np.ndarray | None = None,
        pair: tuple[int, int] | None = None,
    ):
        self.index, self.settings, self.source, self.pair = index, settings, source, pair
        if groups is None:
            # Neighbouring numbers differ by more than one where a group has two documents; in parts, for memory.
            groups = _several_documents(index.columns["group_documents"])
        self.groups = groups.astype(np.uint32)
        self.batches_per_epoch = len(groups) // settings.groups
        if not self.batches_per_epoch:
            most = len(groups) * settings.pairs_per_group
            remedy = f"set data.pairs_per_batch to {most} or less" if most else "add translations"
            raise InputError(
                f"{index.folder} has {len(groups)} groups in two or more languages, fewer than one batch of "
                f"{settings.groups}: {remedy}"
            )
        if pair is None:
            counts = language_counts(index)
            self.language_weight = np.where(counts > 0, np.maximum(counts, 1.0) ** (settings.temperature - 1.0), 0.0)
        self._epoch: tuple[int, np.ndarray | None] = (-1, None)  # the one epoch that stays in memory

    def batch(self, number: int) -> GlobalBatch:
        """Global batch `number` (0-based), in whichever epoch of this part it falls."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order_of_epoch(epoch))
        groups = np.repeat(self._epoch[1][place].astype(np.int64), self.settings.pairs_per_group)
        documents = self._languages(groups) if self.pair else self._draw_documents(groups, epoch)
        starts = window_starts(self.index, self.settings, groups, documents, epoch, "window")
        return GlobalBatch(self.source, epoch, groups, documents, starts)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        """[batches, groups of a batch] uint32, the group numbers of every batch of an epoch.

        Written for twenty million groups: 32-bit numbers, and nothing is kept longer than it is needed.
        """
        settings, seed = self.settings, self.settings.seed
        size, batches = settings.neighbour_group, self.batches_per_epoch
        runs = self._runs(epoch, batches * settings.neighbour_groups // size)
        single = np.ones(len(self.groups), dtype=bool)
        single[runs.ravel()] = False
        single = np.flatnonzero(single).astype(np.uint32)
        single = single[draws.order(seed, "single", single, epoch)]
        # Runs are spread evenly; where the data has too few, single groups fill the places.
        order = np.empty((batches, settings.groups), dtype=np.uint32)
        each, more = divmod(len(runs), batches)
        run = one = 0
        for first, last, count in ((0, more, each + 1), (more, batches, each)):
            if first == last:
                continue
            rows, width, fill = last - first, count * size, settings.groups - count * size
            order[first:last, :width] = runs[run : run + rows * count].reshape(rows, width)
            order[first:last, width:] = single[one : one + rows * fill].reshape(rows, fill)
            run, one = run + rows * count, one + rows * fill
        del runs, single
        order = order[draws.order(seed, "batch", np.arange(batches), epoch)]
        # One row at a time: a copy of all rows at once would be the largest array of all.
        for row in order:
            row[:] = self.groups[row]
        return order

    def _runs(self, epoch: int, wanted: int) -> np.ndarray:
        """[R, size] at most `wanted` runs of groups of one category, as positions in `groups`."""
        size = self.settings.neighbour_group
        if not wanted:
            return np.empty((0, size), dtype=np.uint32)
        # Random order inside each category, cut into runs; incomplete runs and groups without category stay single.
        cluster = np.asarray(self.index.columns["group_cluster"])[self.groups]
        key = cluster.astype(np.uint64)
        key <<= np.uint64(32)
        key |= draws.bits(self.settings.seed, "run", epoch, self.groups) >> np.uint64(32)
        order = np.argsort(key, kind="stable").astype(np.uint32)
        del key
        cluster = cluster[order]
        begins = np.flatnonzero(np.r_[True, cluster[1:] != cluster[:-1]])
        sizes = np.diff(np.r_[begins, len(cluster)])
        whole = sizes // size * size
        whole[cluster[begins] == NO_CLUSTER] = 0
        # 1 at the first group of each category's whole runs, -1 behind the last: their sum says what lies inside.
        edge = np.zeros(len(order) + 1, dtype=np.int8)
        np.add.at(edge, begins, 1)
        np.add.at(edge, begins + whole, -1)
        runs = order[np.cumsum(edge[:-1], dtype=np.int8) > 0].reshape(-1, size)
        return runs[draws.order(self.settings.seed, "runs", runs[:, 0], epoch)[:wanted]]

    def _draw_documents(self, groups: np.ndarray, epoch: int) -> np.ndarray:
        """[P, 2] two different documents of each group, drawn from (seed, epoch, group) alone.

        The next pair of the same group has the next two, and begins again where there are no more.
        """
        document, row = _documents_of(self.index, groups)
        first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
        inside = np.arange(len(row)) - first[row]
        weight = self.language_weight[np.asarray(self.index.columns["document_language"])[document]]
        # The two smallest of exponential times with these rates: successive draws without replacement
        # (Efraimidis and Spirakis 2006).
        times = -np.log(draws.uniform(self.settings.seed, "document", epoch, groups[row], inside)) / weight
        order = np.lexsort((times, row))
        turn = 2 * (np.arange(len(groups)) % self.settings.pairs_per_group)
        count = np.diff(np.r_[first, len(row)])
        return np.stack([inside[order[first + (turn + side) % count]] for side in (0, 1)], axis=1)

    def _languages(self, groups: np.ndarray) -> np.ndarray:
        """[P, 2] the documents of each group in the two languages of this part."""
        document, row = _documents_of(self.index, groups)
        first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
        language = np.asarray(self.index.columns["document_language"])[document]
        return np.stack([np.flatnonzero(language == wanted) - first for wanted in self.pair], axis=1)


def window_starts(
    index: ShardIndex, settings: PlanSettings, groups: np.ndarray, documents: np.ndarray, epoch: int, what: str
) -> np.ndarray:
    """[P, 2] the first segment that is encoded of each document; `groups` are [P] or [P, 2]."""
    if settings.window == "first":
        return np.zeros(documents.shape, dtype=np.int64)
    groups = groups[:, None] if groups.ndim == 1 else groups
    position = np.asarray(index.columns["group_documents"])[groups].astype(np.int64) + documents
    places = np.maximum(index.segments(settings.windows, position) - settings.sentences, 0) + 1
    return (draws.uniform(settings.seed, what, epoch, groups, documents) * places).astype(np.int64)


def _several_documents(first: np.ndarray, chunk: int = 1 << 20) -> np.ndarray:
    found = [
        start + np.flatnonzero(np.diff(first[start : start + chunk + 1].astype(np.int64)) > 1)
        for start in range(0, len(first) - 1, chunk)
    ]
    return np.concatenate([part.astype(np.uint32) for part in found] or [np.empty(0, np.uint32)])


def language_counts(index: ShardIndex) -> np.ndarray:
    """[languages] documents of each."""
    column, chunk = index.columns["document_language"], 1 << 22
    counts = np.zeros(len(index.languages), dtype=np.int64)
    for start in range(0, len(column), chunk):
        counts += np.bincount(column[start : start + chunk], minlength=len(counts))
    return counts


def _documents_of(index: ShardIndex, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of each document of `groups`, row of its group), group after group."""
    column = index.columns["group_documents"]
    first, last = column[groups].astype(np.int64), column[groups + 1].astype(np.int64)
    row = np.repeat(np.arange(len(groups)), last - first)
    before = np.cumsum(last - first) - (last - first)
    return np.arange(len(row)) - before[row] + first[row], row
