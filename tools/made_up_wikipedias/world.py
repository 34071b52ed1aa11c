"""Which pages there are: items, wikis, kinds, titles and categories, all by functions of numbers.

Owns the random numbers that are the same in every process, and the numbers of pages; knows nothing of files.
"""

import functools
import zlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from made_up_wikipedias.languages import LANGUAGES
from made_up_wikipedias.words import words_of

BLOCK = 512  # page numbers made at once


class Kind(IntEnum):
    NONE = 0
    ARTICLE = 1
    STUB = 2
    BOT = 3  # from a template
    COPY = 4  # of another page of the wiki
    DISAMBIGUATION = 5
    LIST = 6
    REDIRECT = 7
    TWICE = 8  # the second page of an item
    PORTAL = 9
    CATEGORY = 10


class Known(IntEnum):
    """Where the item of a page is found; each place includes those before it."""

    NOWHERE = 0
    SITELINKS = 1
    PAGE_PROPS = 2
    CONTENT = 3


def hashed(*keys: int | str | np.ndarray) -> np.ndarray:
    """64 bits of the keys for each element of the arrays among them, by the steps of splitmix64 (Steele et al. 2014)."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        number = np.asarray(zlib.crc32(key.encode()) if isinstance(key, str) else key).astype(np.uint64)
        state = (state ^ number) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> 27)) * np.uint64(0x94D049BB133111EB)
        state ^= state >> 31
    return state


def permille(bits: np.ndarray) -> np.ndarray:
    """0-999 from hash bits: integers, for floating point may differ between machines."""
    return ((bits >> 40) % 1000).astype(np.int64)


def octaves(bits: np.ndarray, count: int) -> np.ndarray:
    """Ranks 0 to 2^count - 2 under Zipf's law in steps: each octave of ranks is equally likely, as are the ranks in it."""
    octave = np.uint64(1) << (bits % count)
    return (octave - 1 + ((bits >> 16) & (octave - 1))).astype(np.int64)


