"""Windows over the tokens of a document."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.stream.sliding_windows import SlidingWindows, cut

shapes = st.integers(1, 12).flatmap(lambda window: st.builds(SlidingWindows, st.just(window), st.integers(1, window)))


@given(shapes, st.integers(0, 60))
def test_windows_cover_every_token_in_order_and_overlap_by_window_less_stride(shape, tokens):
    document = np.arange(tokens, dtype=np.uint32) + 7
    ids, lengths = shape.cut(document)
    windows = np.split(ids, np.cumsum(lengths))[:-1]
    assert ids.dtype == document.dtype and len(windows) == len(lengths) == shape.count(tokens)
    if tokens <= shape.window:
        assert [window.tolist() for window in windows] == [document.tolist()] * (tokens > 0)
    for number, window in enumerate(windows):
        assert window.tolist() == document[number * shape.stride :][: shape.window].tolist()
    for one, other in pairwise(windows):
        assert len(one) == shape.window
        overlap = shape.window - shape.stride
        assert one[shape.stride :].tolist() == other[:overlap].tolist() and len(other) > overlap
    new = [window[shape.window - shape.stride if number else 0 :] for number, window in enumerate(windows)]
    assert np.concatenate([*new, document[:0]]).tolist() == document.tolist()


@given(shapes, st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(1, 8))
def test_count_and_size_are_those_of_the_cut_document(shape, tokens, most):
    lengths = [shape.cut(np.arange(n))[1] for n in tokens]
    counts = shape.count(np.array(tokens, dtype=np.uint32))
    assert counts.tolist() == [len(one) for one in lengths]
    kept = np.minimum(counts, most)
    assert shape.size(np.array(tokens, dtype=np.uint32), kept).tolist() == [int(one[:most].sum()) for one in lengths]


@given(shapes, st.integers(1, 8))
def test_a_document_within_reach_is_read_whole_and_a_longer_one_is_not(shape, most):
    assert shape.count(shape.reach(most)) == most
    assert shape.count(shape.reach(most) + 1) == most + 1


def test_without_windows_a_document_is_as_it_was():
    document = np.arange(5, dtype=np.uint32), np.array([2, 3])
    assert cut(document, None) is document
    ids, lengths = cut(document, SlidingWindows(4, 2))
    assert (ids.tolist(), lengths.tolist()) == ([0, 1, 2, 3, 2, 3, 4], [4, 3])


@pytest.mark.parametrize("tokens", [0, 1, 10**9, 2**32 - 1])
def test_numbers_of_tokens_do_not_overflow(tokens):
    counted = SlidingWindows(126, 63).count(np.array([tokens], dtype=np.uint32))
    assert counted.dtype == np.int64 and counted[0] == (tokens > 0) + max(0, -(-(tokens - 126) // 63))
