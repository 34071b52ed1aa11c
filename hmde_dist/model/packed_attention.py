"""Attention without padding: inside each piece of a flat stream, for the document encoder and for Hugging Face encoders.

On a GPU in bf16 one variable-length kernel does a whole stream, flash-attn's where that package is installed, else
torch's own (which has no dropout of attention weights). Everywhere else, pieces of equal length are a view of the
stream and go through torch's scaled dot product attention. `unpad` makes the self-attention of a Hugging Face encoder
work so, with its weights as they are. A Longformer alone is run with padding. The file travels inside exported models.

Legend: T vectors of the stream, H heads, w width of a head.
"""

import contextlib
import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hmde_dist.stream.batch import Segments

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


@torch.compiler.disable  # lengths differ in every batch: compiled, each would be compiled anew
def attend(
    query_THw: torch.Tensor,
    key_THw: torch.Tensor,
    value_THw: torch.Tensor,
    segments: Segments,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Self-attention inside each piece of the stream; returns [T, H, w].

    Args:
        window: a vector sees those at most so far away; none = all of its piece.
    """
    if not segments.runs:
        return query_THw  # nothing of nothing, but part of the graph
    if query_THw.is_cuda and query_THw.dtype in (torch.bfloat16, torch.float16):
        both = (-1, -1) if window is None else (window, window)
        starts, longest = segments.starts, segments.longest
        if flash_attn_varlen_func is not None:
            return flash_attn_varlen_func(
                query_THw, key_THw, value_THw, starts, starts, longest, longest, dropout_p=dropout, window_size=both
            )
        if not dropout:
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(query_THw, key_THw, value_THw, starts, starts, longest, longest, window_size=both)
    # Not slices, each of whose backward passes would fill a gradient of the whole stream.
    sizes = [length * count for length, count in segments.runs]
    parts = zip(*(tensor.split(sizes) for tensor in (query_THw, key_THw, value_THw)), strict=True)
    outputs = []
    for (length, count), part in zip(segments.runs, parts, strict=True):
        query, key, value = (t.view(count, length, *t.shape[1:]).transpose(1, 2) for t in part)
        near = None
        if window is not None and length > window + 1:
            places = torch.arange(length, device=query.device)
            near = (places[:, None] - places).abs() <= window
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=near, dropout_p=dropout)
        outputs.append(mixed.transpose(1, 2).reshape(length * count, *query_THw.shape[1:]))
    return torch.cat(outputs)


def pool(states_TW: torch.Tensor, segments: Segments, how: str) -> torch.Tensor:
    """The first state of each piece of the stream (how = "first"), or the "mean" (summed in fp32) or "max"; [pieces, W]."""
    if how == "first":
        return states_TW[segments.starts[:-1].long()]
    lengths = segments.starts.diff().long()
    return torch.segment_reduce(states_TW.float(), how, lengths=lengths, unsafe=True).to(states_TW.dtype)


class Stream:
    """Which pieces the stream has that an encoder is given. Not an argument: encoders do not hand arguments down."""

    segments: Segments | None = None

    def contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """For a layer under activation checkpointing, which runs again in the backward pass: then, too, on this stream."""
        return contextlib.nullcontext(), self._on(self.segments)

    @contextlib.contextmanager
    def _on(self, segments: Segments):
        now, self.segments = self.segments, segments
        try:
            yield
        finally:
            self.segments = now


def encode_stream(
    encoder: nn.Module, stream: Stream, ids_T: torch.Tensor, positions_T: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Last states [T, W] of a Hugging Face encoder that `unpad` has changed, for the sentences of a stream."""
    if encoder.config.model_type == "longformer":
        return _encode_padded(encoder, ids_T, positions_T, segments)
    stream.segments = segments
    arguments = {"position_ids": (positions_T + first_position(encoder))[None]}
    if "token_type_ids" in inspect.signature(encoder.forward).parameters:
        # BERT's own default is as long as its longest sentence, shorter than the stream.
        arguments["token_type_ids"] = torch.zeros_like(ids_T)[None]
    if encoder.config.model_type == "modernbert":
        # Or it would make masks [T, T] that nobody reads.
        arguments["attention_mask"] = {"full_attention": None, "sliding_attention": None}
    return encoder(input_ids=ids_T[None], **arguments).last_hidden_state[0]


def _encode_padded(
    encoder: nn.Module, ids_T: torch.Tensor, positions_T: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """As `encode_stream`, by a Longformer as it is: each piece a padded row of one batch, for its attention needs rows.

    The first token of a piece has global attention: it is the one that may speak for the whole.
    """
    lengths = segments.starts.diff().long()
    rows_T = torch.arange(len(lengths), device=ids_T.device).repeat_interleave(lengths)
    shape = len(lengths), padded_width(encoder, segments)
    ids, positions, mask, globally = (torch.zeros(shape, dtype=torch.long, device=ids_T.device) for _ in range(4))
    ids.fill_(encoder.config.pad_token_id)
    ids[rows_T, positions_T] = ids_T
    positions[rows_T, positions_T] = positions_T + first_position(encoder)
    mask[rows_T, positions_T] = 1
    globally[:, 0] = 1
    states = encoder(
        input_ids=ids, attention_mask=mask, global_attention_mask=globally, position_ids=positions
    ).last_hidden_state
    return states[rows_T, positions_T]


def padded_width(encoder: nn.Module, segments: Segments) -> int:
    """Tokens of a row of the batch that a Longformer makes of a stream: a multiple of its attention window."""
    window = max(encoder.config.attention_window)
    return -(-segments.longest // window) * window


def first_position(encoder: nn.Module) -> int:
    """The position of the first token: RoBERTa and its kin count from behind the padding index."""
    return getattr(encoder.embeddings, "padding_idx", -1) + 1


def encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """The layers of a Hugging Face encoder."""
    return encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer


def unpad(encoder: nn.Module) -> Stream:
    """Let the self-attention of a Hugging Face encoder stay inside the pieces of a stream; returns what says which.

    Raises:
        ValueError: the encoder's attention is of an unknown kind.
    """
    stream = Stream()
    if encoder.config.model_type == "longformer":
        return stream  # runs as it is, with padding
    found = 0
    for module in encoder.modules():
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in ("query", "key", "value")):
            # BERT and its kin: RoBERTa, XLM-R, CamemBERT, ELECTRA, ...
            if getattr(module, "position_embedding_type", "absolute") != "absolute":
                raise ValueError(f"relative positions ({module.position_embedding_type}) need padding")
            module.forward = partial(_bert_attention, module, stream)
        elif type(module).__name__ == "ModernBertAttention":
            module.forward = partial(_modernbert_attention, module, stream)
        else:
            continue
        found += 1
    if found != encoder.config.num_hidden_layers:
        raise ValueError(
            f"{encoder.config.model_type} has another attention than BERT (and RoBERTa, XLM-R, ELECTRA, ...) or ModernBERT"
        )
    if hasattr(encoder, "_update_attention_mask"):  # ModernBERT before transformers 5
        encoder._update_attention_mask = lambda *_, **__: (None, None)
    return stream


def _bert_attention(module: nn.Module, stream: Stream, states_1TW: torch.Tensor, *_, **__) -> tuple[torch.Tensor, None]:
    heads = module.num_attention_heads
    query, key, value = (
        part(states_1TW).view(states_1TW.shape[1], heads, -1) for part in (module.query, module.key, module.value)
    )
    dropout = module.dropout.p if module.training else 0.0
    return _attend(stream, query, key, value, dropout, None).flatten(1)[None], None


def _modernbert_attention(
    module: nn.Module,
    stream: Stream,
    states_1TW: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    *_,
    position_ids: torch.Tensor | None = None,
    **__,
) -> tuple[torch.Tensor, None]:
    query, key, value = module.Wqkv(states_1TW).view(states_1TW.shape[1], 3, -1, module.head_dim).unbind(1)
    if position_embeddings is None:  # before transformers 5 each layer has its own
        position_embeddings = module.rotary_emb(value, position_ids=position_ids)
        sides = module.local_attention
        window = None if sides == (-1, -1) else sides[0]
    else:
        window = None if module.sliding_window is None else module.sliding_window - 1
    cos, sin = (table[0, :, None].to(query.dtype) for table in position_embeddings)
    query, key = (part * cos + _half_turned(part) * sin for part in (query, key))
    dropout = module.attention_dropout if module.training else 0.0
    mixed = _attend(stream, query, key, value, dropout, window)
    return module.out_drop(module.Wo(mixed.flatten(1)[None])), None


def _half_turned(x_THw: torch.Tensor) -> torch.Tensor:
    first, second = x_THw.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@torch.compiler.disable  # or the compiled code would be made for the stream it saw first
def _attend(stream: Stream, *arguments) -> torch.Tensor:
    return attend(*arguments[:3], stream.segments, *arguments[3:])
