"""Attention inside the pieces of a stream is the attention that Hugging Face computes with padding and a mask."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from hmde_dist.model.packed_attention import attend, encode_stream, pool, unpad
from hmde_dist.stream.batch import Segments, pack

KINDS = {
    "bert": {"pad_token_id": 0},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "camembert": {"pad_token_id": 1, "type_vocab_size": 1},
    "electra": {"pad_token_id": 0, "embedding_size": 32},
    # Windows of 4 to each side in two layers of three, far shorter than the sentences.
    "modernbert": {"pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 3},
}
LENGTHS = [5, 30, 1, 17, 2, 9, 9, 9, 30, 3, 12]


def encoder_of(kind: str) -> torch.nn.Module:
    config = AutoConfig.for_model(
        kind,
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        **KINDS[kind],
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def both(kind: str):
    """A Hugging Face encoder as it is and one that `unpad` changed, with the same weights."""
    plain, packed = encoder_of(kind), encoder_of(kind)
    packed.load_state_dict(plain.state_dict())
    return plain, packed, unpad(packed)


def sentences():
    random = np.random.default_rng(0)
    return [random.integers(5, 100, length).astype(np.uint32) for length in LENGTHS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_states_and_gradients_equal_the_padded_hugging_face_encoder(kind, pooling):
    plain, packed, stream = both(kind)
    texts = sentences()
    batch = pack([(np.concatenate(texts), np.array(LENGTHS))], cls_id=2, sep_id=3, sentences=len(texts))
    states = encode_stream(packed, stream, batch.ids, batch.positions, batch.lower)
    found = pool(states, batch.lower, pooling)[batch.sentence_rows]

    longest = max(LENGTHS) + 2
    ids = torch.full((len(texts), longest), plain.config.pad_token_id)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) + 2] = torch.tensor([2, *text.tolist(), 3])
    mask = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None] + 2).long()
    padded = plain(input_ids=ids, attention_mask=mask).last_hidden_state
    counted = (padded * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = padded[:, 0] if pooling == "first" else counted
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), packed.named_parameters(), strict=True):
        if one.grad is not None and one.grad.abs().max() > 1e-4:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_window_is_a_band_of_the_mask():
    query = torch.randn(30, 2, 8)
    segments = Segments.of(np.array([30]))
    near = attend(query, query, query, segments, window=4)
    masked = torch.nn.functional.scaled_dot_product_attention(
        *[query.transpose(0, 1)] * 3, attn_mask=(torch.arange(30)[:, None] - torch.arange(30)).abs() <= 4
    )
    torch.testing.assert_close(near, masked.transpose(0, 1))
    assert not torch.allclose(near, attend(query, query, query, segments), atol=1e-3)


@pytest.mark.parametrize("kind", ["distilbert", "mpnet"])
def test_an_encoder_whose_attention_is_unknown_is_refused(kind):
    config = AutoConfig.for_model(kind, vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=f"{kind} has another attention than BERT"):
        unpad(AutoModel.from_config(config))


def test_relative_positions_are_refused():
    config = AutoConfig.for_model("bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.position_embedding_type = "relative_key"
    encoder = AutoModel.from_config(config)
    if hasattr(encoder.encoder.layer[0].attention.self, "distance_embedding"):  # transformers 5 has dropped them
        with pytest.raises(ValueError, match="relative_key"):
            unpad(encoder)
