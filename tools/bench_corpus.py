"""How fast does the way from Wikipedia's dumps to shards go? Writes dumps of any size, and measures the commands on them.

`generate` writes the dumps of made-up Wikipedias, in the tree, the formats and the proportions of the published ones:
CirrusSearch content (text is about 15 % of a record's bytes and wikitext 33 %, as data of 2026 have it), the SQL tables
page, page_props, categorylinks, linktarget and langlinks, and Wikidata's wb_items_per_site. The prose of a page has
log-normal length with a mean of 1,300 characters, that of simplewiki (a page of enwiki has about three times as many bytes),
in words of an invented vocabulary under Zipf's law. The wiki named second has the SQL dumps and the action lines of
2024, and a bot; the third has the SQL dumps of 2025, the others those of 2026.

Nothing is held in memory but a few hundred pages: whether an item is in a wiki, and its page, title and categories,
are functions of the seed, the item's number and the language, so any process can say them of any page. Neither the
number of processes nor their order changes a byte; another release of zlib or numpy may.

`run` measures the commands of the project on such dumps, or real ones.
"""

import bz2
import contextlib
import functools
import gzip
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import psutil

from hmde_dist.benchmark import machine, markdown
from hmde_dist.command import (
    FAILED,
    InputError,
    argument_parser,
    output_file,
    output_folder,
    positive,
    progress,
    run_command,
)
from hmde_dist.corpus.cirrus import find_dumps, language_of

# The layouts of files and tables are those of the tests' dumps, which own them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from wikipedia_dumps import CIRRUS_DATE, SQL_DATE, sql_text

TOOLS = Path(__file__).resolve().parent
TABLES = ("categorylinks", "page_props", "page", "langlinks", "linktarget")
BLOCK = 512  # page numbers made at once
PART_PAGES = 5000
BZ2_LEVEL = 9  # as published; blocks of level 1 unpack 1.45 times as fast, which would flatter the readers

# --- languages


@dataclass(frozen=True)
class Language:
    """How a made-up language looks.

    Attributes:
        weight: chances of an item to be in this language.
        syllables: beginnings, middles and ends.
        marks: full stop, question mark, comma, and what is between sentences.
        words: shortest and longest sentence, in words.
        names: of a hundred words, those with a capital.
        titles: forms of a title; the last three are a list's, a disambiguation's and a hidden category's.
        extras: abbreviations and numbers within a sentence.
    """

    weight: int
    syllables: tuple[list[str], list[str], list[str]]
    marks: tuple[str, str, str, str]
    words: tuple[int, int]
    names: int
    titles: tuple[str, ...]
    category: str
    extras: list[str]


_LATIN_ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pl pr r s sh st t th tr v w".split()
_STOPS, _NUMBERS = (".", "?", ",", " "), "1848 1914 1967 1989 2004 2021 7 12 48 300 2,5 98,6 10000".split()
LANGUAGES = {
    "en": Language(
        6, (_LATIN_ONSETS, "a e i o u ea ou ai".split(), ["", "", *"n r s t l m nd st ck ng".split()]), _STOPS, (5, 31), 9,
        ("%s %s", "%s %s", "%s of %s", "%s O'%s", "%s %s (film)", "List of %s %s", "%s %s (disambiguation)", "Articles with %s %s"),
        "Category", ["e.g.", "i.e.", "Dr. Smith", "St. Louis", "c. 1850", "J. R. Hart", "approx.", "3.5", "U.S."],
    ),
    "de": Language(
        3, ([*_LATIN_ONSETS, "sch", "z", "pf"], "a e i o u ä ö ü ei ie au".split(), ["", "", *"n r s t ß nd cht ng lt en".split()]), _STOPS, (5, 27), 30,
        ("%s %s", "%s-%s", "%s (%s)", "%s von %s", "%s %s (Film)", "Liste der %s %s", "%s %s (Begriffsklärung)", "Wikipedia:%s %s"),
        "Kategorie", ["z. B.", "d. h.", "Dr. Meier", "3. Oktober", "ca. 40", "u. a.", "Nr. 5", "usw."],
    ),
    "fr": Language(
        3, (_LATIN_ONSETS, "a e i o u é è ê ou oi eau".split(), ["", "", *"n r s t l que x nt le".split()]), _STOPS, (6, 31), 8,
        ("%s %s", "%s-%s", "L'%s %s", "%s d'%s", "%s %s (film)", "Liste des %s %s", "%s %s (homonymie)", "Article avec %s %s"),
        "Catégorie", ["p. ex.", "M. Martin", "av. J.-C.", "« oui »", "no 3", "env. 20", "etc."],
    ),
    "ru": Language(
        2, ("б в г д ж з к л м н п р с т ф х ц ч ш ст пр кр".split(), "а е и о у ы ю я".split(), ["", "", *"н р с т й л м ть ск".split()]), _STOPS, (5, 25), 8,
        ("%s %s", "%s-%s", "%s, %s", "%s и %s", "%s %s (фильм)", "Список %s %s", "%s %s (значения)", "Википедия:%s %s"),
        "Категория", ["т. е.", "т. д.", "в 1972 г.", "им. Ленина", "ул. Мира", "5 млн", "см."],
    ),
    "ja": Language(
        2, (list("のはをにがでとしてたるいなれさも"), [chr(0x4E00 + 13 * i) for i in range(1500)], list("アイウカキクコサシスタテトナニバブマミムラリルレロン")), ("。", "？", "、", ""), (8, 34), 0,
        ("%s・%s", "%s・%s", "%s・%s駅", "%s=%s", "%s・%s (映画)", "%s・%sの一覧", "%s・%s (曖昧さ回避)", "%s・%sを含む記事"),
        "Category", ["1987年", "3月", "約40", "No.5", "「東」", "(西)", "JR"],
    ),
    "hi": Language(
        1, (list("कखगघचजटडतदनपबभमयरलवशसह"), ["", *"ा ि ी ु ू े ै ो ौ".split()], ["", "", "", "न", "र", "ल", "ं", "त"]), ("।", "?", ",", " "), (5, 27), 0,
        ("%s %s", "%s %s", "%s का %s", "%s-%s", "%s %s (फ़िल्म)", "%s %s की सूची", "%s %s (बहुविकल्पी)", "%s %s वाले लेख"),
        "श्रेणी", ["डॉ. वर्मा", "1947", "लगभग 40", "ई.", "२५", "श्री राम"],
    ),
}  # fmt: skip
MEAN_CHARACTERS, DEVIATION = 1300, 1.0

