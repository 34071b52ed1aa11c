from pathlib import Path

import numpy as np

from hmde_dist.stream.category_negatives import CategoryNegatives
from hmde_dist.stream.index import ShardIndex


def index_of(groups) -> ShardIndex:
    """Groups as (languages, categories); languages may be beyond one word of 64 bits."""
    counts = [len(languages) for languages, _ in groups]
    categories = [len(of_group) for _, of_group in groups]
    columns = {
        "group_documents": np.cumsum([0, *counts]).astype(np.uint32),
        "document_language": np.array([n for languages, _ in groups for n in languages], dtype=np.uint16),
        "group_categories": np.cumsum([0, *categories]).astype(np.uint64),
        "category": np.array([c for _, of_group in groups for c in of_group], dtype=np.uint32),
    }
    return ShardIndex(Path("shards"), {"groups": len(groups), "languages": [str(n) for n in range(70)]}, columns)


def random_groups(count=300):
    draw = np.random.default_rng(1)
    alone = [([0, 1], [1000 + number]) for number in range(30)]
    return alone + [
        (sorted({0, *draw.choice([1, 2, 65], 2).tolist()}), np.unique(draw.zipf(1.5, 3).clip(max=60) - 1).tolist())
        for _ in range(count)
    ]


def test_a_negative_shares_a_category_and_the_language_of_its_side():
    groups = random_groups()
    negatives = CategoryNegatives(index_of(groups), seed=5)
    numbers = np.arange(len(groups))
    documents = np.array([[0, len(languages) - 1] for languages, _ in groups])
    drawn, places, found = negatives.draw(numbers, documents, epoch=2)
    for group, (languages, categories) in enumerate(groups):
        for side in (0, 1):
            language, other = languages[documents[group, side]], int(drawn[group, side])
            assert other != group and groups[other][0][places[group, side]] == language
            usable = {
                c
                for number, (theirs, of_other) in enumerate(groups)
                if number != group and language in theirs
                for c in set(of_other) & set(categories)
            }
            assert found[group, side] == bool(usable)
            if usable:
                assert usable & set(groups[other][1])
    assert 0.5 < found.mean() < 1


def test_categories_are_drawn_alike_whatever_their_size():
    """Category 0 has 50 other groups, category 1 has two."""
    groups = [([0, 1], [0, 1])] + [([0, 1], [0])] * 50 + [([0, 1], [1])] * 2
    negatives = CategoryNegatives(index_of(groups), seed=0)
    drawn = [int(negatives.draw(np.array([0]), np.array([[0, 1]]), epoch)[0][0, 0]) for epoch in range(400)]
    share = np.mean([number > 50 for number in drawn])
    assert abs(share - 0.5) < 0.08 and len(set(drawn)) > 30


def test_draws_depend_on_nothing_but_their_keys():
    negatives = CategoryNegatives(index_of(random_groups()), seed=5)
    numbers, documents = np.arange(300), np.tile([0, 1], (300, 1))
    whole = negatives.draw(numbers, documents, 3)[0]
    part = negatives.draw(numbers[100:200], documents[100:200], 3)[0]
    assert np.array_equal(whole[100:200], part)
    assert not np.array_equal(whole, negatives.draw(numbers, documents, 4)[0])


def test_without_a_category_any_document_of_the_language_stands_in():
    groups = [([0, 1], [7])] + [([0], [8])] * 2000 + [([0, 1], [9])]
    drawn, places, found = CategoryNegatives(index_of(groups), 0).draw(np.array([0]), np.array([[0, 1]]), 0)
    assert not found.any() and drawn[0, 1] == 2001 and places[0].tolist() == [0, 1]
    assert 1 <= drawn[0, 0] <= 2001


def test_a_rare_language_gives_all_its_documents_alike():
    groups = [([0, 1], [7])] + [([0], [8])] * 5000 + [([0, 1], [9 + n]) for n in range(4)]
    negatives = CategoryNegatives(index_of(groups), 0)
    drawn = [int(negatives.draw(np.array([0]), np.array([[0, 1]]), epoch)[0][0, 1]) for epoch in range(80)]
    assert set(drawn) == {5001, 5002, 5003, 5004}
