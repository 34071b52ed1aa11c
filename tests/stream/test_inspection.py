import json
from collections import Counter

import numpy as np
import pytest

from hmde_dist.command import InputError
from hmde_dist.stream import inspection
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.inspection import BINS, find_group, inspect, plot, read_groups, short
from hmde_dist.stream.reader import GroupReader


def made_index(groups: list[tuple[int, dict[int, tuple[int, int]]]], languages: int, clusters: int) -> ShardIndex:
    """An index without shards; a group is its category and, by language, the sentences and tokens of its document."""
    documents = [(language, *facts) for _, held in groups for language, facts in held.items()]
    held = [len(held) for _, held in groups]
    columns = {
        "group_cluster": np.array([cluster for cluster, _ in groups], dtype=np.uint32),
        "group_documents": np.cumsum([0, *held], dtype=np.uint32),
        "document_language": np.array([d[0] for d in documents], dtype=np.uint16),
        "document_sentences": np.array([d[1] for d in documents], dtype=np.uint32),
        "document_tokens": np.array([d[2] for d in documents], dtype=np.uint32),
    }
    manifest = {
        "container": "mds", "shards": [], "columns": [], "dropped": {}, "groups": len(groups),
        "languages": [f"l{number}" for number in range(languages)],
        "clusters": ["", *(f"c{number}" for number in range(1, clusters))],
        "documents": len(documents), "sentences": sum(d[1] for d in documents), "tokens": sum(d[2] for d in documents),
        "sentence_tokens": 24, "vocabulary": 100, "long_sentences_cut": 0,
    }  # fmt: skip
    return ShardIndex(None, manifest, columns)


