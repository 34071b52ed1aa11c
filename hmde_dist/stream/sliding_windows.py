"""Another way to cut a document than at its sentences: windows of a fixed number of tokens over its whole token stream.

Neighbouring windows share tokens where the stride is shorter than the window. What is called a sentence everywhere behind
this file (`PackedBatch.sentence_counts`, `data.sentences`, ...) then is a window. Everything here is a function of the number
of tokens, so an index knows the windows of a document that was never read. The file travels inside exported models.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SlidingWindows:
    """Windows of `window` tokens, each beginning `stride` tokens behind the one before; the last one may be shorter.

    The last window is the first that reaches the end, so it holds a token that no other has; a document that is shorter
    than the window is one window, an empty one none.
    """

    window: int
    stride: int

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Windows of documents of so many tokens, int64."""
        tokens = np.asarray(tokens, dtype=np.int64)
        more = -(-np.maximum(tokens - self.window, 0) // self.stride)
        return np.where(tokens > 0, 1 + more, 0)

    def size(self, tokens: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """Tokens of the first `windows` windows together (at most all of them); what two share counts twice."""
        tokens, count = np.asarray(tokens, dtype=np.int64), self.count(tokens)
        last = tokens - (count - 1) * self.stride
        return np.where(windows < count, windows * self.window, (count - 1) * self.window + last) * (count > 0)

    def reach(self, windows: int) -> int:
        """Tokens from the beginning of a document that `windows` windows read."""
        return self.window + (windows - 1) * self.stride

    def cut(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all windows of a document, one window behind the other, and their lengths."""
        begins = np.arange(self.count(len(ids))) * self.stride
        lengths = np.minimum(self.window, len(ids) - begins)
        first = np.cumsum(lengths) - lengths
        return ids[np.arange(lengths.sum()) + np.repeat(begins - first, lengths)], lengths


def cut(document: tuple[np.ndarray, np.ndarray], windows: SlidingWindows | None) -> tuple[np.ndarray, np.ndarray]:
    """A document, its tokens and the lengths of its sentences, in segments: of windows, or as it is."""
    return document if windows is None else windows.cut(document[0])
