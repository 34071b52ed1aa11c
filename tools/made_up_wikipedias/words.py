"""A made-up language's vocabulary and sentences, and what pages have beside their prose.

Owns the invented words under Zipf's law and the log-normal lengths of pages, with a mean of 1,300 characters, that of
simplewiki (a page of enwiki has about three times as many bytes).
"""

import functools
import itertools
import math
import random
import statistics
import zlib

import numpy as np

from made_up_wikipedias.languages import LANGUAGES, NUMBERS

MEAN_CHARACTERS, DEVIATION = 1300, 1.0


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
        numbers = [number.replace(",", "." if code in ("en", "ja", "hi") else ",") for number in NUMBERS]
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
