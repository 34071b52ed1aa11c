import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.stream.batch import pack

CLS, SEP = 90_001, 90_002


@st.composite
def ragged(draw):
    """Documents with ids that all differ, and the number of sentences to keep."""
    documents = draw(st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=8))
    lengths = [np.array(document, dtype=np.int64) for document in documents]
    stops = np.cumsum([array.sum() for array in lengths])
    ids = [np.arange(stop - array.sum(), stop, dtype=np.uint32) for stop, array in zip(stops, lengths, strict=True)]
    return list(zip(ids, lengths, strict=True)), draw(st.integers(1, 7))


def pack_ragged(case):
    documents, sentences = case
    return pack(documents, cls_id=CLS, sep_id=SEP, sentences=sentences)


def kept_sentences(case) -> list[list[list[int]]]:
    """Ids with special tokens of every kept sentence of every document."""
    documents, sentences = case
    return [
        [[CLS, *part.tolist(), SEP] for part in np.split(ids, np.cumsum(lengths))[: len(lengths)][:sentences]]
        for ids, lengths in documents
    ]


def rows_of(batch) -> list[list[int]]:
    """The sentences of the token stream, as `lower` cuts it."""
    return [part.tolist() for part in batch.ids.split(batch.lower.starts.diff().tolist())]


@given(ragged())
def test_the_stream_holds_every_sentence_the_shortest_first_and_nothing_else(case):
    batch = pack_ragged(case)
    flat = [sentence for document in kept_sentences(case) for sentence in document]
    assert rows_of(batch) == (sorted(flat, key=len) or [[CLS, SEP]])
    assert batch.positions.tolist() == [place for row in rows_of(batch) for place in range(len(row))]
    assert batch.ids.dtype == batch.positions.dtype == torch.int64


@given(ragged())
def test_runs_are_sentences_of_one_length(case):
    lower = pack_ragged(case).lower
    assert [length for length, count in lower.runs for _ in range(count)] == lower.starts.diff().tolist()
    assert len({length for length, _ in lower.runs}) == len(lower.runs)
    assert lower.longest == max(length for length, _ in lower.runs)


@given(ragged())
def test_sentence_rows_follow_the_documents(case):
    batch, rows, expected = pack_ragged(case), rows_of(pack_ragged(case)), kept_sentences(case)
    assert batch.sentence_counts == tuple(len(document) for document in expected)
    assert [rows[row] for row in batch.sentence_rows] == [sentence for document in expected for sentence in document]


@given(ragged())
def test_upper_stream_is_the_documents_by_length(case):
    batch, rows, expected = pack_ragged(case), rows_of(pack_ragged(case)), kept_sentences(case)
    order = sorted(range(len(expected)), key=lambda number: len(expected[number]))
    stream = [vector for number in order for vector in ("DCLS", *expected[number])]
    assert [[*rows, "DCLS"][row] for row in batch.upper_rows] == stream
    assert batch.upper_positions.tolist() == [
        position for number in order for position in range(1 + len(expected[number]))
    ]
    assert [order[place] for place in batch.document_rows] == list(range(len(expected)))


@given(ragged())
def test_upper_runs_are_documents_of_one_length(case):
    batch = pack_ragged(case)
    assert [vectors for vectors, count in batch.upper.runs for _ in range(count)] == sorted(
        count + 1 for count in batch.sentence_counts
    )
    assert len({vectors for vectors, _ in batch.upper.runs}) == len(batch.upper.runs)


@given(ragged())
def test_tokens_and_slots_are_counted(case):
    batch = pack_ragged(case)
    assert batch.tokens == sum(len(sentence) for document in kept_sentences(case) for sentence in document)
    assert batch.slots == max(2, batch.tokens)


def test_documents_without_sentences_are_only_their_dcls():
    nothing = (np.empty(0, np.uint32), np.empty(0, np.int64))
    batch = pack_ragged(([nothing, nothing], 4))
    assert batch.upper_rows.tolist() == [len(rows_of(batch))] * 2
    assert (batch.upper.runs, batch.tokens, batch.sentence_counts) == (((1, 2),), 0, (0, 0))
    assert batch.document_rows.tolist() == [0, 1]


def test_lengths_of_any_integer_type_pack_alike():
    ids, lengths = np.arange(6, dtype="<u4"), np.array([1, 2, 3])
    packed = [pack_ragged(([(ids, lengths.astype(kind))], 3)) for kind in ("<u2", "<u4", "<i8")]
    assert rows_of(packed[0]) == rows_of(packed[1]) == rows_of(packed[2])


def test_every_tensor_moves():
    ids, lengths = np.arange(6, dtype=np.uint32), np.array([1, 2, 3])
    batch = pack([(ids, lengths)], cls_id=CLS, sep_id=SEP, sentences=3)
    moved = batch.to("meta")
    tensors = [moved.ids, moved.positions, moved.lower.starts, moved.upper.starts, moved.upper_rows,
               moved.upper_positions, moved.sentence_rows, moved.document_rows]  # fmt: skip
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.upper.runs, moved.tokens, moved.sentence_counts) == (
        batch.upper.runs,
        batch.tokens,
        batch.sentence_counts,
    )
