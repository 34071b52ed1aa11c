import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.stream.batch import bucket_boundaries, pack

CLS, SEP, PAD = 90_001, 90_002, 90_003


@pytest.mark.parametrize("longest", [3, 4, 15, 16, 17, 26, 40, 128, 514, 65535])
def test_buckets_cover_every_length_with_little_padding(longest):
    boundaries = bucket_boundaries(longest)
    assert boundaries == sorted(set(boundaries))
    assert (boundaries[0], boundaries[-1]) == (3, longest)
    lengths = np.arange(3, longest + 1)
    bucket = np.array(boundaries)[np.searchsorted(boundaries, lengths)]
    assert (bucket >= lengths).all()
    assert ((bucket - lengths) * 8 < bucket).all()


def test_buckets_are_few():
    assert bucket_boundaries(128) == [*range(3, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 129, 8)]


@st.composite
def ragged(draw):
    """Documents with ids that all differ, the longest allowed sentence and the number of sentences to keep."""
    longest = draw(st.integers(1, 40))
    documents = draw(st.lists(st.lists(st.integers(1, longest), max_size=6), min_size=1, max_size=8))
    lengths = [np.array(document, dtype=np.int64) for document in documents]
    stops = np.cumsum([array.sum() for array in lengths])
    ids = [np.arange(stop - array.sum(), stop, dtype=np.uint32) for stop, array in zip(stops, lengths, strict=True)]
    return list(zip(ids, lengths, strict=True)), longest, draw(st.integers(1, 7))


def pack_ragged(case):
    documents, longest, sentences = case
    return pack(documents, cls_id=CLS, sep_id=SEP, pad_id=PAD, sentence_tokens=longest, sentences=sentences)


def kept_sentences(case) -> list[list[list[int]]]:
    """Ids with special tokens of every kept sentence of every document."""
    documents, _, sentences = case
    return [
        [[CLS, *part.tolist(), SEP] for part in np.split(ids, np.cumsum(lengths))[: len(lengths)][:sentences]]
        for ids, lengths in documents
    ]


@given(ragged())
def test_every_sentence_lies_in_its_bucket(case):
    batch = pack_ragged(case)
    boundaries = bucket_boundaries(case[1] + 2)
    flat = [sentence for document in kept_sentences(case) for sentence in document]
    for boundary, shorter, ids, lengths in zip(boundaries, [0, *boundaries], batch.ids, batch.lengths, strict=False):
        mine = [sentence for sentence in flat if shorter < len(sentence) <= boundary]
        rows = mine or [[PAD] * boundary]
        assert ids.tolist() == [row + [PAD] * (boundary - len(row)) for row in rows]
        assert lengths.tolist() == [len(row) for row in rows]
        assert ids.dtype == lengths.dtype == torch.int64


@given(ragged())
def test_every_bucket_is_in_every_batch(case):
    batch = pack_ragged(case)
    assert [ids.shape[1] for ids in batch.ids] == bucket_boundaries(case[1] + 2)
    assert all(len(ids) == len(lengths) > 0 for ids, lengths in zip(batch.ids, batch.lengths, strict=True))


def rows_of(batch) -> list[list[int]]:
    """The sentences behind the rows of the concatenated sentence vectors."""
    return [
        ids[:length].tolist()
        for bucket, lengths in zip(batch.ids, batch.lengths, strict=True)
        for ids, length in zip(bucket, lengths, strict=True)
    ]


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
def test_runs_are_documents_of_one_length(case):
    batch = pack_ragged(case)
    assert [vectors for vectors, count in batch.runs for _ in range(count)] == sorted(
        count + 1 for count in batch.sentence_counts
    )
    assert len({vectors for vectors, _ in batch.runs}) == len(batch.runs)


@given(ragged())
def test_tokens_and_slots_are_counted(case):
    batch = pack_ragged(case)
    assert batch.tokens == sum(len(sentence) for document in kept_sentences(case) for sentence in document)
    assert batch.slots == sum(len(bucket) * bucket.shape[1] for bucket in batch.ids)
    assert batch.slots >= batch.tokens


def test_documents_without_sentences_are_only_their_dcls():
    nothing = (np.empty(0, np.uint32), np.empty(0, np.int64))
    batch = pack_ragged(([nothing, nothing], 3, 4))
    assert batch.upper_rows.tolist() == [len(rows_of(batch))] * 2
    assert (batch.runs, batch.tokens, batch.sentence_counts) == (((1, 2),), 0, (0, 0))
    assert batch.document_rows.tolist() == [0, 1]


def test_lengths_of_any_integer_type_pack_alike():
    ids, lengths = np.arange(6, dtype="<u4"), np.array([1, 2, 3])
    packed = [pack_ragged(([(ids, lengths.astype(kind))], 3, 3)) for kind in ("<u2", "<u4", "<i8")]
    assert rows_of(packed[0]) == rows_of(packed[1]) == rows_of(packed[2])


def test_every_tensor_moves():
    ids, lengths = np.arange(6, dtype=np.uint32), np.array([1, 2, 3])
    batch = pack([(ids, lengths)], cls_id=CLS, sep_id=SEP, pad_id=PAD, sentence_tokens=3, sentences=3)
    moved = batch.to("meta")
    tensors = [*moved.ids, *moved.lengths, moved.upper_rows, moved.upper_positions, moved.sentence_rows,
               moved.document_rows]  # fmt: skip
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.runs, moved.tokens, moved.sentence_counts) == (batch.runs, batch.tokens, batch.sentence_counts)
