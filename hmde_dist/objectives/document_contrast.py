"""The HMDE objective: symmetric cross-lingual contrast of documents (arXiv 2305.07016, reference code `ContrastiveModel`).

For pairs (x_i, y_i) of comparable documents, s = scale * cosine:
    loss = mean_i CE(s(x_i, y_1..N), i) + mean_i CE(s(y_i, x_1..N), i)
a sum of the two directions, as in the reference. Here the N candidates come from every rank, category neighbours in the
batch are the hard negatives, and other versions of the anchor's own group never count as negatives.

Legend: n pairs of this rank, N pairs of all ranks, W width.
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


def document_contrast(documents_2nW: torch.Tensor, groups_2n: torch.Tensor, scale: torch.Tensor) -> Contrast:
    """The loss over documents laid out as [first of each pair..., second of each pair...].

    Args:
        documents_2nW: document vectors of this rank, any norm; the loss is computed in fp32.
        groups_2n: group number of each document; equal numbers are versions of one document.
        scale: [1] inverse temperature.
    """
    x_nW, y_nW = F.normalize(documents_2nW.float(), dim=-1).chunk(2)
    groups_n = groups_2n.chunk(2)[0]
    all_x_NW, all_y_NW, groups_N = gather(x_nW), gather(y_nW), gather(groups_n)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    own_n = torch.arange(len(x_nW), device=x_nW.device) + rank * len(x_nW)
    same_nN = groups_n[:, None] == groups_N
    same_nN[torch.arange(len(own_n), device=own_n.device), own_n] = False
    loss, accuracy = torch.zeros((), device=x_nW.device), torch.zeros((), device=x_nW.device)
    for anchors_nW, candidates_NW in ((x_nW, all_y_NW), (y_nW, all_x_NW)):
        scores_nN = (scale.float() * anchors_nW @ candidates_NW.T).masked_fill(same_nN, float("-inf"))
        loss = loss + F.cross_entropy(scores_nN, own_n)
        accuracy = accuracy + (scores_nN.argmax(dim=-1) == own_n).float().mean() / 2
    return Contrast(loss, accuracy.detach(), len(all_x_NW) - 1)
