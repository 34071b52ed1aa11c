"""A teacher's vectors of the documents of a batch, looked up by id and language, which samples hold.

The teacher is a folder of document vectors (see `stream.vectors`), made by any model, of any tokenizer. Of its facts a
64-bit hash of id and language is kept for every document, 16 bytes with its row: two documents of a hundred million share
one with a probability below 0.03 %. Documents that it has no vector of are rows of NaN.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, progress
from hmde_dist.stream.vectors import Vectors


class Teacher:
    """`teacher.vectors(ids, languages)`. Safe to use in forked workers, which share its table.

    Raises:
        InputError: no folder of document vectors.
    """

    def __init__(self, folder: str | Path):
        self._vectors = Vectors(folder)
        if self._vectors.manifest.get("output") != "document":
            raise InputError(f"{folder}: not vectors of documents; make them with tools/encode.py --output document")
        path = self._vectors.folder / "documents.jsonl"
        keys = np.empty(len(self._vectors), dtype=np.uint64)
        try:
            with open(path, "rb") as lines:
                for row, line in enumerate(progress(lines, total=len(keys), desc="teacher", unit="document")):
                    facts = json.loads(line)
                    keys[row] = _key(facts["id"], facts["lang"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path}: missing or damaged ({error}); copy or encode the folder again") from None
        self._rows = np.argsort(keys, kind="stable")
        self._keys = keys[self._rows]

    @property
    def identity(self) -> dict:
        """What a run that goes on must find again: the model that made the vectors, and how many there are."""
        facts = self._vectors.manifest
        return {name: facts.get(name) for name in ("model", "processed", "documents", "width")}

    @property
    def width(self) -> int:
        return self._vectors.width

    def vectors(self, ids: Sequence[str], languages: Sequence[str]) -> np.ndarray:
        """[n, width] fp32, NaN where the teacher has no vector of a document."""
        wanted = np.array([_key(*one) for one in zip(ids, languages, strict=True)], dtype=np.uint64)
        found = np.full((len(wanted), self.width), np.nan, dtype=np.float32)
        places = np.searchsorted(self._keys, wanted)
        known = np.flatnonzero(places < len(self._keys))
        known = known[self._keys[places[known]] == wanted[known]]
        found[known] = self._vectors.take(self._rows[places[known]])
        return found


def _key(id_: str, language: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{language}\0{id_}".encode(), digest_size=8).digest(), "little")
