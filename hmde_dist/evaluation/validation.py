"""Validation while training: retrieval and bias on a validation shard set, encoded by all ranks together.

The measures are those of `evaluation.retrieval` and `evaluation.bias`, over documents as the shards hold them, sentences
being token ids.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hmde_dist.command import progress
from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.bias import Groups, language_bias, position_bias
from hmde_dist.evaluation.retrieval import Candidates, cosine_scorer, language_pairs, macro, retrieval
from hmde_dist.objectives.gather import gather
from hmde_dist.stream.batch import pack
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.loader import packing_settings
from hmde_dist.stream.reader import GroupReader
from hmde_dist.stream.sliding_windows import SlidingWindows, cut
from hmde_dist.topology import World

DOCUMENTS_PER_CALL = 64
BIAS_DOCUMENTS = 1000  # that each of the bias measures looks at, about
PROJECTED = 400  # vectors in TensorBoard's projector, about

# Token ids (flat) and the token counts of the sentences of a document.
Tokens = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Validation:
    """What a validation found, the same on every rank.

    Attributes:
        scores: means over language pairs of the retrieval metrics; over languages of `position_bias` (change of the cosine
            with a segment per place of the segment) and `language_bias` (share of the query's own language among the
            nearest in a mixed pool, beyond chance); `language_gap` (of MRR@10 between languages of the answer). A bias
            that the documents are too few to measure is left out.
        vectors, labels: [n, W] of some of the documents, all versions of a group or none, and id, language and category.
    """

    scores: dict[str, float]
    vectors: np.ndarray
    labels: list[tuple[str, str, str]]


class Interrupted(Exception):
    """The run is to stop, on all ranks."""


@torch.no_grad()
def validate(
    engine,
    index: ShardIndex,
    sentences: int,
    world: World,
    interrupted: Callable[[], bool] = lambda: False,
    windows: SlidingWindows | None = None,
) -> Validation | None:
    """Retrieval over all documents of `index`, bias over some of them; none if it was interrupted. A collective.

    Args:
        sentences: segments of a document that are encoded.
        interrupted: asked before every call, on all ranks; ends the validation if true.
        windows: what a document is cut into; none = its sentences.
    """
    first = index.columns["group_documents"].astype(np.int64)
    group_of = np.repeat(np.arange(index.groups), np.diff(first))
    languages = [index.languages[number] for number in index.columns["document_language"]]
    reader, settings = GroupReader(index), packing_settings(index, sentences)

    def read(number: int) -> Tokens:
        return reader[int(group_of[number])].document(int(number - first[group_of[number]]))

    def encode(sizes: np.ndarray, read: Callable[[int], Tokens], what: str) -> np.ndarray:
        """Vectors of the documents `read(0)`, `read(1)`, ...; `sizes` are their numbers of segments.

        Every rank encodes the same number of documents (some twice, at the end), so ranks never wait for one another's
        missing calls.
        """
        # Neighbours in length share a call; ranks take turns.
        order = np.argsort(sizes, kind="stable")
        share = -(-len(order) // world.size)
        mine = order[(np.arange(share) * world.size + world.rank) % len(order)]
        vectors = []
        blocks = range(0, share, DOCUMENTS_PER_CALL)
        for start in progress(blocks, desc=what, unit="call", leave=False, disable=not world.is_first):
            if interrupted():
                raise Interrupted
            documents = [cut(read(int(number)), windows) for number in mine[start : start + DOCUMENTS_PER_CALL]]
            vectors.append(engine(pack(documents, **settings).to(world.device)))
        gathered = gather(torch.cat(vectors)).cpu().numpy()
        by_number = np.empty((len(order), gathered.shape[1]), dtype=np.float32)
        by_number[gather(torch.from_numpy(mine).to(world.device)).cpu().numpy()] = gathered
        return by_number

    def encode_documents(documents: Sequence[Document]) -> np.ndarray:
        """An encoder as `evaluation.bias` wants it, for documents of token ids."""
        read_ = [(np.concatenate(d.sentences), np.array([len(s) for s in d.sentences])) for d in documents]
        sizes = [len(cut(document, windows)[1]) for document in read_]
        return encode(np.array(sizes), read_.__getitem__, "validate: position")

    def retrieve(candidates: Candidates, vectors: np.ndarray) -> dict[str, dict[str, float]]:
        """`retrieval` of all pairs; ranks take turns."""
        pairs, score, found = language_pairs(candidates), cosine_scorer(vectors), {}
        for first in range(0, len(pairs), world.size):
            if interrupted():
                raise Interrupted
            found |= retrieval(candidates, score, pairs[first + world.rank : first + world.rank + 1])
        for theirs in world.gather(found):
            found |= theirs
        return {name: found[name] for pair in pairs if (name := "-".join(pair)) in found}

    engine.eval()
    try:
        vectors = encode(index.segments(windows), read, "validate")
        candidates = Candidates([str(group) for group in group_of], languages)
        scores = macro(retrieve(candidates, vectors))
        del scores["queries"]
        slopes = list(_slopes(index, read, sentences, windows, encode_documents))
    except Interrupted:
        return None
    finally:
        engine.train()
    if slopes:
        scores["position_bias"] = float(np.mean(slopes))
    some = _some(index, BIAS_DOCUMENTS)
    chosen = np.flatnonzero(np.isin(group_of, some))
    # One rank does it for all: it takes a while, and they must not differ.
    shown = {}
    if world.is_first:
        documents = [Document(id=str(group_of[number]), lang=languages[number]) for number in chosen]
        found = language_bias(documents, lambda _: vectors[chosen])["macro"]
        shown = {"language_bias": found["same_language"], "language_gap": found["gap"]}
    scores |= json.loads(world.messages(json.dumps(shown) if shown else "")[0])
    projected = np.flatnonzero(np.isin(group_of, _some(index, PROJECTED)))
    names = index.manifest["clusters"]
    labels = [
        (
            reader[int(group_of[number])].id if world.is_first else "",
            languages[number],
            names[int(index.columns["group_cluster"][group_of[number]])],
        )
        for number in projected
    ]
    return Validation(scores, vectors[projected], labels)


def best_so_far(best: dict, metric: str | None, step: int, scores: dict[str, float]) -> dict:
    """What `best` of a run's state is after a validation: `step`, and the `metric` and `value` that chose it.

    Step 0 is none. Of equals the first stays; what another metric chose does not count.
    """
    if metric is None or (best.get("metric") == metric and best["value"] >= scores[metric]):
        return best
    return {"step": step, "metric": metric, "value": scores[metric]}


def _some(index: ShardIndex, documents: int) -> np.ndarray:
    """Groups of two languages or more, evenly over the set, that together have about so many documents."""
    versions = np.diff(index.columns["group_documents"].astype(np.int64))
    groups = np.flatnonzero(versions > 1)
    count = min(len(groups), max(1, int(documents / versions[groups].mean())))
    return groups[np.linspace(0, len(groups) - 1, count).round().astype(np.int64)]


def _slopes(
    index: ShardIndex,
    read: Callable[[int], Tokens],
    sentences: int,
    windows: SlidingWindows | None,
    encode: Callable[[Sequence[Document]], np.ndarray],
) -> Iterator[float]:
    """`position_bias` within each language that has enough documents; across languages would be many more to encode."""
    spoken = index.columns["document_language"]
    # Places in a document, and how many a sentence takes of them: one, or its tokens.
    room = (sentences,) if windows is None else (windows.reach(sentences), lambda texts: [len(text) for text in texts])
    each = max(8, BIAS_DOCUMENTS // (2 * len(np.unique(spoken))))  # a document and its rotations: twice as many
    for language in np.unique(spoken):
        mine = np.flatnonzero(spoken == language)
        mine = mine[np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(np.int64)]
        groups: Groups = {}
        for number in mine:
            tokens, lengths = read(int(number))
            groups[str(number)] = {index.languages[language]: tuple(np.split(tokens, np.cumsum(lengths)[:-1]))}
        found = position_bias(groups, encode, *room)["macro"]
        if "slope" in found:
            yield found["slope"]
