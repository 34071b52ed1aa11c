"""The HMDE objective: symmetric cross-lingual contrast of documents (arXiv 2305.07016, reference code `ContrastiveModel`).

For pairs (x_i, y_i) of comparable documents, s = scale * cosine:
    loss = mean_i CE(s(x_i, y_1..N), i) + mean_i CE(s(y_i, x_1..N), i)
a sum of the two directions, as in the reference. Here the N candidates come from every rank, category neighbours in the
batch are the hard negatives, and other versions of the anchor's own group never count as negatives.
"""

import torch

from hmde_dist.objectives.tile_loss import Contrast, Hard, Ranks, tile_loss


def document_contrast(
    documents: torch.Tensor,
    groups: torch.Tensor,
    scale: torch.Tensor,
    hard_negatives: bool = False,
    ranks: Ranks | None = None,
) -> Contrast:
    """The loss over documents laid out as [first of each pair..., second of each pair...].

    With `hard_negatives` two more parts follow, [a negative for each first..., for each second...], each in the language
    of its side: h and g of the reference. They join the candidates y of x_i, and the candidates x of y_i.

    Args:
        documents: [2n, W] or [4n, W] vectors of this rank, any norm; the loss is computed in fp32.
        groups: [2n] or [4n] group number of each document; equal numbers are versions of one document.
        scale: [1] inverse temperature.
        ranks: stands in for the process group.
    """
    parts = 4 if hard_negatives else 2
    (x_nW, y_nW, *hard), (groups_n, _, *hard_groups) = documents.chunk(parts), groups.chunk(parts)
    hard_x, hard_y = map(Hard, hard, hard_groups) if hard_negatives else (None, None)
    return tile_loss(x_nW, y_nW, groups_n, scale, hard_x=hard_x, hard_y=hard_y, ranks=ranks)
