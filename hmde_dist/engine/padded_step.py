"""The classical training step, to measure against: every document a rectangle of sentences, most of it padding.

It does what HMDE's public code does (arXiv 2305.07016; GitHub ogaloglu/pre-training-multilingual-document-encoders,
src/models.py): the documents of each side of the batch are one tensor [documents, sentences, tokens], padded to the longest
document and the longest sentence of the side; the sentence encoder, a plain Hugging Face model with an attention mask, is
called once for each sentence position; the document encoder masks padded sentences; negatives are the documents of this
rank alone. No chunks, torch's AdamW, no clipping.

Weights are copied from an `HMDEModel`: without dropout both give the same vectors, loss and gradients (a test asserts it).
The document encoder is therefore this project's (pre-norm), in the form of `torch.nn.TransformerEncoder`.

Legend: D documents of a side, S sentences of the longest, T tokens of the longest sentence, W width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hmde_dist.command import InputError
from hmde_dist.model.document_encoder import DocumentEncoder
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.stream.batch import PackedBatch


def pad(batch: PackedBatch, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [D, S, T] of a packed batch, documents in their order."""
    device, counts = batch.ids.device, torch.tensor(batch.sentence_counts, device=batch.ids.device)
    lengths = batch.lower.starts.diff().long()
    document_S = torch.arange(len(counts), device=device).repeat_interleave(counts)
    place_S = torch.arange(len(document_S), device=device) - (counts.cumsum(0) - counts)[document_S]
    sentence_N = torch.empty_like(batch.sentence_rows)
    sentence_N[batch.sentence_rows] = torch.arange(len(document_S), device=device)
    sentence = sentence_N.repeat_interleave(lengths)  # of every token
    shape = len(counts), int(counts.max()), batch.lower.longest
    ids_DST = torch.full(shape, pad_id, device=device)
    mask_DST = torch.zeros(shape, dtype=torch.long, device=device)
    ids_DST[document_S[sentence], place_S[sentence], batch.positions] = batch.ids
    mask_DST[document_S[sentence], place_S[sentence], batch.positions] = 1
    return ids_DST, mask_DST


class PaddedModel(nn.Module):
    """The weights of `encoder`, run on padded documents.

    Attributes:
        slots: token slots that the last call sent through the sentence encoder, padding included.
    """

    def __init__(self, encoder: HMDEModel, precision: str = "fp32"):
        super().__init__()
        config = encoder.config
        if not config.upper_layers or config.document_pooling == "max" or config.upper_positions != "learned":
            raise InputError(
                "--reference padded knows the paper's document encoder alone: set model.upper.positions=learned, "
                "model.upper.layers to 1 or more, and model.upper.pooling to dcls or mean"
            )
        if config.lower["model_type"] == "longformer":
            raise InputError("--reference padded does not know global attention: leave model.lower.longformer out")
        self.precision, self.pooling, self.slots = precision, encoder.config.sentence_pooling, 0
        self.document_pooling = encoder.config.document_pooling
        self.lower = type(encoder.lower)(encoder.lower.config)
        if hasattr(self.lower, "pooler"):
            self.lower.pooler = None
        self.lower.load_state_dict(encoder.lower.state_dict())
        self.dcls = nn.Parameter(encoder.upper.dcls.detach().clone())
        self.positions = nn.Embedding.from_pretrained(encoder.upper.positions.weight.detach().clone(), freeze=False)
        self.input_norm = nn.LayerNorm(len(self.dcls))
        self.input_norm.load_state_dict(encoder.upper.input_norm.state_dict())
        self.upper = _torch_encoder(encoder.upper)
        self.dropout = encoder.upper.dropout
        self.to(encoder.device)

    def forward(self, batch: PackedBatch, sides: int) -> torch.Tensor:
        """Document vectors [sides * D, W], fp32."""
        ids, mask = pad(batch, self.lower.config.pad_token_id or 0)
        self.slots = 0
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = [self._side(*side) for side in zip(ids.chunk(sides), mask.chunk(sides), strict=True)]
        return torch.cat(found).float()

    def _side(self, ids_DST: torch.Tensor, mask_DST: torch.Tensor) -> torch.Tensor:
        # Each side is a rectangle of its own.
        sentences, tokens = (int(mask_DST.amax(axes).sum()) for axes in ((0, 2), (0, 1)))
        ids_DST, mask_DST = ids_DST[:, :sentences, :tokens], mask_DST[:, :sentences, :tokens]
        present_DS = mask_DST[:, :, 0].bool()
        mask_DST = mask_DST.clone()
        mask_DST[:, :, 0] = 1  # a sentence without any token has no attention that is defined
        self.slots += ids_DST.numel()
        sentences_DSW = torch.stack([self._sentence(ids_DST[:, s], mask_DST[:, s]) for s in range(sentences)], dim=1)
        dcls_D1W = self.dcls.expand(len(ids_DST), 1, -1)
        x = torch.cat([dcls_D1W, self.input_norm(sentences_DSW)], dim=1)
        x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        x = F.dropout(x, self.dropout, training=self.training)
        absent = F.pad(~present_DS, (1, 0))
        x = self.upper(x, src_key_padding_mask=absent)
        if self.document_pooling == "dcls":
            return x[:, 0]
        return x.masked_fill(absent[..., None], 0).sum(1) / (~absent).sum(1, keepdim=True)

    def _sentence(self, ids_DT: torch.Tensor, mask_DT: torch.Tensor) -> torch.Tensor:
        states_DTW = self.lower(input_ids=ids_DT, attention_mask=mask_DT).last_hidden_state
        if self.pooling == "cls":
            return states_DTW[:, 0]
        return (states_DTW * mask_DT[..., None]).sum(1) / mask_DT.sum(1, keepdim=True)


def _torch_encoder(upper: DocumentEncoder) -> nn.TransformerEncoder:
    first, width = upper.layers[0], len(upper.dcls)
    layer = nn.TransformerEncoderLayer(
        width,
        first.heads,
        first.feed_forward_in.out_features,
        first.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    encoder = nn.TransformerEncoder(layer, len(upper.layers), nn.LayerNorm(width), enable_nested_tensor=False)
    encoder.norm.load_state_dict(upper.output_norm.state_dict())
    for mine, theirs in zip(encoder.layers, upper.layers, strict=True):
        mine.dropout.p = 0.0  # inside the feed-forward layer, where ours has none
        with torch.no_grad():
            mine.self_attn.in_proj_weight.copy_(theirs.query_key_value.weight)
            mine.self_attn.in_proj_bias.copy_(theirs.query_key_value.bias)
        for one, other in (
            (mine.self_attn.out_proj, theirs.attention_out),
            (mine.norm1, theirs.attention_norm),
            (mine.norm2, theirs.feed_forward_norm),
            (mine.linear1, theirs.feed_forward_in),
            (mine.linear2, theirs.feed_forward_out),
        ):
            one.load_state_dict(other.state_dict())
    return encoder


def padded_contrast(documents: torch.Tensor, scale: float, sides: int) -> torch.Tensor:
    """The loss over documents [sides * D, W] laid out as `RankBatch` says, against those of this rank; nothing is masked."""
    x_DW, y_DW, *hard = F.normalize(documents, dim=-1).chunk(sides)
    own = torch.arange(len(x_DW), device=documents.device)
    loss = documents.new_zeros(())
    for side, (rows, columns) in enumerate(((x_DW, y_DW), (y_DW, x_DW))):
        loss = loss + F.cross_entropy(scale * rows @ torch.cat([columns, *hard[side : side + 1]]).T, own)
    return loss