class World:
    """The items, and the wikis that have them.

    An entity of a wiki has a number: an item's article has the item's; `items` more, the item's second entity, which
    is a redirect, a second page or none; `2 * items` and more, a category: first those that wikis share, then the
    wiki's own, then the hidden ones. The page id is the number's place in a permutation, so ids are in no order of
    items and have gaps.
    """

    SHARED = (450, 670, 800, 890, 950, 1000)  # permille of the items in at most 1, 2, ... languages
    HIDDEN_OCTAVES = 5

    def __init__(self, seed: int, pages: int, languages: Sequence[str]):
        self.seed, self.languages = seed, list(languages)
        shares = np.diff([0, *self.SHARED])
        versions = sum(min(n, len(languages)) * share for n, share in enumerate(shares.tolist(), 1)) / 1000
        self.items = max(1, round(pages / versions / 1.11))  # redirects, second pages and portals are a tenth
        self.octaves = max(4, (self.items // 6).bit_length())
        self.shared, self.own = 2**self.octaves - 1, 2 ** (self.octaves - 2) - 1
        self.hidden = 2**self.HIDDEN_OCTAVES - 1
        self.categories = self.shared + self.own + self.hidden
        self.slots = 1 << (2 * self.items + self.categories - 1).bit_length()

    def _permutation(self, language: str) -> tuple[int, int]:
        odd, offset = hashed(self.seed, "page", language, np.arange(2)).tolist()
        return odd | 1, offset

    def page_ids(self, language: str, numbers: np.ndarray) -> np.ndarray:
        odd, offset = map(np.uint64, self._permutation(language))
        place = numbers.astype(np.uint64) * odd + offset
        return (place & np.uint64(self.slots - 1)).astype(np.int64) + 1

    def numbers(self, language: str, page_ids: np.ndarray) -> np.ndarray:
        odd, offset = self._permutation(language)
        place = (page_ids - 1).astype(np.uint64) - np.uint64(offset)
        return (place * np.uint64(pow(odd, -1, 2**64)) & np.uint64(self.slots - 1)).astype(np.int64)

    def exists(self, items: np.ndarray) -> np.ndarray:
        """Of each item a row: whether each language has it."""
        # The largest of w numbers wins as often as w chances of one do.
        keys = [
            functools.reduce(np.maximum, [hashed(self.seed, "has", items, name, n) for n in range(LANGUAGES[name].weight)])
            for name in self.languages
        ]  # fmt: skip
        ranks = np.argsort(np.argsort(-(np.stack(keys, axis=1) >> 1).astype(np.int64), axis=1), axis=1)
        count = 1 + np.searchsorted(self.SHARED, permille(hashed(self.seed, "versions", items)), side="right")
        return ranks < count[:, None]

    def category_exists(self, language: str, categories: np.ndarray) -> np.ndarray:
        # The seven largest are everywhere: they are the parents of those without another.
        here = permille(hashed(self.seed, "category here", language, categories)) < 750
        return here | (categories < 7) | (categories >= self.shared)

    def item_kinds(self, items: np.ndarray) -> np.ndarray:
        draw = permille(hashed(self.seed, "item kind", items))
        return np.select([draw < 40, draw < 60], [Kind.DISAMBIGUATION, Kind.LIST], Kind.ARTICLE)

    def kinds(self, language: str, numbers: np.ndarray) -> np.ndarray:
        kinds = np.zeros(len(numbers), np.int64)
        paged = numbers < 2 * self.items
        items = numbers[paged] % self.items
        draw = permille(hashed(self.seed, "kind", language, numbers[paged]))
        bot = 200 if self.languages.index(language) == 1 else 0
        prose = np.select([draw < 10, draw < 130, draw < 130 + bot], [Kind.COPY, Kind.STUB, Kind.BOT], Kind.ARTICLE)
        first = self.item_kinds(items)
        first = np.where(first == Kind.ARTICLE, prose, first)
        second = np.select([draw < 100, draw < 106, draw < 110], [Kind.REDIRECT, Kind.TWICE, Kind.PORTAL], Kind.NONE)
        there = self.exists(items)[:, self.languages.index(language)] if len(items) else False
        kinds[paged] = np.where(there, np.where(numbers[paged] < self.items, first, second), Kind.NONE)
        categories = numbers - 2 * self.items
        red = permille(hashed(self.seed, "red", language, categories)) < 50
        red &= categories < self.shared + self.own
        named = ~paged & (categories < self.categories) & ~red
        named[named] = self.category_exists(language, categories[named])
        kinds[named] = Kind.CATEGORY
        return kinds

    def item_ids(self, language: str, numbers: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """Wikidata's number of each page's item, 0 where it has none."""
        categories = numbers - 2 * self.items
        shared = categories < self.shared
        own = self.items + categories + self.languages.index(language) * self.own
        entity = np.where(kinds == Kind.CATEGORY, np.where(shared, self.items + categories, own), numbers % self.items)
        # 2^27 items, as there are in 2026, in no order of ours.
        ids = (entity.astype(np.uint64) * np.uint64(0x5851F42D) + np.uint64(77)) & np.uint64(2**27 - 1)
        without = permille(hashed(self.seed, "item of category", entity)) >= np.where(shared, 850, 300)
        without |= categories >= self.shared + self.own
        without &= kinds == Kind.CATEGORY
        without |= np.isin(kinds, (Kind.NONE, Kind.REDIRECT, Kind.PORTAL))
        return np.where(without, 0, ids.astype(np.int64) + 1)

    def known(self, language: str, numbers: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """Where the item of each page is found (`Known`)."""
        draw = permille(hashed(self.seed, "known", language, numbers))
        known = np.select(
            [draw < 10, draw < 20, draw < 35], [Known.NOWHERE, Known.SITELINKS, Known.PAGE_PROPS], Known.CONTENT
        )
        known = np.where(np.isin(kinds, (Kind.CATEGORY, Kind.TWICE)), Known.CONTENT, known)
        return np.where(self.item_ids(language, numbers, kinds) == 0, Known.NOWHERE, known)

    def titles(self, language: str, numbers: np.ndarray) -> list[str]:
        """Titles without a namespace; two pages of a wiki never have the same."""
        vocabulary = words_of(language)
        # A bijection of 30 bits, that is of two words.
        mixed = (numbers.astype(np.uint64) * np.uint64(0x2545F491) + np.uint64(self.seed)) & np.uint64(2**30 - 1)
        mixed ^= mixed >> 15
        mixed = mixed * np.uint64(0x1B873593) & np.uint64(2**30 - 1)
        mixed ^= mixed >> 15
        forms = len(LANGUAGES[language].titles)
        form = (hashed(self.seed, "title", numbers) >> 50).astype(np.int64) % (forms - 3)
        kinds = np.where(numbers < self.items, self.item_kinds(numbers), Kind.ARTICLE)
        form = np.where(kinds == Kind.LIST, forms - 3, np.where(kinds == Kind.DISAMBIGUATION, forms - 2, form))
        form = np.where(numbers >= 2 * self.items + self.shared + self.own, forms - 1, form)
        pairs = zip(form.tolist(), (mixed >> 15).tolist(), (mixed & np.uint64(2**15 - 1)).tolist(), strict=True)
        names, patterns = vocabulary.names, LANGUAGES[language].titles
        return [patterns[f] % (names[a], names[b]) for f, a, b in pairs]

    def category_titles(self, language: str, categories: Sequence[int]) -> list[str]:
        return self.titles(language, 2 * self.items + np.asarray(categories, dtype=np.int64))

    def category_lists(self, language: str, numbers: np.ndarray, kinds: np.ndarray) -> list[list[int]]:
        """The categories directly above each page or category, without repetition; the hidden ones are last."""
        items = numbers % self.items
        slots = np.arange(8)[:, None]
        draws = hashed(self.seed, "category", items[None, :], slots)
        own_draws = hashed(self.seed, "own category", language, numbers[None, :], slots)
        shared = octaves(draws, self.octaves)
        own = self.shared + octaves(own_draws, self.octaves - 2)
        direct = np.where(self.category_exists(language, shared) & (permille(own_draws) >= 150), shared, own)
        counts = np.array([1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 7, 8])
        direct[slots >= counts[(hashed(self.seed, "count", language, numbers) >> 60).astype(np.int64)]] = -1
        direct[:, np.isin(kinds, (Kind.REDIRECT, Kind.PORTAL))] = -1
        is_category = kinds == Kind.CATEGORY
        direct[:, is_category] = self._parents(language, numbers[is_category] - 2 * self.items)
        slots = np.arange(3)[:, None]
        draws = hashed(self.seed, "hidden", language, numbers[None, :], slots)
        hidden = self.shared + self.own + octaves(draws, self.HIDDEN_OCTAVES)
        hidden[permille(draws) >= np.where(is_category, 100, 400)] = -1
        hidden[:, np.isin(kinds, (Kind.REDIRECT, Kind.PORTAL))] = -1
        rows = np.concatenate([direct, hidden]).T.tolist()
        return [list(dict.fromkeys(c for c in row if c >= 0)) for row in rows]

    def _parents(self, language: str, categories: np.ndarray) -> np.ndarray:
        """Of each category eight rows: one to three larger ones, and now and then what closes a cycle."""
        draws = hashed(self.seed, "parents", categories)
        above = [(categories + 1 >> 1 + n) - 1 for n in range(2)]
        above.append(octaves(draws, self.octaves - 2))
        parents = np.full((8, len(categories)), -1)
        for row, (parent, chance) in enumerate(zip(above, (1000, 500, 200), strict=True)):
            # Above the wiki's own categories and the hidden ones are shared ones, too.
            parent = np.where((categories >= self.shared) | (parent >= self.shared), parent % self.own, parent)
            parent = np.where(self.category_exists(language, parent), parent, np.abs(parent) % 7)
            parents[row] = np.where(permille(draws >> np.uint64(8 * row)) < chance, parent, -1)
        # Rings of two and of three: each category of a ring has the next one above it.
        for row, (length, chance) in enumerate(((2, 20), (3, 10)), 3):
            ring = categories // length * length
            after = ring + (categories + 1 - ring) % length
            whole = ring + length <= self.shared
            for n in range(length):
                whole &= self.category_exists(language, ring + n)
            closed = permille(hashed(self.seed, "ring", length, ring)) < chance
            parents[row] = np.where(whole & (closed | (ring == 6)), after, -1)
        return np.where(parents == categories, -1, parents)
