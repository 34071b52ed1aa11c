"""The HMDE objective: symmetric cross-lingual contrast of documents (arXiv 2305.07016, reference code `ContrastiveModel`).

For pairs (x_i, y_i) of comparable documents, s = scale * cosine:
    loss = mean_i CE(s(x_i, y_1..N), i) + mean_i CE(s(y_i, x_1..N), i)
a sum of the two directions, as in the reference. Here the N candidates come from every rank, category neighbours in the
batch are the hard negatives, and other versions of the anchor's own group never count as negatives.

Legend: n pairs of this rank, N pairs of all ranks, C candidates of an anchor, W width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hmde_dist.objectives.gather import gather


@dataclass(frozen=True)
class Contrast:
    """The loss of this rank's rows, and what is worth watching about it."""

    loss: torch.Tensor  # [] mean over this rank's rows, both directions added
    accuracy: torch.Tensor  # [] share of rows whose own partner scores highest, mean of the two directions
    negatives: int  # candidates against each anchor (the largest number where some are masked)


def document_contrast(
    documents: torch.Tensor, groups: torch.Tensor, scale: torch.Tensor, hard_negatives: bool = False
) -> Contrast:
    """The loss over documents laid out as [first of each pair..., second of each pair...].

    With `hard_negatives` two more parts follow, [a negative for each first..., for each second...], each in the language
    of its side: h and g of the reference. They join the candidates y of x_i, and the candidates x of y_i.

    Args:
        documents: [2n, W] or [4n, W] vectors of this rank, any norm; the loss is computed in fp32.
        groups: [2n] or [4n] group number of each document; equal numbers are versions of one document.
        scale: [1] inverse temperature.
    """
    sides = F.normalize(documents.float(), dim=-1).chunk(4 if hard_negatives else 2)
    x_nW, y_nW = sides[:2]
    groups_of_sides = groups.chunk(len(sides))
    groups_n = groups_of_sides[0]
    all_x_NW, all_y_NW, groups_N = gather(x_nW), gather(y_nW), gather(groups_n)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    own_n = torch.arange(len(x_nW), device=x_nW.device) + rank * len(x_nW)
    loss, accuracy = torch.zeros((), device=x_nW.device), torch.zeros((), device=x_nW.device)
    for side, (anchors_nW, candidates_CW) in enumerate(((x_nW, all_y_NW), (y_nW, all_x_NW))):
        groups_C = groups_N
        if hard_negatives:
            candidates_CW = torch.cat([candidates_CW, gather(sides[2 + side])])
            groups_C = torch.cat([groups_N, gather(groups_of_sides[2 + side])])
        same_nC = groups_n[:, None] == groups_C
        same_nC[torch.arange(len(own_n), device=own_n.device), own_n] = False
        scores_nC = (scale.float() * anchors_nW @ candidates_CW.T).masked_fill(same_nC, float("-inf"))
        loss = loss + F.cross_entropy(scores_nC, own_n)
        accuracy = accuracy + (scores_nC.argmax(dim=-1) == own_n).float().mean() / 2
    return Contrast(loss, accuracy.detach(), len(candidates_CW) - 1)
