"""The upper transformer: sentence vectors in context, and the document vector, over one flat stream without padding.

`SegmentPooling` is what stands there if it has no layers.

The file travels inside exported models.

Legend: U vectors of the stream ([DCLS] and sentences of all documents), W width, H heads, D documents.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hmde_dist.model.packed_attention import attend, pool
from hmde_dist.stream.batch import Segments


def rotate(x_UHw: torch.Tensor, positions_U: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), computed in fp32."""
    half = x_UHw.shape[-1] // 2
    frequencies = 10_000 ** (-torch.arange(half, device=x_UHw.device, dtype=torch.float32) / half)
    angles = (positions_U[:, None].float() * frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    first, second = x_UHw.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_UHw.dtype)


class DocumentLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, intermediate: int, dropout: float, rotary: bool):
        super().__init__()
        self.heads, self.dropout, self.rotary = heads, dropout, rotary
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, intermediate)
        self.feed_forward_out = nn.Linear(intermediate, width)

    def forward(self, x_UW: torch.Tensor, positions_U: torch.Tensor, segments: Segments) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        states = self.query_key_value(self.attention_norm(x_UW))
        query, key, value = states.view(len(x_UW), 3, self.heads, x_UW.shape[1] // self.heads).unbind(1)
        if self.rotary:
            query, key = rotate(query, positions_U), rotate(key, positions_U)
        mixed = attend(query, key, value, segments, dropout)
        x_UW = x_UW + F.dropout(self.attention_out(mixed.flatten(1)), dropout)
        hidden = F.gelu(self.feed_forward_in(self.feed_forward_norm(x_UW)))
        return x_UW + F.dropout(self.feed_forward_out(hidden), dropout)


class DocumentEncoder(nn.Module):
    """Transformer layers over [DCLS] and sentence vectors."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        intermediate: int,
        dropout: float,
        positions: str,
        pooling: str,
        max_sentences: int,
    ):
        super().__init__()
        self.dropout, self.pooling, self.checkpointing = dropout, pooling, False
        # One vector, not a row of an embedding table.
        self.dcls = nn.Parameter(torch.empty(width))
        self.positions = nn.Embedding(max_sentences + 1, width) if positions == "learned" else None
        self.input_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            DocumentLayer(width, heads, intermediate, dropout, positions == "rotary") for _ in range(layers)
        )
        self.output_norm = nn.LayerNorm(width)

    def forward(
        self,
        sentences_NW: torch.Tensor,
        upper_rows_U: torch.Tensor,
        upper_positions_U: torch.Tensor,
        document_rows_D: torch.Tensor,
        segments: Segments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Document vectors [D, W] and the contextual states [U, W] of the stream."""
        # [DCLS] starts small, behind the norm: what it gathers from the sentences outweighs it from the first step.
        # Normalised like a sentence it would make all documents nearly equal, and their gradients nearly nothing.
        x_UW = torch.cat([self.input_norm(sentences_NW), self.dcls[None]])[upper_rows_U]
        if self.positions is not None:
            x_UW = x_UW + self.positions(upper_positions_U)
        x_UW = F.dropout(x_UW, self.dropout, training=self.training)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x_UW = checkpoint(layer, x_UW, upper_positions_U, segments, use_reentrant=False)
            else:
                x_UW = layer(x_UW, upper_positions_U, segments)
        x_UW = self.output_norm(x_UW)
        pooled_DW = pool(x_UW, segments, "first" if self.pooling == "dcls" else self.pooling)
        return pooled_DW[document_rows_D], x_UW


class SegmentPooling(nn.Module):
    """In the place of a `DocumentEncoder` that has no layers: the mean or max of the sentence vectors. No parameters.

    The vector of a document without sentences is zero.
    """

    def __init__(self, pooling: str):
        super().__init__()
        self.pooling, self.checkpointing, self.layers = pooling, False, nn.ModuleList()

    def forward(
        self,
        sentences_NW: torch.Tensor,
        upper_rows_U: torch.Tensor,
        upper_positions_U: torch.Tensor,
        document_rows_D: torch.Tensor,
        segments: Segments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As that of `DocumentEncoder`; the states [U, W] are the sentence vectors, and zeros at the places of [DCLS]."""
        x_UW = F.pad(sentences_NW, (0, 0, 0, 1))[upper_rows_U]
        if self.pooling == "max":
            nowhere = (upper_positions_U == 0)[:, None]
            pooled_DW = pool(x_UW.masked_fill(nowhere, float("-inf")), segments, "max")
            pooled_DW = pooled_DW.masked_fill(pooled_DW.isneginf(), 0.0)
        else:
            with_dcls = segments.starts.diff()[:, None]
            pooled_DW = pool(x_UW, segments, "mean") * (with_dcls / (with_dcls - 1).clamp_min(1))
        return pooled_DW[document_rows_D], x_UW
