import numpy as np
import pytest
import torch
from transformers import AutoConfig

from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.stream.batch import pack

SPECIAL = {"cls_id": 2, "sep_id": 3}
LOWER = {
    "bert": {"pad_token_id": 0},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "modernbert": {"pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2},
}


def build(kind="bert", **settings) -> HMDEModel:
    torch.manual_seed(0)
    lower = AutoConfig.for_model(
        kind,
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        **LOWER[kind],
    )
    config = HMDEConfig(
        lower=lower.to_dict(), hidden_size=32, upper_heads=4, upper_intermediate=48, max_sentences=8, sentence_tokens=30
    )
    for name, value in settings.items():
        setattr(config, name, value)
    return HMDEModel(config).eval()


def documents(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [
        (random.integers(5, 100, sum(counts)).astype(np.uint32), np.array(counts, dtype=np.int64)) for counts in lengths
    ]


def run(model, docs, sentences=8):
    with torch.no_grad():
        return model(pack(docs, **SPECIAL, sentences=sentences))


RAGGED = [[5, 30, 1, 17], [2], [9] * 8, [1, 1, 29, 13, 4, 4], [3, 12]]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("pooling", ["dcls", "mean"])
def test_a_document_has_the_same_vector_alone_and_beside_a_much_longer_one(positions, pooling):
    model = build(upper_positions=positions, document_pooling=pooling)
    docs = documents([[4, 7], [30] * 8, [11]])
    together = run(model, docs).documents
    alone = torch.cat([run(model, [document]).documents for document in docs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 1e-2


def test_document_encoder_equals_a_masked_transformer_over_padded_documents():
    model = build()
    docs = documents(RAGGED)
    output = run(model, docs)
    counts = [len(lengths) for _, lengths in docs]
    upper, sentences, contextual = model.upper, output.sentences.split(counts), output.contextual.split(counts)
    for number, rows in enumerate(sentences):
        x = torch.cat([upper.dcls[None], upper.input_norm(rows)]) + upper.positions.weight[: len(rows) + 1]
        x = torch.cat([x, torch.randn(9 - len(x), 32)])[None]  # padded with noise that the mask must hide
        hidden = torch.arange(9) > len(rows)
        for layer in upper.layers:
            norm = layer.attention_norm(x)
            mixed, _ = torch.nn.functional.multi_head_attention_forward(
                *[norm.transpose(0, 1)] * 3,
                embed_dim_to_check=32,
                num_heads=4,
                in_proj_weight=layer.query_key_value.weight,
                in_proj_bias=layer.query_key_value.bias,
                bias_k=None,
                bias_v=None,
                add_zero_attn=False,
                dropout_p=0.0,
                out_proj_weight=layer.attention_out.weight,
                out_proj_bias=layer.attention_out.bias,
                training=False,
                key_padding_mask=hidden[None],
            )
            x = x + mixed.transpose(0, 1)
            x = x + layer.feed_forward_out(torch.nn.functional.gelu(layer.feed_forward_in(layer.feed_forward_norm(x))))
        expected = upper.output_norm(x)[0]
        torch.testing.assert_close(output.documents[number], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(contextual[number], expected[1 : len(rows) + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_order_of_sentences_matters(positions):
    model = build(upper_positions=positions)
    (tokens, lengths), *_ = documents([[6, 6, 6]])
    swapped = np.concatenate([tokens[12:], tokens[6:12], tokens[:6]])
    vectors = run(model, [(tokens, lengths), (swapped, lengths)]).documents
    assert torch.linalg.vector_norm(vectors[0] - vectors[1]) > 1e-3


def test_a_document_without_sentences_has_a_vector():
    model = build()
    empty = (np.empty(0, np.uint32), np.empty(0, np.int64))
    vectors = run(model, [empty, *documents([[3, 4]])]).documents
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(run(model, [empty]).documents[0], vectors[0], rtol=1e-5, atol=1e-5)


def test_sentences_beyond_the_limit_change_nothing():
    model = build()
    (tokens, lengths), *_ = documents([[5] * 11])
    vectors = run(model, [(tokens, lengths), (tokens[:40], lengths[:8])]).documents
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    model = build().train()
    run_batch = pack(documents(RAGGED), **SPECIAL, sentences=8)
    model(run_batch).documents.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    # Token types and positions of the sentence encoder are used through row 0 and the positions that occur.
    assert without == []
