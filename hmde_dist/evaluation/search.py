"""Search in an index that `evaluation.index` built: nearest documents by inner product, exact scores, their facts.

Index, vectors and facts stay on disk; pages that searches touch are the only memory that grows, and the system takes
them back where it needs to. Where an index holds codes, its candidates are ranked again by the vectors themselves.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError
from hmde_dist.stream.vectors import Facts, Vectors

NEIGHBOURS = 10  # that recall is measured with
VISITS = 1 << 12  # of queries to lists in one call: FAISS holds tables of some 10 KiB for each


def merge_top(parts: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` highest of the (scores [Q, k_i], numbers [Q, k_i]) of each part, best first; among equals the lowest number.

    Higher is better: what merges distances puts inner products worst first.
    """
    scores, numbers = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    order = np.lexsort((numbers, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(numbers, order, axis=1)


@contextlib.contextmanager
def chatter_to_stderr() -> Iterator[None]:
    """What the C++ code of the block prints goes to stderr: stdout is for results."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def read_index(folder: Path):
    """The FAISS index of a folder, mapped."""
    import faiss

    path = folder / "index.faiss"
    if not path.is_file():
        raise InputError(f"{folder}: no index (index.faiss is missing); make one with tools/build_index.py")
    if (folder / "index.ivfdata").exists():
        # Not with IO_FLAG_MMAP: FAISS 1.15 then crashes in the search.
        with chatter_to_stderr():
            return faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def is_exact(index) -> bool:
    """Whether the scores of an index are those of the vectors, not of codes."""
    import faiss

    return isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat))


class DocumentIndex:
    """The documents of an index folder.

    Attributes:
        effort: inverted lists that a search looks into (`nprobe`), or the breadth of a search in a graph (`efSearch`).
        vectors, facts: of the documents, by number.

    Raises:
        InputError: no index, or one with files missing.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self._index = read_index(folder)
        self.vectors = Vectors(folder)
        manifest = self.vectors.manifest
        self.facts = Facts(folder, manifest["languages"])
        if not len(self.vectors) == len(self.facts) == self._index.ntotal:
            raise InputError(
                f"{folder}: {self._index.ntotal} entries, {len(self.vectors)} vectors, {len(self.facts)} documents: "
                "build the index again"
            )
        self.model, self.width = manifest["model"], self.vectors.width
        self.effort, self._rerank = manifest["effort"], manifest["rerank"]
        self._truncated = any("truncate" in note for note in manifest.get("processed", []))
        self._selectors: dict = {}

    def efforts(self) -> Iterator[int]:
        """What `effort` can be, from little to the most that is of use."""
        import faiss

        inverted, effort, most = faiss.try_extract_index_ivf(self._index), 1, 1
        if inverted:
            most = inverted.nlist
        elif isinstance(self._index, faiss.IndexHNSW):
            effort, most = 16, 1024
        while effort < most:
            yield effort
            effort *= 2
        yield most

    def search(self, queries: np.ndarray, k: int, languages: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest documents of each query vector: scores [Q, k] and numbers [Q, k], -1 where there are no more.

        Args:
            queries: [Q, W] vectors, of any length: scores are cosines. Of wider ones an index of truncated vectors takes
                the first coordinates.
            languages: only documents in these; () = all.

        Raises:
            InputError: queries of another width, or a language that no document is in.
        """
        if self._truncated:
            queries = queries[:, : self.width]
        if queries.shape[1] != self.width:
            raise InputError(
                f"the index holds vectors of width {self.width}, the model makes {queries.shape[1]}: not its index"
            )
        queries = np.asarray(queries, dtype=np.float32)
        queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
        # For few results as many candidates as for those that recall was measured with.
        wanted = min((max(k, NEIGHBOURS) if self._rerank > 1 else k) * self._rerank, len(self.vectors))
        at_once = max(1, VISITS // self.effort)
        calls = [
            self._candidates(queries[first : first + at_once], wanted, tuple(languages))
            for first in range(0, len(queries), at_once)
        ]
        scores, numbers = (np.concatenate(arrays) for arrays in zip(*calls, strict=True))
        if self._rerank > 1:
            for query, of_query, candidates in zip(queries, scores, numbers, strict=True):
                of_query[:] = -np.inf
                of_query[candidates >= 0] = self.vectors.take(candidates[candidates >= 0]) @ query
        scores, numbers = merge_top([(scores, numbers)], min(k, len(self.vectors)))
        return scores, numbers

    def results(self, queries: np.ndarray, k: int, languages: Sequence[str] = ()) -> list[list[dict]]:
        """As `search`, as records: rank, score, id, lang, title."""
        return [
            [
                {"rank": rank, "score": round(float(score), 6), **self.facts[number]}
                for rank, (score, number) in enumerate(zip(scores, numbers, strict=True), start=1)
                if number >= 0
            ]
            for scores, numbers in zip(*self.search(queries, k, languages), strict=True)
        ]

    def _candidates(
        self, queries: np.ndarray, wanted: int, languages: tuple[str, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and numbers [Q, wanted] that FAISS finds."""
        parameters = self._parameters(languages)
        try:
            return self._index.search(queries, wanted, params=parameters)
        except RuntimeError:
            if not languages:
                raise
            kind = self.vectors.manifest["factory"]
            raise InputError(f"an index of the kind {kind} cannot search in chosen languages; build another") from None

    def _parameters(self, languages: tuple[str, ...]):
        """What FAISS calls the parameters of a search."""
        import faiss

        selector = {"sel": self._selector(languages)} if languages else {}
        if faiss.try_extract_index_ivf(self._index):
            parameters = faiss.SearchParametersIVF(nprobe=self.effort, **selector)
        elif isinstance(self._index, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(efSearch=self.effort, **selector)
        else:
            parameters = faiss.SearchParameters(**selector) if languages else None
        if parameters and isinstance(self._index, faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        return parameters

    def _selector(self, languages: tuple[str, ...]):
        """One bit for each document: whether it is in one of the languages."""
        import faiss

        names = self.facts.language_names
        unknown = [language for language in languages if language not in names]
        if unknown:
            raise InputError(f'no document is in "{unknown[0]}"; there are: {", ".join(names)}')
        if languages not in self._selectors:
            chosen = np.isin(self.facts.languages, [names.index(language) for language in languages])
            self._selectors[languages] = faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        return self._selectors[languages]
