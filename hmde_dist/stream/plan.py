"""The plan: which documents meet in which global batch, as a pure function of index, recipe, seed and epoch.

Ranks, nodes and workers do not enter, so a change of any of them changes who encodes a document and never which
documents meet. The state of the stream is one integer, the step.

Every group occurs at most once in an epoch and contributes one pair of documents in two languages. A share of each
batch is made of category neighbours, runs of `neighbour_group` groups of one category drawn anew each epoch: they
serve as each other's hard negatives, and nothing is encoded twice for it.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import NO_CLUSTER
from hmde_dist.stream.index import ShardIndex

PLAN_VERSION = 1


@dataclass(frozen=True)
class GlobalBatch:
    """One global batch of P pairs."""

    groups: np.ndarray  # [P] group numbers, all different
    documents: np.ndarray  # [P, 2] positions of the two documents inside their group

    def of_rank(self, rank: int, world: int, tokens: np.ndarray) -> "GlobalBatch":
        """The P / world pairs of one rank, chosen so that ranks get about the same number of tokens.

        Args:
            tokens: [P] tokens of each pair.
        """
        # Longest first, each to the rank with the fewest tokens that has a place left (Graham's LPT rule).
        places = len(tokens) // world
        loads, mine = [(0, 0, number) for number in range(world)], []
        for pair in np.argsort(-tokens, kind="stable").tolist():
            load, count, number = heapq.heappop(loads)
            if number == rank:
                mine.append(pair)
            if count + 1 < places:
                heapq.heappush(loads, (load + int(tokens[pair]), count + 1, number))
        chosen = np.sort(np.array(mine))
        return GlobalBatch(self.groups[chosen], self.documents[chosen])


class Plan:
    """The global batches of a training run over one shard set.

    Args:
        index: the shard set.
        pairs: P, pairs of one global batch.
        neighbours: share of a batch (0 to 1) made of category neighbours.
        neighbour_group: groups of one category that are placed together.
        temperature: languages of a pair are drawn with probability ~ count ** temperature; 1 follows the data,
            0 treats all languages alike (HMDE's own sampler uses 0.3 over language pairs).
        seed: of everything random here.
    """

    def __init__(
        self, index: ShardIndex, pairs: int, neighbours: float, neighbour_group: int, temperature: float, seed: int
    ):
        self.index, self.pairs, self.seed = index, pairs, seed
        self.neighbour_group = neighbour_group
        # Whole runs only, so the share is met as nearly as runs of this size allow.
        # A share above zero is at least one run.
        runs = min(pairs // neighbour_group, max(round(neighbours * pairs / neighbour_group), neighbours > 0))
        self.neighbour_pairs = int(runs) * neighbour_group
        versions = np.diff(index.columns["group_documents"].astype(np.int64))
        self.usable = np.flatnonzero(versions > 1)
        self.batches_per_epoch = len(self.usable) // pairs
        if not self.batches_per_epoch:
            remedy = (
                f"set data.pairs_per_batch to {len(self.usable)} or less" if len(self.usable) else "add translations"
            )
            raise InputError(
                f"{index.folder} has {len(self.usable)} groups in two or more languages, fewer than one batch of {pairs}: "
                f"{remedy}"
            )
        counts = np.bincount(index.columns["document_language"], minlength=len(index.languages)).astype(float)
        self.language_weight = np.where(counts > 0, np.maximum(counts, 1) ** (temperature - 1.0), 0.0)
        self._epoch: tuple[int, np.ndarray | None] = (-1, None)  # the one epoch that stays in memory

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of optimizer step `step` (0-based), in whichever epoch it falls."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order_of_epoch(epoch))
        groups = self._epoch[1][position]
        return GlobalBatch(groups, self._draw_documents(groups, epoch))

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        """[batches, P] group numbers of every batch of an epoch."""
        random = np.random.default_rng([self.seed, epoch, PLAN_VERSION])
        usable, size = self.usable, self.neighbour_group
        cluster = np.asarray(self.index.columns["group_cluster"])[usable]
        runs = np.empty((0, size), dtype=np.int64)
        wanted = self.batches_per_epoch * self.neighbour_pairs // size
        if wanted:
            # Random order inside each category, cut into runs; incomplete runs and groups without category stay single.
            order = np.lexsort((random.random(len(usable)), cluster))
            sorted_cluster = cluster[order]
            first = np.r_[0, np.flatnonzero(np.diff(sorted_cluster)) + 1]
            sizes = np.diff(np.r_[first, len(order)])
            rank_in_cluster = np.arange(len(order)) - np.repeat(first, sizes)
            whole = rank_in_cluster < np.repeat(sizes // size * size, sizes)
            runs = order[whole & (sorted_cluster != NO_CLUSTER)].reshape(-1, size)
            runs = random.permutation(runs)[:wanted]
        single = np.setdiff1d(np.arange(len(usable)), runs.ravel(), assume_unique=True)
        single = random.permutation(single)
        # Runs are spread evenly; where the data has too few, single groups fill the places.
        per_batch = np.full(self.batches_per_epoch, len(runs) // self.batches_per_epoch)
        per_batch[: len(runs) % self.batches_per_epoch] += 1
        batches = np.empty((self.batches_per_epoch, self.pairs), dtype=np.int64)
        run, one = 0, 0
        for number, count in enumerate(per_batch):
            fill = self.pairs - count * size
            batches[number, : count * size] = runs[run : run + count].ravel()
            batches[number, count * size :] = single[one : one + fill]
            run, one = run + count, one + fill
        return usable[random.permutation(batches)]

    def _draw_documents(self, groups: np.ndarray, epoch: int) -> np.ndarray:
        """[P, 2] two different documents of each group, drawn from (seed, epoch, group) alone."""
        first = self.index.columns["group_documents"]
        language = self.index.columns["document_language"]
        drawn = np.empty((len(groups), 2), dtype=np.int64)
        for row, group in enumerate(groups):
            start, stop = int(first[group]), int(first[group + 1])
            weight = self.language_weight[language[start:stop]]
            random = np.random.default_rng([self.seed, epoch, int(group), PLAN_VERSION])
            drawn[row] = random.choice(stop - start, size=2, replace=False, p=weight / weight.sum())
        return drawn
