"""Validation while training: cross-lingual retrieval on a validation shard set, encoded by all ranks together."""

from collections.abc import Callable

import numpy as np
import torch

from hmde_dist.command import progress
from hmde_dist.evaluation.retrieval import Candidates, cosine_scorer, language_pairs, macro, retrieval
from hmde_dist.objectives.gather import gather
from hmde_dist.stream.batch import pack
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.loader import packing_settings
from hmde_dist.stream.reader import GroupReader
from hmde_dist.topology import World

DOCUMENTS_PER_CALL = 64


@torch.no_grad()
def validate(
    engine, index: ShardIndex, sentences: int, world: World, interrupted: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Macro-averaged retrieval metrics over all documents of `index`; none if it was interrupted. A collective.

    Every rank encodes the same number of documents (some twice, at the end), so ranks never wait for one another's
    missing calls.

    Args:
        interrupted: asked before every call, on all ranks; ends the validation if true.
    """
    first = index.columns["group_documents"].astype(np.int64)
    group_of = np.repeat(np.arange(index.groups), np.diff(first))
    # Neighbours in length share a call; ranks take turns.
    order = np.argsort(index.columns["document_sentences"], kind="stable")
    share = -(-len(order) // world.size)
    mine = order[(np.arange(share) * world.size + world.rank) % len(order)]
    reader, settings = GroupReader(index), packing_settings(index, sentences)
    vectors = []
    engine.eval()
    blocks = range(0, share, DOCUMENTS_PER_CALL)
    for start in progress(blocks, desc="validate", unit="call", leave=False, disable=not world.is_first):
        if interrupted():
            engine.train()
            return None
        numbers = mine[start : start + DOCUMENTS_PER_CALL]
        documents = [reader[int(group_of[n])].document(int(n - first[group_of[n]])) for n in numbers]
        vectors.append(engine(pack(documents, **settings).to(world.device)))
    engine.train()
    gathered = gather(torch.cat(vectors)).cpu().numpy()
    numbers = gather(torch.from_numpy(mine).to(world.device)).cpu().numpy()
    by_number = np.empty((len(order), gathered.shape[1]), dtype=np.float32)
    by_number[numbers] = gathered
    languages = [index.languages[i] for i in index.columns["document_language"]]
    candidates = Candidates([str(g) for g in group_of], languages)
    scores = macro(retrieval(candidates, cosine_scorer(by_number), language_pairs(candidates)))
    return {name: value for name, value in scores.items() if name != "queries"}