@pytest.fixture(scope="module")
def groups():
    """700 groups in 14 of 15 languages and 39 of 40 categories."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(700):
        languages = sorted(random.choice(14, size=random.integers(1, 6), replace=False).tolist())
        lengths = np.exp(random.normal(2, 1, len(languages))).astype(int) + 1
        held = {lang: (int(n), int(n * random.integers(5, 20))) for lang, n in zip(languages, lengths, strict=True)}
        made.append((min(int(random.zipf(1.5)) - 1, 38), held))
    return made


@pytest.fixture(scope="module")
def report(groups):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "CHUNK", 256)
        return inspect(made_index(groups, languages=15, clusters=40))


def test_languages_are_counted(groups, report):
    assert list(report["languages"]) == [f"l{number}" for number in range(14)], "one has no document"
    for number in range(14):
        mine = [held[number] for _, held in groups if number in held]
        facts = report["languages"][f"l{number}"]
        assert facts["documents"] == len(mine)
        assert facts["sentences"] == sum(sentences for sentences, _ in mine)
        assert facts["tokens"] == sum(tokens for _, tokens in mine)
        assert facts["tokens_per_sentence"] == pytest.approx(facts["tokens"] / facts["sentences"])
        for position, column in enumerate(("document_sentences", "document_tokens")):
            lengths = [document[position] for document in mine]
            assert facts[column]["median"] == np.median(lengths)
            assert (facts[column]["min"], facts[column]["max"]) == (min(lengths), max(lengths))
            edges = 2 ** (np.arange(len(facts[column]["histogram"]) + 1) / BINS)
            assert facts[column]["histogram"] == np.histogram(lengths, edges)[0].tolist()


def test_pairs_are_counted_over_chunks(groups, report):
    both, tokens = Counter(), Counter()
    for _, held in groups:
        for i in held:
            for j in held:
                if i < j:
                    both[f"l{i}", f"l{j}"] += 1
                    tokens[f"l{i}", f"l{j}"] += held[i][1] + held[j][1]
    assert {tuple(pair["languages"]): pair["groups"] for pair in report["pairs"]} == both
    assert {tuple(pair["languages"]): pair["tokens"] for pair in report["pairs"]} == tokens
    sizes = [pair["groups"] for pair in report["pairs"]]
    assert sizes == sorted(sizes, reverse=True)


def test_sums_do_not_overflow_the_columns():
    many = 3_000_000_000
    report = inspect(made_index([(0, {0: (many, many), 1: (many, many)})] * 3, languages=2, clusters=1))
    assert report["languages"]["l0"]["tokens"] == report["languages"]["l1"]["sentences"] == 3 * many
    assert report["pairs"] == [{"languages": ["l0", "l1"], "groups": 3, "tokens": 6 * many}]


def test_groups_and_categories_are_counted(groups, report):
    assert report["groups_by_number_of_languages"] == {
        str(n): count for n, count in sorted(Counter(len(held) for _, held in groups).items())
    }
    sizes = Counter(cluster for cluster, _ in groups)
    without = sizes.pop(0)
    categories = report["categories"]
    assert (categories["count"], categories["groups_without"]) == (len(sizes), without)
    assert categories["share_without"] == without / 700
    assert [entry["groups"] for entry in categories["largest"]] == sorted(sizes.values())[:-6:-1]
    assert all(sizes[int(entry["name"][1:])] == entry["groups"] for entry in categories["largest"])
    assert categories["quantiles"]["median"] == np.median(list(sizes.values()))
    ordered = sorted(sizes.values(), reverse=True)
    assert categories["sizes_at_ranks"] == [ordered[rank - 1] for rank in categories["ranks"]]
    assert (categories["ranks"][0], categories["ranks"][-1]) == (1, len(sizes))


def test_a_set_without_categories_and_of_one_document(tmp_path):
    report = inspect(made_index([(0, {0: (1, 1)})], languages=1, clusters=1))
    assert report["categories"] == {
        "count": 0, "groups_without": 1, "share_without": 1.0,
        "quantiles": {}, "largest": [], "ranks": [], "sizes_at_ranks": [],
    }  # fmt: skip
    assert report["pairs"] == []
    plot(report, tmp_path / "plot.png")


def test_the_report_is_json_and_the_plot_a_picture(report, tmp_path):
    assert json.loads(json.dumps(report)) == report
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_languages_beyond_the_twelfth_are_drawn_as_one(report):
    *largest, (name, _, facts) = inspection._plotted(report["languages"])
    assert (len(largest), name) == (12, "2 others")
    rest = [f for n, f in report["languages"].items() if n not in {n for n, _, _ in largest}]
    assert facts["documents"] == sum(f["documents"] for f in rest)
    assert sum(facts["document_tokens"]["histogram"]) == facts["documents"]
    assert facts["documents"] <= 2 * min(f["documents"] for _, _, f in largest)


@pytest.mark.parametrize("container", ["mds", "wds"])
def test_groups_are_found_and_read(container, shards, tokenizer):
    index = ShardIndex.open(shards(container, "validation"))
    reader = GroupReader(index)
    for group in range(index.groups):
        assert find_group(index, reader[group].id) == group
    with pytest.raises(InputError, match='none of its 4 groups has the id "nowhere"'):
        find_group(index, "nowhere")
    (shown,) = read_groups(index, tokenizer, [2], sentences=3)
    sample = reader[2]
    assert shown["id"] == sample.id
    assert shown["category"] == index.manifest["clusters"][index.columns["group_cluster"][2]]
    assert [document["language"] for document in shown["documents"]] == sample.languages
    for number, document in enumerate(shown["documents"]):
        tokens, lengths = sample.document(number)
        assert (document["sentences"], document["tokens"]) == (len(lengths), len(tokens))
        assert [piece["tokens"] for piece in document["first"]] == lengths[:3].tolist()
        assert document["first"][1]["text"] == tokenizer.decode(tokens[lengths[0] : lengths[0] + lengths[1]].tolist())
    (everything,) = read_groups(index, tokenizer, [2], sentences=10**6)
    assert [len(document["first"]) for document in everything["documents"]] == sample.sentence_counts.tolist()


def test_counts_are_written_short():
    numbers = [0, 37, 9999, 9999.4, 10_000, 12_345, 999_900, 4_560_000, 10**7, 123 * 10**9, 10**15, 10**17]
    expected = ["0", "37", "9999", "9999", "10k", "12.3k", "1M", "4.56M", "10M", "123G", "1000T", "100000T"]
    assert [short(number) for number in numbers] == expected
