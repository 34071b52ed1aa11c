"""Which pages of one wiki are left out because of another page of it: second pages of an item, exact and near
duplicates, and what is above the cap of a bot-written wiki.

A page is described by one row (`PAGE`) and a MinHash signature. Near duplicates are pairs that agree in one band of
their signatures and in `THRESHOLD` of all its places, an estimate of the Jaccard similarity of their character n-grams
(Broder 1997; one permutation with densification after Shrivastava and Li 2014). Of each set of alike pages the one with
the lowest page id stays. Nothing here depends on the order of the pages.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PAGE = np.dtype([("page", "<u8"), ("item", "<u8"), ("exact", "<u8")])
REASONS = ("item_twice", "exact_duplicate", "near_duplicate", "over_cap")
PLACES, BANDS = 64, 8
NGRAM = 6
THRESHOLD = 0.8
_CHUNK = 1 << 16

_BASE = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.array([pow(int(_BASE), k, 1 << 64) for k in range(NGRAM)], dtype=np.uint64)


def describe(page: int, item: str, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The `PAGE` row [1] and the signature [PLACES] uint32 of a page; case and digits do not count.

    Args:
        item: "Q" and a number.
    """
    text = " ".join(sentences).lower()
    exact = hashlib.blake2b(text.encode(), digest_size=8).digest()
    row = np.array([(page, int(item[1:]), int.from_bytes(exact, "little"))], dtype=PAGE)
    return row, signature(text)


def signature(text: str) -> np.ndarray:
    """[PLACES] uint32: the smallest hash of the character n-grams that fall to each place."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    # Bot-written pages differ in their numbers.
    codes[(codes >= ord("0")) & (codes <= ord("9"))] = ord("0")
    if len(codes) < NGRAM:
        codes = np.pad(codes, (0, NGRAM - len(codes)))
    hashes = np.zeros(len(codes) - NGRAM + 1, dtype=np.uint64)
    for k, power in enumerate(_POWERS):
        hashes += codes[k : k + len(hashes)] * power
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    # A place is the low bits of a hash, its rank the high ones; 2**32 marks an empty place.
    smallest = np.full(PLACES, 1 << 32, dtype=np.uint64)
    np.minimum.at(smallest, (hashes & np.uint64(PLACES - 1)).astype(np.int64), hashes >> np.uint64(32))
    filled = np.flatnonzero(smallest < 1 << 32)
    if len(filled) < PLACES:
        # An empty place takes what the next filled one holds, changed by the distance.
        nearest = filled[np.searchsorted(filled, np.arange(PLACES)) % len(filled)]
        distance = ((nearest - np.arange(PLACES)) % PLACES).astype(np.uint64)
        smallest = smallest[nearest] + distance * np.uint64(0x9E3779B1)
    return smallest.astype(np.uint32)


def choose_left_out(folder: Path, parts: Sequence[Path], cap: int | None) -> dict[str, int]:
    """Step: `left_out.npy`, the sorted page ids of one wiki that are left out; returns their number for each reason.

    Takes memory for the rows and one band of the wiki; the signatures stay on disk.

    Args:
        parts: folders with `pages.bin` (rows of `PAGE`) and `signatures.bin` (rows of [PLACES] uint32).
        cap: most pages that are kept, those of the items with the smallest hashes; none = no cap.
    """
    pages = np.concatenate([np.fromfile(part / "pages.bin", dtype=PAGE) for part in parts])
    # One file for all parts, so that rows can be read anywhere in it.
    signatures = np.lib.format.open_memmap(
        folder / "signatures.npy", "w+", dtype=np.uint32, shape=(max(1, len(pages)), PLACES)
    )
    first = 0
    for part in parts:
        mine = np.fromfile(part / "signatures.bin", dtype="<u4").reshape(-1, PLACES)
        signatures[first : first + len(mine)] = mine
        first += len(mine)
    kept = np.ones(len(pages), dtype=bool)
    counts = {}
    counts["item_twice"] = _drop(kept, _repeats(pages["item"], pages["page"], kept))
    counts["exact_duplicate"] = _drop(kept, _repeats(pages["exact"], pages["page"], kept))
    counts["near_duplicate"] = 0
    for band in range(BANDS):
        counts["near_duplicate"] += _drop(kept, _near(signatures, band, pages["page"], kept))
    counts["over_cap"] = 0
    if cap is not None and kept.sum() > cap:
        # By a hash of the item, so that capped wikis keep the same items.
        rank = pages["item"] * _BASE
        rank ^= rank >> np.uint64(32)
        order = np.flatnonzero(kept)
        order = order[np.lexsort((pages["page"][order], rank[order]))]
        counts["over_cap"] = _drop(kept, order[cap:])
    # A page that the dumps hold twice is kept once.
    np.save(folder / "left_out.npy", np.setdiff1d(pages["page"][~kept], pages["page"][kept]))
    del signatures
    (folder / "signatures.npy").unlink()
    return counts


def _drop(kept: np.ndarray, rows: np.ndarray) -> int:
    kept[rows] = False
    return len(rows)


def _first_of_runs(values: np.ndarray, pages: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, first) for the kept rows whose value another kept row with a lower page id has; `first` is the lowest."""
    rows = np.flatnonzero(kept)
    rows = rows[np.lexsort((pages[rows], values[rows]))]
    if not len(rows):
        return rows, rows
    starts = np.r_[True, values[rows][1:] != values[rows][:-1]]
    firsts = rows[starts][np.cumsum(starts) - 1]
    return rows[~starts], firsts[~starts]


def _repeats(values: np.ndarray, pages: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return _first_of_runs(values, pages, kept)[0]


def _near(signatures: np.ndarray, band: int, pages: np.ndarray, kept: np.ndarray) -> np.ndarray:
    width = PLACES // BANDS
    values = np.zeros(len(pages), dtype=np.uint64)
    for start in range(0, len(pages), _CHUNK):
        for column in signatures[start : start + _CHUNK, band * width : (band + 1) * width].T:
            values[start : start + _CHUNK] = (values[start : start + _CHUNK] ^ column) * _BASE
    rows, firsts = _first_of_runs(values, pages, kept)
    near = np.zeros(len(rows), dtype=bool)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        agreement = (signatures[rows[part]] == signatures[firsts[part]]).mean(axis=1)
        near[part] = agreement >= THRESHOLD
    return rows[near]
