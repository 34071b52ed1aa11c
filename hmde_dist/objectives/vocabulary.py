"""Predictions over the vocabulary, tied to the sentence encoder's own embeddings, without the matrix of all scores.

score_v = e_v . LN(act(A x)) + bias_v, e_v the input embedding of token v. Only the log-sum over the vocabulary needs every score;
it is made for a block of rows at a time, and again in the backward pass. The scores of the tokens that are right are looked up.

Legend: M predictions, V vocabulary, E width of the embeddings, K right answers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmde_dist.model.modeling_hmde import HMDEModel

SCORES = 1 << 26  # of a block, 256 MiB of fp32


class VocabularyHead(nn.Module):
    """States to predictions of tokens; the embeddings are the encoder's and are trained through both uses.

    Args:
        activation: between the dense layer and the norm: "gelu" as in BERT and XLM-R, "silu" as in Mao et al. 2021.
    """

    def __init__(self, encoder: HMDEModel, activation: str, inputs: int | None = None):
        super().__init__()
        vocabulary, width = encoder.lower.get_input_embeddings().weight.shape
        self.dense = nn.Linear(inputs or encoder.config.hidden_size, width)
        self.activation = getattr(F, activation)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, encoder: HMDEModel, states: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihoods [K] of `tokens` [K] as predicted from `states[rows]` [M, W], and whether each is the likeliest."""
        weight = encoder.lower.get_input_embeddings().weight
        hidden = self.norm(self.activation(self.dense(states))).to(weight.dtype)
        # Autocast would make these products, whose sums run over the whole vocabulary, in bf16.
        with torch.autocast(hidden.device.type, enabled=False):
            right = (hidden[rows] * weight[tokens]).sum(1) + self.bias[tokens]
            size = max(1, SCORES // len(weight))
            blocks = [checkpoint(_block, part, weight, self.bias, use_reentrant=False) for part in hidden.split(size)]
            sums, best = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return right - sums[rows], right.detach() >= best[rows] - 1e-5 * best[rows].abs()


def _block(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.addmm(bias, hidden, weight.T)
    return scores.logsumexp(1), scores.detach().amax(1)
