"""Explicit hard negatives as in HMDE (arXiv 2305.07016, section 4): for each side of a pair one document in the side's
language, of a random other group in a random category of the pair's group.

As in the paper, categories are flat and a category counts only where another group has a version in that language. A
pair that has no such category gets a random document of the language in its place.
Unlike the paper's, the negatives are drawn anew each epoch, from (seed, epoch, group, side) alone.
"""

import numpy as np

from hmde_dist.stream import draws
from hmde_dist.stream.index import ShardIndex

_TRIES = 64  # at a random group of the language, where no category has one


class CategoryNegatives:
    """Draws negatives from one shard set. Holds the groups of every category and language in memory."""

    def __init__(self, index: ShardIndex, seed: int):
        self.index, self.seed = index, seed
        self._groups_of: dict[int, np.ndarray] = {}  # of languages so rare that a few tries found none
        columns = index.columns
        self._first_category = columns["group_categories"].astype(np.int64)
        groups = np.repeat(np.arange(index.groups, dtype=np.uint32), np.diff(self._first_category))
        order = np.argsort(columns["category"], kind="stable")
        self._members = groups[order]  # of all categories, one after the other
        self._first_member = np.r_[0, np.cumsum(np.bincount(columns["category"]))].astype(np.int64)
        # One bit a language, in words of 64.
        self._languages = np.zeros((index.groups, -(-len(index.languages) // 64)), dtype=np.uint64)
        document_group = np.repeat(np.arange(index.groups), np.diff(columns["group_documents"].astype(np.int64)))
        language = columns["document_language"].astype(np.int64)
        bit = np.uint64(1) << (language % 64).astype(np.uint64)
        np.bitwise_or.at(self._languages, (document_group, language // 64), bit)

    def draw(self, groups: np.ndarray, documents: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(groups [n, 2], documents [n, 2], found [n, 2] bool) of the negatives of n pairs, by side.

        Args:
            groups: [n]; documents: [n, 2] the pair's documents inside their group.
        """
        negatives = np.zeros(documents.shape, dtype=np.int64)
        found = np.zeros(documents.shape, dtype=bool)
        first = self.index.columns["group_documents"][groups].astype(np.int64)
        language = self.index.columns["document_language"][first[:, None] + documents].astype(np.int64)
        for row, group in enumerate(groups.tolist()):
            for side in (0, 1):
                negatives[row, side], found[row, side] = self._draw(group, int(language[row, side]), side, epoch)
        return negatives, self._document_of(negatives, language), found

    def _has(self, groups: np.ndarray, language: int) -> np.ndarray:
        return (self._languages[groups, language // 64] >> np.uint64(language % 64)) & np.uint64(1) == 1

    def _draw(self, group: int, language: int, side: int, epoch: int) -> tuple[int, bool]:
        categories = self.index.columns["category"][self._first_category[group] : self._first_category[group + 1]]
        # The first in random order that has a usable group is a uniform choice among those that have one.
        for category in categories[draws.order(self.seed, "category", categories, epoch, group, side)]:
            members = self._members[self._first_member[category] : self._first_member[category + 1]]
            members = members[self._has(members, language) & (members != group)]
            if len(members):
                share = draws.uniform(self.seed, "negative", epoch, group, side)[0]
                return int(members[int(share * len(members))]), True
        tries = draws.uniform(self.seed, "any", epoch, group, side, np.arange(_TRIES)) * self.index.groups
        tries = tries.astype(np.int64)
        usable = tries[self._has(tries, language) & (tries != group)]
        if not len(usable):
            # A rare language: look at every group that has it.
            if language not in self._groups_of:
                self._groups_of[language] = np.flatnonzero(self._has(np.arange(self.index.groups), language))
            usable = self._groups_of[language]
            usable = usable[usable != group] if len(usable) > 1 else usable
            share = draws.uniform(self.seed, "rare", epoch, group, side)[0]
            return int(usable[int(share * len(usable))]), False
        return int(usable[0]), False

    def _document_of(self, groups: np.ndarray, language: np.ndarray) -> np.ndarray:
        """The place inside its group of the document of `groups` in `language`."""
        first = self.index.columns["group_documents"]
        column = self.index.columns["document_language"]
        places = [
            np.flatnonzero(column[int(first[g]) : int(first[g + 1])] == wanted)[0]
            for g, wanted in zip(groups.ravel(), language.ravel(), strict=True)
        ]
        return np.array(places).reshape(groups.shape)
