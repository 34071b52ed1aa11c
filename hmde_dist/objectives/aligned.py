"""Sentences of a pair's two documents that are translations of each other: those of equal places, where both have equally many.

Bitext is documents of one sentence. Whether there are any is a question to the data: every objective that needs them tells
their number in the journal, as `aligned`, and a step without any has a loss of 0.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hmde_dist.objectives.objective import Rows
from hmde_dist.stream.batch import PackedBatch


class Aligned(NamedTuple):
    """Sentences of a chunk that are translations of each other, by the pairs' first and second documents; [A] each."""

    first: np.ndarray  # int64 which of the chunk's sentences, in document order
    second: np.ndarray
    first_documents: np.ndarray  # int64 the documents they are of
    second_documents: np.ndarray
    places: np.ndarray  # int64 in their documents


def pairs_of(batch: PackedBatch) -> np.ndarray:
    """[2, P] which documents of a chunk are its pairs."""
    # All documents of a pair are in the chunk: by number, its first ones come first, then its second ones.
    return np.argsort(batch.facts.numbers).reshape(batch.facts.sides, -1)[:2]


def aligned_sentences(batch: PackedBatch) -> Aligned:
    """The sentences of equal places in two versions that have, whole, equally many; of other pairs none."""
    facts, counts = batch.facts, np.array(batch.sentence_counts, dtype=np.int64)
    x, y = pairs_of(batch)
    equal = facts.sentences[x] == facts.sentences[y]
    x, y = x[equal], y[equal]
    begins = np.maximum(facts.starts[x], facts.starts[y])  # of what is encoded of both
    ends = np.minimum((facts.starts + counts)[x], (facts.starts + counts)[y])
    sizes = np.maximum(ends - begins, 0)
    pair = np.repeat(np.arange(len(x)), sizes)
    places = np.arange(len(pair)) - (np.cumsum(sizes) - sizes - begins)[pair]
    x, y = x[pair], y[pair]
    rows = np.cumsum(counts) - counts - facts.starts
    return Aligned(rows[x] + places, rows[y] + places, x, y, places)


def aligned_rows(batch: PackedBatch, sentences_SW: Tensor) -> Rows:
    """The vectors of aligned sentences, x and y [A, W], with the group of their documents and their place there."""
    aligned = aligned_sentences(batch)
    known = [aligned.first, aligned.second, batch.facts.groups[aligned.first_documents], aligned.places]
    first, second, groups, places = (torch.from_numpy(fact).to(sentences_SW.device) for fact in known)
    return {"x": sentences_SW[first], "y": sentences_SW[second], "group": groups, "place": places}


def scored(vectors: Tensor, temperature: float | None) -> Tensor:
    """Vectors whose products are the scores: of a temperature cosines over it, else raw products."""
    return vectors if temperature is None else F.normalize(vectors, dim=-1) / temperature**0.5