# --- the world: who is where, by functions of numbers


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


# --- words


class Words:
    """A language's vocabulary, and pools of what pages have beside their prose."""

    COUNT = 2**15
    PLAIN, COMMA, NAME, END, START = range(5)

    def __init__(self, code: str):
        language = LANGUAGES[code]
        draw = random.Random(f"vocabulary {code}")
        self.code, self.gap = code, language.marks[3]
        self.vocabulary = _vocabulary(code, draw)
        self.names = [word.capitalize() for word in self.vocabulary]
        stop, question, comma, gap = language.marks
        # Which word ends a question is the word's own affair.
        ends = [word + (question if rank % 41 == 40 else stop) for rank, word in enumerate(self.vocabulary)]
        # Every piece of a text is one string, so that a text is one join.
        self.pieces = [gap + word for word in self.vocabulary] + [gap + word + comma for word in self.vocabulary]
        self.pieces += [gap + word for word in self.names] + [gap + word for word in ends]
        self.pieces += ["\n" + word for word in self.names]
        self.extras = len(self.pieces)
        numbers = [number.replace(",", "." if code in ("en", "ja", "hi") else ",") for number in _NUMBERS]
        self.pieces += [gap + extra for extra in [*language.extras, *numbers]]
        # Zipf's law with Mandelbrot's shift, in whole numbers, which are the same on every machine.
        weights = [10 * 2**30 // (10 * rank + 27) for rank in range(1, self.COUNT + 1)]
        total = sum(weights)
        self.steps = np.array([2**32 * done // total for done in itertools.accumulate(weights)], dtype=np.uint64)
        self.variants = np.full(100, self.PLAIN)
        self.variants[:8], self.variants[8 : 8 + language.names] = self.COMMA, self.NAME
        sample = self.sentences(np.random.default_rng(zlib.crc32(code.encode())), 2000)
        self.sentence_bytes = sum(len(sentence.encode()) for sentence in sample) / len(sample)
        characters = sum(map(len, sample)) / len(sample)
        mean = MEAN_CHARACTERS / characters
        law = statistics.NormalDist(math.log(mean) - DEVIATION**2 / 2, DEVIATION)
        self.lengths = np.array([max(1, round(math.exp(law.inv_cdf((n + 0.5) / 1024)))) for n in range(1024)])
        self._fill_pools(draw, sample)

    def sentences(self, rng: np.random.Generator, count: int) -> list[str]:
        if not count:
            return []
        least, most = LANGUAGES[self.code].words
        lengths = least + rng.integers(0, (most - least) // 2 + 1, (2, count)).sum(axis=0)
        ends = np.cumsum(lengths)
        drawn = rng.integers(0, 2**32, ends[-1], dtype=np.uint32).astype(np.uint64)
        ranks = np.minimum(np.searchsorted(self.steps, drawn, side="right"), self.COUNT - 1)
        dice = rng.integers(0, 2**16, ends[-1], dtype=np.uint16).astype(np.int64)
        variants = self.variants[dice % 100]
        variants[ends - 1], variants[ends - lengths] = self.END, self.START
        pieces = ranks + self.COUNT * variants
        extra = (variants == self.PLAIN) & (dice % 100 >= 96)
        pieces[extra] = self.extras + dice[extra] // 100 % (len(self.pieces) - self.extras)
        return "".join(map(self.pieces.__getitem__, pieces.tolist())).split("\n")[1:]

    def _fill_pools(self, draw: random.Random, sample: list[str]) -> None:
        def name() -> str:
            return f"{draw.choice(self.names)}{self.gap}{draw.choice(self.names)}"

        def url() -> str:
            site, folder, page = (draw.choice(_ASCII_WORDS) for _ in range(3))
            return f"https://www.{site}{page}.org/{folder}/{draw.randrange(2000, 2027)}/{page}-{draw.getrandbits(40):x}.html"

        def cited() -> str:
            return (
                f'<ref name="{draw.choice(_ASCII_WORDS)}{draw.randrange(999)}">{{{{cite web |url={url()} |title={name()}'
                f"{self.gap}{name()} |last={draw.choice(self.names)} |date=20{draw.randrange(10, 27)}-0{draw.randrange(1, 9)}"
                f"-1{draw.randrange(9)} |access-date=2026-01-2{draw.randrange(9)} |publisher={name()}}}}}</ref>"
            )

        def box() -> str:
            return "".join(f"\n| {draw.choice(_ASCII_WORDS)} = {name()}{draw.randrange(9999)}" for _ in range(8))

        some = range(4096)
        citations = [cited() for _ in some]
        # So many citations behind a sentence that wikitext has 33/14.5 of the text's bytes; the rest is links.
        wanted = 1.05 * self.sentence_bytes / (sum(len(c.encode()) for c in citations) / len(citations))
        self.after = []
        for citation in citations:
            count = int(wanted + draw.random())
            close = draw.random()
            heading = f"\n\n== {name()} ==\n" if close < 0.06 else "\n\n" if close < 0.2 else " "
            self.after.append("".join([citation, *draw.choices(citations, k=8)][:count]) + heading)
        self.boxes = [f"{{{{Infobox {draw.choice(_ASCII_WORDS)}{box()}\n}}}}\n" for _ in some]
        self.box_texts = [
            " ".join(sample[draw.randrange(2000)][: draw.randrange(10, 60)] for _ in range(3)) for _ in some
        ]
        self.links = [name().replace(" ", "_") for _ in range(2**14)]
        self.urls = [url() for _ in some]
        self.templates = [f"Template:{name()}" for _ in range(512)]
        self.headings = [name() for _ in range(1024)]
        self.references = [
            f'{name()} ({draw.randrange(1900, 2027)}). "{name()}". p. {draw.randrange(400)}.' for _ in some
        ]
        self.bots = [_bot_template(draw, self.gap, sample) for _ in range(4)]


_ASCII_WORDS = [f"{a}{b}{c}" for a in "bdlmnrst" for b in ("a", "e", "io") for c in ("rn", "ll", "nt", "ve", "x")]


def _bot_template(draw: random.Random, gap: str, sample: list[str]) -> str:
    """Eight lines, a sentence each; every second one has a place for a word."""
    sentences = draw.sample(sample, 8)
    for n in range(0, 8, 2):
        sentence = sentences[n]
        cut = max(0, sentence.find(gap, len(sentence) // 2))
        sentences[n] = f"{sentence[:cut]}{gap}%s{sentence[cut:]}"
    return "\n".join(sentences)


def _vocabulary(code: str, draw: random.Random) -> list[str]:
    """Words by rank: those used most are short."""
    first, second, third = LANGUAGES[code].syllables
    words: dict[str, None] = {}
    while len(words) < Words.COUNT:
        rank = len(words)
        longest = 1 + (rank >= 60) + (rank >= 1500) + (rank >= 12000)
        if code != "ja":
            size = draw.randint(max(1, longest - 1), longest)
            word = "".join(draw.choice(first) + draw.choice(second) for _ in range(size)) + draw.choice(third)
        elif rank < 100:
            word = "".join(draw.choices(first, k=draw.randint(1, 2)))
        else:
            form = draw.random()
            pool, length = (third, longest + 1) if form < 0.25 else (second, min(longest, 2))
            word = "".join(draw.choices(pool, k=length))
            word += draw.choice(first) if form > 0.75 else ""
        words[word] = None
    return list(words)


@functools.cache
def words_of(code: str) -> Words:
    return Words(code)


# --- content dumps

_TOPICS = (
    "Culture.Media.Music Culture.Media.Films Culture.Biography.Biography* Culture.Sports Culture.Literature STEM.Space"
    " STEM.Biology STEM.STEM* STEM.Technology Geography.Regions.Europe.Europe* Geography.Regions.Asia.Asia*"
    " Geography.Geographical History_and_Society.History History_and_Society.Transportation"
).split()
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Task:
    """A file to write: a table of a wiki, or if `table` is empty part `part` of `parts` of its content."""

    folder: Path
    language: str
    table: str = ""
    part: int = 0
    parts: int = 1


def write_content(world: World, task: Task) -> Counter:
    """Write one part of a wiki's content; returns the number of pages of each kind, and of bytes and characters."""
    language, wiki = task.language, f"{task.language}wiki"
    counts: Counter = Counter()
    rng = np.random.default_rng([world.seed, zlib.crc32(wiki.encode()), task.part])
    compressor = bz2.BZ2Compressor(BZ2_LEVEL)
    base = task.folder / CIRRUS_DATE / f"index_name={wiki}_content"
    first, last = (world.slots * part // task.parts for part in (task.part, task.part + 1))
    originals: list[tuple[list[str], str]] = []
    old = world.languages.index(language) == 1
    with open(base / f"{wiki}_content-{CIRRUS_DATE}-{task.part:05d}.json.bz2", "wb") as file:
        for start in range(first, last, BLOCK):
            page_ids = np.arange(start, min(start + BLOCK, last)) + 1
            lines = []
            for record in _records(world, language, page_ids, rng, originals, counts):
                number = record["page_id"]
                lines.append(_JSON({"index": {"_type": "page", "_id": str(number)} if old else {"_id": number}}))
                lines.append(_JSON(record))
                counts["source bytes"] += len(record.get("source_text", "").encode())
            data = "".join(line + "\n" for line in lines).encode()
            counts["bytes"] += len(data)
            counts["compressed bytes"] += file.write(compressor.compress(data))
        counts["compressed bytes"] += file.write(compressor.flush())
    return counts


def _records(
    world: World, language: str, page_ids: np.ndarray, rng: np.random.Generator, originals: list, counts: Counter
) -> Iterator[dict]:
    """The documents of the pages that exist among `page_ids`; `originals` are sentences and notes of pages before them."""
    numbers = world.numbers(language, page_ids)
    kinds = world.kinds(language, numbers)
    there = (kinds != Kind.NONE) & (kinds != Kind.CATEGORY)
    numbers, kinds, page_ids = numbers[there], kinds[there], page_ids[there]
    if not len(numbers):
        return
    words = words_of(language)
    items = world.item_ids(language, numbers, kinds).tolist()
    known = world.known(language, numbers, kinds).tolist()
    titles = world.titles(language, numbers)
    categories = world.category_lists(language, numbers, kinds)
    category_titles = iter(world.category_titles(language, list(itertools.chain.from_iterable(categories))))
    partner = numbers % world.items
    redirects = world.kinds(language, partner + world.items) == Kind.REDIRECT
    partner_titles = world.titles(language, np.where(kinds == Kind.REDIRECT, partner, partner + world.items))
    topics = hashed(world.seed, "topic", partner)
    bits = hashed(world.seed, "bits", language, numbers).tolist()
    prose = words.lengths[rng.integers(0, 1024, len(numbers))]
    sizes = np.select(
        [np.isin(kinds, (Kind.ARTICLE, Kind.TWICE, Kind.COPY)), kinds == Kind.STUB, np.isin(kinds, (Kind.LIST, Kind.PORTAL))],
        [prose, rng.integers(0, 5, len(numbers)), 3],
        0,
    )  # fmt: skip
    sentences = iter(words.sentences(rng, int(sizes.sum())))
    picker = _Picker(rng)
    for place, kind in enumerate(kinds.tolist()):
        own = list(itertools.islice(sentences, int(sizes[place])))
        draw, title, notes = bits[place], titles[place], ""
        if kind == Kind.COPY and originals:
            own, notes = originals[draw % len(originals)]
        elif kind == Kind.BOT:
            own = (words.bots[draw % len(words.bots)] % tuple(picker.some(words.names, 4))).split("\n")
            own[0] = f"{title}{words.gap}{own[0]}"
        elif kind == Kind.DISAMBIGUATION:
            own = [f"{title.partition(' (')[0]}: " + ", ".join(picker.some(words.headings, 3 + draw % 8))]
        elif own:
            own[0] = f"{title}{words.gap}{own[0]}"
        if kind == Kind.LIST:
            own.append(" ".join(picker.some(words.headings, 10 + draw % 90)))
        elif kind in (Kind.ARTICLE, Kind.TWICE):
            if draw % 5 < 2:
                notes = "".join(f"  ^ {note}" for note in picker.some(words.references, 2 + draw % 9))
            originals[draw % 64 : draw % 64 + 1] = [(own, notes)]  # one more, or in the place of another
        text = words.gap.join(own) + notes
        record = {
            "wiki": f"{language}wiki", "page_id": int(page_ids[place]), "namespace": 100 if kind == Kind.PORTAL else 0,
            "namespace_text": "Portal" if kind == Kind.PORTAL else "", "title": title, "timestamp": _time(draw, "T", "Z"),
            "create_timestamp": _time(draw >> 7, "T", "Z"), "version": 900_000_000 + draw % 2**28, "language": language,
            "content_model": "wikitext", "page_type": "redirect" if kind == Kind.REDIRECT else "primary",
        }  # fmt: skip
        if known[place] == Known.CONTENT:
            record["wikibase_item"] = f"Q{items[place]}"
        record["category"] = [next(category_titles) for _ in categories[place]]
        counts["pages"] += 1
        counts[Kind(kind).name.lower()] += 1
        if kind == Kind.REDIRECT:
            yield record | {"redirect_target": {"namespace": 0, "title": partner_titles[place]}}
            continue
        size = len(text.encode())
        counts["text bytes"] += size
        counts["characters"] += len(text)
        counts["pages with text"] += bool(text)
        has_redirect = redirects[place] and kind != Kind.TWICE
        # The shares of fields other than the texts are not known; these make up the rest of a record's bytes.
        yield record | {
            "heading": picker.some(words.headings, 1 + size // 600), "opening_text": words.gap.join(own[:2]),
            "text": text, "text_bytes": size, "auxiliary_text": picker.some(words.box_texts, size // 700 + 1),
            "source_text": _wikitext(title, own, record["category"], words, picker),
            "template": picker.some(words.templates, min(3 + size // 90, 60)),
            "outgoing_link": picker.some(words.links, 2 + size // 24), "external_link": picker.some(words.urls, size // 72),
            "redirect": [{"namespace": 0, "title": partner_titles[place]}] if has_redirect else [],
            "incoming_links": draw % 97, "popularity_score": (draw >> 11) % 9973 / 1e9,
            "weighted_tags": _tags(int(topics[place]), draw),
        }  # fmt: skip


class _Picker:
    """Draws from pools; random numbers are made in advance, for numpy's calls are dear and its numbers cheap."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.numbers, self.used = rng, [], 0

    def some(self, pool: list[str], count: int) -> list[str]:
        if self.used + count > len(self.numbers):
            self.numbers, self.used = self.rng.integers(0, 2**31, max(2**15, count)).tolist(), 0
        size = len(pool)
        picked = [pool[number % size] for number in self.numbers[self.used : self.used + count]]
        self.used += count
        return picked


def _wikitext(title: str, sentences: Sequence[str], categories: Sequence[str], words: Words, picker: _Picker) -> str:
    body = itertools.chain.from_iterable(zip(sentences, picker.some(words.after, len(sentences)), strict=True))
    category = LANGUAGES[words.code].category
    closing = "".join(f"\n[[{category}:{name}]]" for name in categories)
    return f"{picker.some(words.boxes, 1)[0]}'''{title}''' {''.join(body)}\n{{{{Reflist}}}}\n{closing}"


def _tags(topic: int, draw: int) -> list[str]:
    names = [_TOPICS[(topic >> 8 * n) % len(_TOPICS)] for n in range(1 + topic % 4)]
    tags = [f"classification.prediction.articletopic/{name}|{(draw >> 5 * n) % 1000}" for n, name in enumerate(names)]
    return [*tags, "recommendation.link/exists|1"]


def _time(draw: int, between: str, end: str) -> str:
    return (
        f"20{10 + draw % 16}-{1 + draw % 12:02}-{1 + draw % 28:02}{between}"
        f"{draw // 64 % 24:02}:{draw // 512 % 60:02}:{draw // 4096 % 60:02}{end}"
    )


# --- SQL dumps

_SPECIAL = re.compile(rb"[\0\n\r\x1a\"'\\]")
_ESCAPES = {b"\0": rb"\0", b"\n": rb"\n", b"\r": rb"\r", b"\x1a": rb"\Z", b'"': rb"\"", b"'": rb"\'", b"\\": rb"\\"}
_SORT_KEY = bytes((5 * byte + 41) % 256 for byte in range(256))


def quoted(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return b"'%b'" % _SPECIAL.sub(lambda match: _ESCAPES[match[0]], value)


def key(title: str) -> bytes:
    """A title as SQL tables have it."""
    return quoted(title.replace(" ", "_"))


def write_table(world: World, task: Task) -> Counter:
    """Write a table of a wiki, or Wikidata's; returns the bytes."""
    wiki = "wikidatawiki" if task.table == "wb_items_per_site" else f"{task.language}wiki"
    role = world.languages.index(task.language) if task.language else 0
    layout = "one_line" if role == 1 else "lines"
    schema = {1: "old", 2: "transitional"}.get(role, "new")
    whole = sql_text(wiki, task.table, (), layout, schema)
    cut = whole.index(b"/*!40000 ALTER TABLE `%b` ENABLE" % task.table.encode())
    opening, between = (b"\n", b",\n") if layout == "lines" else (b" ", b",")
    path = task.folder / wiki / SQL_DATE / f"{wiki}-{SQL_DATE}-{task.table}.sql.gz"
    if task.table == "wb_items_per_site":
        blocks = _sitelinks(world)
    elif task.table == "linktarget":
        blocks = _link_targets(world, task.language)
    else:
        blocks = _page_rows(world, task.language, _ROWS[task.table], schema)
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as out:
        out.write(whole[:cut])
        for rows in blocks:
            if rows:
                out.write(b"INSERT INTO `%b` VALUES%b%b;\n" % (task.table.encode(), opening, between.join(rows)))
        out.write(whole[cut:])
    return Counter({"sql bytes": path.stat().st_size})


def _page_rows(world: World, language: str, rows_of: Callable, schema: str) -> Iterator[list[bytes]]:
    for start in range(0, world.slots, 8 * BLOCK):
        page_ids = np.arange(start, min(start + 8 * BLOCK, world.slots)) + 1
        numbers = world.numbers(language, page_ids)
        kinds = world.kinds(language, numbers)
        there = kinds != Kind.NONE
        if there.any():
            yield rows_of(world, language, numbers[there], kinds[there], page_ids[there].tolist(), schema)


def _page(world: World, language: str, numbers, kinds, page_ids, schema: str) -> list[bytes]:
    namespaces = np.select([kinds == Kind.CATEGORY, kinds == Kind.PORTAL], [14, 100], 0).tolist()
    bits = hashed(world.seed, "bits", language, numbers).tolist()
    columns = zip(page_ids, namespaces, world.titles(language, numbers), (kinds == Kind.REDIRECT).tolist(), bits, strict=True)  # fmt: skip
    return [
        b"(%d,%d,%b,%d,0,0.%d,'202609%02d010203',%b,%d,%d,'wikitext',NULL)"
        % (page, namespace, key(title), redirect, b % 10**12, 1 + b % 28, b"NULL" if b % 3 else b"'20260902030405'",
           900_000_000 + b % 2**28, 200 + b % 20000)
        for page, namespace, title, redirect, b in columns
    ]  # fmt: skip


def _page_props(world: World, language: str, numbers, kinds, page_ids, schema: str) -> list[bytes]:
    items = world.item_ids(language, numbers, kinds).tolist()
    known = world.known(language, numbers, kinds).tolist()
    hidden = (numbers >= 2 * world.items + world.shared + world.own).tolist()
    rows = []
    columns = zip(page_ids, kinds.tolist(), world.titles(language, numbers), items, known, hidden, strict=True)
    for page, kind, title, item, place, is_hidden in columns:
        if kind == Kind.DISAMBIGUATION:
            rows.append(b"(%d,'disambiguation','',NULL)" % page)
        if page % 19 == 0:
            rows.append(b"(%d,'displaytitle',%b,NULL)" % (page, quoted(f"<i>It's (x),(y)\\ {title}</i>")))
        if is_hidden:
            rows.append(b"(%d,'hiddencat','',NULL)" % page)
        if kind == Kind.ARTICLE:
            rows.append(b"(%d,'page_image_free',%b,NULL)" % (page, key(f"{title}.jpg")))
        if place >= Known.PAGE_PROPS:
            rows.append(b"(%d,'wikibase_item','Q%d',NULL)" % (page, item))
    return rows


def _category_links(world: World, language: str, numbers, kinds, page_ids, schema: str) -> list[bytes]:
    lists = world.category_lists(language, numbers, kinds)
    names = iter(world.category_titles(language, list(itertools.chain.from_iterable(lists))))
    rows = []
    columns = zip(page_ids, kinds.tolist(), world.titles(language, numbers), lists, strict=True)
    for page, kind, title, categories in columns:
        # As a collation makes them: bytes, and no UTF-8.
        sort_key = quoted(title.upper().encode()[:40].translate(_SORT_KEY))
        member = b"subcat" if kind == Kind.CATEGORY else b"page"
        when = _time(page * 40503, " ", "").encode()
        for category in categories:
            name, target = key(next(names)), _target(category)
            if schema == "new":
                row = b"(%d,%b,'%b','','%b',1,%d)" % (page, sort_key, when, member, target)
            elif schema == "transitional":
                row = b"(%d,%b,%b,'%b','','uca-default','%b',1,%d)" % (page, name, sort_key, when, member, target)
            else:
                row = b"(%d,%b,%b,'%b','','uca-default','%b')" % (page, name, sort_key, when, member)
            rows.append(row)
    return rows


def _lang_links(world: World, language: str, numbers, kinds, page_ids, schema: str) -> list[bytes]:
    linked = world.known(language, numbers, kinds) >= Known.SITELINKS
    linked &= (kinds != Kind.TWICE) & (numbers < 2 * world.items + world.shared)
    numbers, is_category = numbers[linked], kinds[linked] == Kind.CATEGORY
    page_ids = list(itertools.compress(page_ids, linked))
    links: list[list[bytes]] = [[] for _ in page_ids]
    for other in sorted(world.languages):
        kinds = world.kinds(other, numbers)
        there = (other != language) & (world.known(other, numbers, kinds) >= Known.SITELINKS)
        spaces = [f"{LANGUAGES[other].category}:" if c else "" for c in is_category[there].tolist()]
        titles = world.titles(other, numbers[there])
        for place, space, title in zip(np.nonzero(there)[0].tolist(), spaces, titles, strict=True):
            links[place].append(b"(%d,'%b',%b)" % (page_ids[place], other.encode(), quoted(space + title)))
    return list(itertools.chain.from_iterable(links))


_ROWS = {"page": _page, "page_props": _page_props, "categorylinks": _category_links, "langlinks": _lang_links}


def _target(category: int) -> int:
    """The id in linktarget; the odd ones are of other namespaces."""
    return 1000 + 2 * category


def _link_targets(world: World, language: str) -> Iterator[list[bytes]]:
    for start in range(0, world.categories, BLOCK):
        categories = np.arange(start, min(start + BLOCK, world.categories))
        others = [title.replace(" ", "_") for title in world.titles(language, categories % world.items)]
        titles = world.category_titles(language, categories)
        exist = world.category_exists(language, categories).tolist()
        rows = []
        for category, title, other, there in zip(categories.tolist(), titles, others, exist, strict=True):
            if there:
                rows.append(b"(%d,14,%b)" % (_target(category), key(title)))
            rows.append(b"(%d,%d,%b)" % (_target(category) + 1, 10 * (category % 2), key(other)))
        yield rows


def _sitelinks(world: World) -> Iterator[list[bytes]]:
    """Rows of all items, then of all categories' items: each has one page a wiki."""
    row = itertools.count(55)
    for start in range(0, world.items, BLOCK):
        yield from _sitelinks_of(world, np.arange(start, min(start + BLOCK, world.items)), row)
    for start in range(0, world.shared + world.own, BLOCK):
        yield from _sitelinks_of(world, 2 * world.items + np.arange(start, min(start + BLOCK, world.shared + world.own)), row)  # fmt: skip


def _sitelinks_of(world: World, numbers: np.ndarray, row: Iterator[int]) -> Iterator[list[bytes]]:
    for language in world.languages:
        kinds = world.kinds(language, numbers)
        there = world.known(language, numbers, kinds) >= Known.SITELINKS
        items = world.item_ids(language, numbers, kinds)[there].tolist()
        spaces = [f"{LANGUAGES[language].category}:" if k == Kind.CATEGORY else "" for k in kinds[there].tolist()]
        titles = world.titles(language, numbers[there])
        yield [
            b"(%d,%d,'%bwiki',%b)" % (next(row), item, language.encode(), quoted(space + title))
            for item, space, title in zip(items, spaces, titles, strict=True)
        ]


# --- generate

_WORLD: list[World] = []  # set before processes are forked


def _write(task: Task) -> tuple[str, Counter]:
    return task.language, (write_table if task.table else write_content)(_WORLD[0], task)


def generate(out: Path, pages: int, languages: Sequence[str], seed: int) -> None:
    unknown = sorted(set(languages) - set(LANGUAGES))
    if unknown or not 1 < len(languages) == len(set(languages)):
        raise InputError(f"--languages needs two or more of {', '.join(LANGUAGES)}, each once")
    if seed < 0:
        raise InputError(f"--seed is {seed}; it must not be negative")
    world = World(seed, pages, languages)
    _WORLD[:] = [world]
    for language in languages:
        words_of(language)
    present = world.exists(np.arange(min(world.items, 20_000))).mean(axis=0) * world.items
    start = time.perf_counter()
    counts: dict[str, Counter] = {language: Counter() for language in (*languages, "")}
    with output_folder(out) as folder:
        tasks = [Task(folder, "", "wb_items_per_site")]
        tasks += [Task(folder, language, table) for table in TABLES for language in languages]
        (folder / "wikidatawiki" / SQL_DATE).mkdir(parents=True)
        for language, expected in zip(languages, present.tolist(), strict=True):
            (folder / f"{language}wiki" / SQL_DATE).mkdir(parents=True)
            base = folder / CIRRUS_DATE / f"index_name={language}wiki_content"
            base.mkdir(parents=True)
            (base / "_SUCCESS").touch()
            parts = max(2, round(expected / PART_PAGES))
            tasks += [Task(folder, language, "", part, parts) for part in range(parts)]
        processes = multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)))
        with progress(total=pages, desc="generate", unit="page") as bar, processes as pool:
            for language, found in pool.imap_unordered(_write, tasks):
                counts[language] += found
                bar.update(found["pages"])
    seconds = time.perf_counter() - start
    rows = [("wiki", "pages", "characters", "text", "wikitext", "bytes a page", "bz2", "ratio")]
    for language in languages:
        c = counts[language]
        rows.append((
            f"{language}wiki", f"{c['pages']:,}", f"{c['characters'] / max(1, c['pages with text']):,.0f}",
            f"{c['text bytes'] / c['bytes']:.1%}", f"{c['source bytes'] / c['bytes']:.1%}",
            f"{c['bytes'] / c['pages']:,.0f}", f"{c['compressed bytes'] / c['pages']:,.0f}", f"{c['bytes'] / c['compressed bytes']:.1f}",
        ))  # fmt: skip
    print(markdown(rows))
    total = sum(counts.values(), Counter())
    print("\nkinds: " + "  ".join(f"{kind.name.lower()} {total[kind.name.lower()]:,}" for kind in Kind if 0 < kind < Kind.CATEGORY))  # fmt: skip
    print(
        f"{total['pages']:,} pages: {total['compressed bytes'] / 1e6:,.1f} MB of content, {total['sql bytes'] / 1e6:,.1f} MB of "
        f"SQL dumps; {seconds:.1f} s, {total['pages'] / seconds:,.0f} pages/s; written to {out}"
    )


# --- run

SAMPLE_DOCUMENTS = 10_000
VOCABULARY = 24_000
WIKIPEDIA_PAGES = 70_100_000
ENWIKI_BYTES = 39e9
SOURCES = """\
70.1 million pages are the sitelinks of Wikidata to the Wikipedias of the 50 largest languages (wb_items_per_site), and
39 GB the 64 content files of enwiki: both as others report them of the dumps of autumn 2026."""
_STEP = re.compile(r"^step \S+: .*", re.MULTILINE)


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        cpu: seconds of all its processes.
        peak: bytes of memory of all its processes together, sampled; pages that they share count once.
        units, read: pages or documents, and compressed bytes, that it was given.
        workers: processes it was told to use, 0 if it cannot be told.
    """

    name: str
    wall: float
    cpu: float
    peak: int
    units: int
    read: int
    workers: int
    steps: list[str]


def measure(name: str, command: Sequence[str | Path], log: Path) -> tuple[float, float, int]:
    """Run a command, its output into `log`; returns (wall seconds, CPU seconds, peak memory).

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    print(f"{name}: {' '.join(map(str, command))}", file=sys.stderr)
    peak = 0
    start = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT)
        while True:
            # CPU time of a tree is known to the system when its processes have ended, however short they lived.
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            peak = max(peak, _tree_memory(process.pid))
            time.sleep(0.2)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [str(part) for part in command])
    return wall, usage.ru_utime + usage.ru_stime, peak


def _tree_memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            # A process may end between two lines, and that of another user hides its page tables.
            with contextlib.suppress(psutil.NoSuchProcess):
                try:
                    total += process.memory_full_info().pss
                except psutil.AccessDenied:
                    total += process.memory_info().rss
    return total


def _takes_workers(*command: str) -> bool:
    told = subprocess.run([sys.executable, TOOLS / command[0], *command[1:], "--help"], capture_output=True, text=True)
    return "--workers" in told.stdout


def run(dumps: Path, languages: Sequence[str], out: Path, workers: int) -> int:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: remove it or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    inputs = _dump_files(dumps, languages)
    documents, tokenizer = out / "documents", out / "tokenizer"
    stages: list[Measured] = []

    def stage(tool: str, arguments: list, count: Callable[[], int], files: Sequence[Path], source: str = "") -> None:
        told = workers if _takes_workers(tool, *[source] * bool(source)) else 0
        command = [TOOLS / tool, *[source] * bool(source), *arguments, *(["--workers", str(told)] if told else [])]
        log = out / f"{Path(tool).stem}.log"
        wall, cpu, peak = measure(Path(tool).stem, command, log)
        steps = _STEP.findall(log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n"))
        read = sum(path.stat().st_size for path in files)
        stages.append(Measured(Path(tool).stem, wall, cpu, peak, count(), read, told, steps))

    def pages() -> int:
        report = json.loads((documents / "report.json").read_text(encoding="utf-8"))
        return sum(counts["pages"] for counts in report["filters"].values())

    try:
        asked = ["--dumps", dumps, "--languages", ",".join(languages), "--out", documents]
        stage("build_documents.py", asked, pages, inputs, "wikipedia")
        train, sample = documents / "train.jsonl.gz", out / "sample.jsonl.gz"
        kept, sampled, text_bytes = _count_and_sample(train, sample)
        asked = ["--documents", sample, "--vocabulary", str(VOCABULARY), "--out", tokenizer]
        stage("train_tokenizer.py", asked, lambda: sampled, [sample])
        asked = ["--documents", train, "--tokenizer", tokenizer, "--out", out / "shards", "--format", "mds"]
        stage("build_shards.py", asked, lambda: kept, [train])
    except subprocess.CalledProcessError as error:
        log = out / f"{Path(error.cmd[0]).stem}.log"
        print(
            f"{log.read_text(encoding='utf-8', errors='replace')}\n{log.stem} ended with exit code {error.returncode}"
        )
        return FAILED
    shards = sum(path.stat().st_size for path in (out / "shards").rglob("*") if path.is_file())
    closing = f"{kept:,} training documents with {text_bytes / 1e6:,.1f} MB of text; {shards / 1e6:,.1f} MB of shards"
    text = report_text(stages, sum(path.stat().st_size for path in inputs if "_content-" in path.name), closing)
    with output_file(out / "report.md") as file:
        file.write(text + "\n")
    print(text)
    return 0


def _dump_files(folder: Path, languages: Sequence[str]) -> list[Path]:
    dumps = find_dumps(folder)
    files = list(dumps.sql.get("wikidatawiki", {}).values())
    for wiki, parts in dumps.wikis.items():
        with contextlib.suppress(InputError):
            if language_of(wiki) in languages:
                files += [*parts, *dumps.sql.get(wiki, {}).values()]
    return files


def _count_and_sample(train: Path, sample: Path) -> tuple[int, int, int]:
    """(documents, documents of the sample, bytes of text) of `train`; writes its first documents to `sample`.

    The documents of a bucket are in no order of topic, so the first are as good as any.
    """
    documents = sampled = text_bytes = 0
    with gzip.open(train, "rb") as lines, gzip.open(sample, "wb", 6) as out:
        for line in progress(lines, desc="count", unit="document"):
            record = json.loads(line)
            documents += 1
            text_bytes += len("".join(record.get("sentences", [])).encode()) + len(record.get("text", "").encode())
            if sampled < SAMPLE_DOCUMENTS:
                sampled += 1
                out.write(line)
    return documents, sampled, text_bytes


def report_text(stages: Sequence[Measured], content: int, closing: str) -> str:
    """What is printed; `content` are the bytes of the dumps without SQL."""
    rows = [("command", "wall s", "CPU s", "pages/s", "MB/s read", "peak MiB", "processes")]
    for s in stages:
        rows.append((
            s.name, f"{s.wall:,.1f}", f"{s.cpu:,.1f}", f"{s.units / s.wall:,.0f}", f"{s.read / s.wall / 1e6:.2f}",
            f"{s.peak / 2**20:,.0f}", str(s.workers or 1),
        ))  # fmt: skip
    build, _, shards = stages
    factor = WIKIPEDIA_PAGES / build.units
    cores = (2, 64, 512)
    whole = [("all of Wikipedia", "CPU hours", "core hours", *(f"wall h on {n}" for n in cores))]
    for s, name, times in (
        (build, build.name, factor),
        (shards, shards.name, factor),
        (build, "build_documents of enwiki, by bytes", ENWIKI_BYTES / content),
    ):
        hours = s.wall * times / 3600
        # Cores that wait are paid for; a command of one process gains nothing by more.
        spread = [hours * s.workers / n if s.workers else hours for n in cores]
        whole.append((
            name, f"{s.cpu * times / 3600:,.0f}", f"{hours * (s.workers or 1):,.0f}", *(f"{value:,.2f}" for value in spread),
        ))  # fmt: skip
    lines = [f"{s.name}: {line}" for s in stages for line in s.steps]
    return "\n".join([
        markdown(rows),
        "",
        f"{machine()}.",
        f"{build.units:,} pages, {build.read / 1e6:,.1f} MB of dumps; {closing}.",
        f"Of train_tokenizer ({VOCABULARY:,} pieces) and build_shards, a page is a document. MB are of compressed files.",
        "",
        *lines,
        *[""] * bool(lines),
        markdown(whole),
        "",
        SOURCES,
        "Time is taken to grow with pages (in the last row with bytes) and, where a command has processes, to fall with",
        "cores, one process on each. The time of train_tokenizer is that of its sample, whatever the size of the corpus.",
    ])  # fmt: skip


def main() -> int | None:
    parser = argument_parser(
        __doc__.partition("\n")[0],
        "python tools/bench_corpus.py generate --pages 300000 --languages en,de,fr,ru,hi,ja --out build/dumps\n"
        "  python tools/bench_corpus.py run --dumps build/dumps --languages en,de,fr,ru,hi,ja --out build/bench",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("generate", help="write the dumps of made-up Wikipedias")
    making.add_argument("--pages", type=positive, required=True, help="of all wikis together, about")
    making.add_argument("--seed", type=int, default=0, help="another seed, other dumps (%(default)s)")
    running = actions.add_parser("run", help="measure the commands from dumps to shards")
    running.add_argument("--dumps", type=Path, required=True, metavar="DIR", help="generated ones, or real ones")
    running.add_argument("--workers", type=positive, default=2, help="processes of a command (%(default)s)")
    for action in (making, running):
        action.add_argument("--languages", required=True, help="comma-separated, such as en,de,ja")
        action.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    if args.action == "generate":
        return generate(args.out, args.pages, args.languages.split(","), args.seed)
    return run(args.dumps, args.languages.split(","), args.out, args.workers)


if __name__ == "__main__":
    run_command(main)
