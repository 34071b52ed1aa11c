"""The CirrusSearch content of a wiki: its files, the records of its pages and their wikitext.

Owns the fields of a record and their share of its bytes.
"""

import bz2
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from wikipedia_dumps import CIRRUS_DATE

from made_up_wikipedias.languages import LANGUAGES
from made_up_wikipedias.task import Task, timestamp
from made_up_wikipedias.words import Words, words_of
from made_up_wikipedias.world import BLOCK, Kind, Known, World, hashed

BZ2_LEVEL = 9  # as published; blocks of level 1 unpack 1.45 times as fast, which would flatter the readers
_TOPICS = (
    "Culture.Media.Music Culture.Media.Films Culture.Biography.Biography* Culture.Sports Culture.Literature STEM.Space"
    " STEM.Biology STEM.STEM* STEM.Technology Geography.Regions.Europe.Europe* Geography.Regions.Asia.Asia*"
    " Geography.Geographical History_and_Society.History History_and_Society.Transportation"
).split()
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def content_folder(folder: Path, language: str) -> Path:
    return folder / CIRRUS_DATE / f"index_name={language}wiki_content"


def write_content(world: World, task: Task) -> Counter:
    """Write one part of a wiki's content; returns the number of pages of each kind, and of bytes and characters."""
    language, wiki = task.language, f"{task.language}wiki"
    counts: Counter = Counter()
    rng = np.random.default_rng([world.seed, zlib.crc32(wiki.encode()), task.part])
    compressor = bz2.BZ2Compressor(BZ2_LEVEL)
    base = content_folder(task.folder, language)
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
            "namespace_text": "Portal" if kind == Kind.PORTAL else "", "title": title, "timestamp": timestamp(draw, "T", "Z"),
            "create_timestamp": timestamp(draw >> 7, "T", "Z"), "version": 900_000_000 + draw % 2**28, "language": language,
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
