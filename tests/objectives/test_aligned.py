"""Which sentences are translations of each other."""

from dataclasses import replace

import numpy as np
import pytest
from toy import batch_of_pairs, facts_of

from hmde_dist.objectives.aligned import aligned_sentences


def test_versions_of_equally_many_sentences_are_aligned_by_place_and_others_are_not():
    aligned = aligned_sentences(batch_of_pairs([0, 1, 5]))  # 4 and 4 sentences, 2 and 3, 1 and 1
    assert aligned.first.tolist() == [0, 1, 2, 3, 6]
    assert aligned.second.tolist() == [7, 8, 9, 10, 14]
    assert aligned.places.tolist() == [0, 1, 2, 3, 0]
    assert aligned.first_documents.tolist() == [0, 0, 0, 0, 2] and aligned.second_documents.tolist() == [3, 3, 3, 3, 5]


def test_documents_come_in_any_order_and_explicit_negatives_are_left_out():
    batch = batch_of_pairs([0, 5])  # places in the chunk: x0 x5 y0 y5
    # Numbers of a rank of four pairs with explicit negatives, of which this chunk has one pair.
    batch = replace(batch, facts=replace(batch.facts, numbers=np.array([14, 2, 10, 6]), sides=4))
    aligned = aligned_sentences(batch)
    assert aligned.first.tolist() == [4] and aligned.second.tolist() == [9]


@pytest.mark.parametrize(
    ("sentences", "starts", "expected"),
    [
        ((4, 4), (0, 0), [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ((9, 9), (2, 3), [(1, 4), (2, 5), (3, 6)]),  # windows that overlap
        ((9, 9), (5, 1), []),  # that do not
        ((9, 8), (0, 0), []),  # cut to as many, but not as many whole
    ],
)
def test_a_document_that_is_cut_is_aligned_by_its_whole_length_and_place(sentences, starts, expected):
    batch = batch_of_pairs([0])
    facts = facts_of(np.arange(2), np.zeros(2, np.int64), np.arange(2), sentences)
    aligned = aligned_sentences(replace(batch, facts=replace(facts, starts=np.array(starts))))
    assert list(zip(aligned.first.tolist(), aligned.second.tolist(), strict=True)) == expected
    assert aligned.places.tolist() == [first + starts[0] for first, _ in expected]
