"""A multilingual Longformer (Beltagy et al. 2020, arXiv 2004.05150) that starts from the weights of XLM-R, RoBERTa or BERT.

Built as in HMDE's public code (GitHub ogaloglu/pre-training-multilingual-document-encoders, src/model_utils.py): the table of
positions is repeated until it is long enough, and the projections of tokens with global attention begin as copies of the
others. Which tokens these are is `packed_attention.encode_stream`'s business. Only needed to build a model, not to use one.
"""

import re

import torch
from torch import nn
from transformers import LongformerConfig, PretrainedConfig

from hmde_dist.model.packed_attention import first_position

# Encoders whose weights have the same names and roles.
SOURCES = ("bert", "camembert", "roberta", "xlm-roberta")
_COPIED = """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob
    attention_probs_dropout_prob type_vocab_size initializer_range layer_norm_eps pad_token_id bos_token_id eos_token_id
    cls_token_id sep_token_id""".split()


def longformer_config(source: PretrainedConfig, attention_window: int, positions: int) -> LongformerConfig:
    """The configuration of a Longformer with the sizes of `source`.

    Args:
        attention_window: tokens that a token sees, half of them to each side.
        positions: tokens of the longest text, special ones included.

    Raises:
        ValueError: the weights of such an encoder do not fit.
    """
    if source.model_type not in SOURCES:
        raise ValueError(f"a Longformer is built from {', '.join(SOURCES)}, not from {source.model_type}")
    if getattr(source, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"a Longformer has no relative positions ({source.position_embedding_type})")
    settings = {name: value for name in _COPIED if (value := getattr(source, name, None)) is not None}
    return LongformerConfig(
        # Positions are counted from behind the padding index.
        max_position_embeddings=positions + settings["pad_token_id"] + 1,
        attention_window=[attention_window] * source.num_hidden_layers,
        **settings,
    )


def longformer_weights(source: nn.Module, target: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for the Longformer `target`, made of those of the encoder `source`."""
    weights = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("pooler.")}
    weights.pop("embeddings.position_ids", None)
    for name in list(weights):
        if local := re.fullmatch(r"(.+\.attention\.self\.(?:query|key|value))\.(weight|bias)", name):
            weights[f"{local[1]}_global.{local[2]}"] = weights[name]
    name = "embeddings.position_embeddings.weight"
    known = weights[name][first_position(source) :]
    first, size = first_position(target), target.config.max_position_embeddings
    repeated = known[torch.arange(size - first, device=known.device) % len(known)]
    weights[name] = torch.cat([known.new_zeros(first, known.shape[1]), repeated])
    return weights
