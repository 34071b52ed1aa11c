"""The stream of a run: every global batch comes from one part, a shard set or one language pair of a shard set.

Which part a step takes is drawn from (seed, step) with the weights of that step, so it depends neither on ranks nor on
what was read before, and the state stays one integer. A part that is drawn for the k-th time gives its k-th batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.stream import draws
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.plan import PLAN_VERSION, GlobalBatch, Plan, PlanSettings, window_starts

_BLOCK = 1 << 14  # steps whose draws are made together
_CELLS = 1 << 26  # of a table of groups and languages that is made at once
_PLANS = 64  # language pairs whose orders stay in memory


@dataclass(frozen=True)
class Source:
    """A shard set and its weight among the sources.

    Attributes:
        weights: (step, weight) points; between two of them the weight goes in a straight line, outside it stays.
    """

    index: ShardIndex
    weights: tuple[tuple[int, float], ...] = ((0, 1.0),)


class Draws:
    """Which of n parts each step takes, and for the how manyth time: `of(step)` = (part, number).

    Args:
        weights: a function from steps [s] to weights [s, n], or constant weights [n].
    """

    def __init__(self, seed: int, what: str, weights):
        self.seed, self.what, self.weights = seed, what, weights
        self._blocks: list[tuple[np.ndarray, np.ndarray]] = []  # parts of the steps, and draws of each part before

    def of(self, step: int) -> tuple[int, int]:
        block, place = divmod(step, _BLOCK)
        while len(self._blocks) <= block:
            self._blocks.append(self._next_block())
        parts, before = self._blocks[block]
        part = int(parts[place])
        return part, int(before[part] + np.count_nonzero(parts[:place] == part))

    def _next_block(self) -> tuple[np.ndarray, np.ndarray]:
        steps = np.arange(_BLOCK) + len(self._blocks) * _BLOCK
        weights = self.weights(steps) if callable(self.weights) else np.asarray(self.weights)[None]
        bounds = np.cumsum(weights, axis=1)
        drawn = draws.uniform(self.seed, self.what, steps) * bounds[:, -1]
        if len(bounds) == 1:
            parts = np.searchsorted(bounds[0], drawn, side="right")
        else:
            parts = (drawn[:, None] >= bounds).sum(axis=1)
        if not self._blocks:
            return parts, np.zeros(bounds.shape[1], dtype=np.int64)
        last, before = self._blocks[-1]
        return parts, before + np.bincount(last, minlength=len(before))


class LanguagePairs:
    """A shard set in batches of one language pair each, pairs drawn with probability ~ groups ** temperature.

    Pairs with fewer groups than one batch are left out (`left_out`). A group occurs once in an epoch of each of its
    pairs, as in HMDE's data.
    """

    def __init__(self, index: ShardIndex, settings: PlanSettings, source: int):
        self.index, self.settings, self.source = index, settings, source
        together = pair_counts(index)
        pairs = [(a, b) for a in range(len(together)) for b in range(a + 1, len(together)) if together[a, b]]
        self.pairs = [pair for pair in pairs if together[pair] >= settings.pairs]
        self.left_out = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise InputError(
                f"{index.folder}: no language pair has {settings.pairs} groups, one batch: lower data.pairs_per_batch "
                "or set data.batch_languages=mixed"
            )
        weights = np.array([together[pair] for pair in self.pairs], dtype=float) ** settings.temperature
        self._draws = Draws(settings.seed, f"language pair {source}", weights)
        self._plans: dict[int, Plan] = {}  # those used last
        self._groups: dict[int, np.ndarray] = {}
        self.batches_per_epoch = sum(int(together[pair]) // settings.pairs for pair in self.pairs)

    def batch(self, number: int) -> GlobalBatch:
        part, number = self._draws.of(number)
        plan = self._plans.pop(part, None)
        if plan is None:
            # The order of the two languages is drawn by nobody: the objective is symmetric.
            pair = self.pairs[part]
            groups = np.intersect1d(*(self._groups_of(language) for language in pair), assume_unique=True)
            plan = Plan(self.index, self.settings, self.source, groups, pair)
        self._plans[part] = plan  # the last one now
        if len(self._plans) > _PLANS:
            del self._plans[next(iter(self._plans))]
        return plan.batch(number)

    def _groups_of(self, language: int) -> np.ndarray:
        """The groups that have a language, sorted."""
        if language not in self._groups:
            documents = np.flatnonzero(self.index.columns["document_language"] == language)
            first = self.index.columns["group_documents"]
            self._groups[language] = (np.searchsorted(first, documents, side="right") - 1).astype(np.uint32)
        return self._groups[language]


class Mixture:
    """The global batches of a run over one or several shard sets.

    Args:
        one_pair: every batch is of one language pair.
    """

    def __init__(self, sources: Sequence[Source], settings: PlanSettings, one_pair: bool = False):
        self.sources, self.settings = tuple(sources), settings
        make = LanguagePairs if one_pair else Plan
        self.parts = [make(source.index, settings, number) for number, source in enumerate(self.sources)]
        # A sum of straight lines is smallest at one of their points.
        steps = np.array(sorted({step for source in self.sources for step, _ in source.weights}))
        for step in steps[self._weights(steps).sum(axis=1) <= 0]:
            raise InputError(f"data.shards: at step {step} the weight of every source is zero")
        self._draws = Draws(settings.seed, "source", self._weights)

    def _weights(self, steps: np.ndarray) -> np.ndarray:
        return np.stack([np.interp(steps, *zip(*source.weights, strict=True)) for source in self.sources], axis=1)

    @property
    def indexes(self) -> list[ShardIndex]:
        return [source.index for source in self.sources]

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of optimizer step `step` (0-based)."""
        part, number = self._draws.of(step) if len(self.parts) > 1 else (0, step)
        return self.parts[part].batch(number)

    def starts(self, source: int, groups: np.ndarray, documents: np.ndarray, epoch: int, what: str) -> np.ndarray:
        """See `stream.plan.window_starts`."""
        return window_starts(self.indexes[source], self.settings, groups, documents, epoch, what)

    def state(self, step: int) -> dict:
        """Where a run stands before step `step`, for checkpoints and people."""
        numbers = [self._draws.of(step)] if len(self.parts) > 1 else [(0, step)]
        ((part, number),) = numbers
        epoch, batch = divmod(number, self.parts[part].batches_per_epoch)
        return {"source": part, "epoch": epoch, "batch": batch, "seed": self.settings.seed} | {
            "plan_version": PLAN_VERSION,
            "index_hash": [index.hash for index in self.indexes],
        }


def _language_table(index: ShardIndex, start: int, stop: int) -> np.ndarray:
    """[groups, languages] bool: which languages groups `start` to `stop - 1` have."""
    first = index.columns["group_documents"][start : stop + 1].astype(np.int64)
    table = np.zeros((stop - start, len(index.languages)), dtype=bool)
    rows = np.repeat(np.arange(stop - start), np.diff(first))
    table[rows, index.columns["document_language"][first[0] : first[-1]]] = True
    return table


def pair_counts(index: ShardIndex) -> np.ndarray:
    """[languages, languages] groups that have both."""
    counts = np.zeros((len(index.languages),) * 2, dtype=np.int64)
    chunk = max(1, min(_CELLS // len(index.languages), 1 << 24))
    for start in range(0, index.groups, chunk):
        # In float32 a count up to 2 ** 24 is exact, and the product is BLAS's.
        table = _language_table(index, start, min(start + chunk, index.groups)).astype(np.float32)
        counts += (table.T @ table).astype(np.int64)
    return counts
