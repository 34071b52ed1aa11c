"""Test collections in their makers' formats (the texts are invented), rankings, and metrics that are trec_eval's."""

import gzip
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.baselines import bm25, collection_systems, encoders, words
from hmde_dist.evaluation.collection import open_collection
from hmde_dist.evaluation.ranking import MEASURES, evaluate_collection, named, rank, rerank, values_of_queries
from hmde_dist.evaluation.trec import matched, ordered, read_qrels, read_run, read_topics, write_run

SGML = """<DOC>
<DOCNO> SDA.940101.0001 </DOCNO>
<DOCID> SDA.940101.0001 </DOCID>
<TI> Eulen im Stadtpark gez\xe4hlt </TI>
<TX> Im Stadtpark leben acht Eulen. Sie jagen in der Nacht. </TX>
</DOC>
<DOC>
<DOCNO>SDA.940101.0002</DOCNO>
<HEADLINE>
<P>Neue Br&uuml;cke er&ouml;ffnet</P>
</HEADLINE>
<TEXT>
<P>Die Br&uuml;cke f&uuml;hrt &uuml;ber den Fluss.</P>
<P>Der Bau dauerte drei Jahre.</P>
</TEXT>
</DOC>
<DOC>
<DOCNO>SDA.940101.0003</DOCNO>
<TEXT>Der Markt verkauft Brot und Milch.</TEXT>
</DOC>
"""
CLEF_TOPICS = """<?xml version="1.0" encoding="utf-8"?>
<top>
<num> C141 </num>
<EN-title> Owls in the park </EN-title>
<EN-desc> Find reports on how many owls live in city parks.
Counting matters. </EN-desc>
<EN-narr> Reports on zoos are not relevant. </EN-narr>
</top>
<top>
<num> C142 </num>
<EN-title> Bridges &amp; rivers </EN-title>
<EN-desc> Find reports on new bridges. </EN-desc>
</top>
<top>
<num> C143 </num>
<EN-title> Volcanoes </EN-title>
<EN-desc> Find reports on eruptions. </EN-desc>
</top>
"""
LATER_TOPICS = """<topics><topic lang="de"><identifier>10.2452/401-AH</identifier><title>Eulen</title>
<description>Finde Berichte.</description><narrative>Alles zählt.</narrative></topic></topics>"""
TREC_TOPICS = """<top>
<num> Number: 301
<title> Topic: Owls
<desc> Description:
How many owls are there?

<narr> Narrative:
A relevant document counts them.
</top>
"""


@pytest.fixture
def clef(tmp_path):
    """A collection as CLEF 2003 distributes it: German documents, English topics, judgements without the C."""
    (tmp_path / "sda94.sgml").write_bytes(SGML.encode("iso-8859-1"))
    (tmp_path / "topics-en.xml").write_text(CLEF_TOPICS, encoding="utf-8")
    (tmp_path / "qrels-de.txt").write_text(
        "141 0 SDA.940101.0001 1\n141 0 SDA.940101.0003 0\n142 0 SDA.940101.0002 1\n143 0 SDA.940101.0003 0\n"
    )
    described = tmp_path / "clef.yaml"
    described.write_text("documents: {de: ['*.sgml']}\ntopics: {en: topics-en.xml}\nqrels: {de: qrels-de.txt}\n")
    return described


def test_topics_of_clef_and_trec(tmp_path):
    path = tmp_path / "topics.xml"
    path.write_text(CLEF_TOPICS, encoding="utf-8")
    topics = read_topics(path, "en")
    assert list(topics) == ["C141", "C142", "C143"]
    assert topics["C141"] == "Owls in the park\nFind reports on how many owls live in city parks. Counting matters."
    assert topics["C142"] == "Bridges & rivers\nFind reports on new bridges."
    assert read_topics(path, "en", ["title"])["C141"] == "Owls in the park"
    path.write_text(LATER_TOPICS, encoding="utf-8")
    assert read_topics(path, "de", ["title", "narrative"]) == {"10.2452/401-AH": "Eulen\nAlles zählt."}
    path.write_text(TREC_TOPICS)
    assert read_topics(path, "en", ["title", "description", "narrative"]) == {
        "301": "Owls\nHow many owls are there?\nA relevant document counts them."
    }


def test_topics_as_json_lines_and_tables(tmp_path):
    neuclir = tmp_path / "neuclir.jsonl"
    topic = {"topic_id": "7", "topics": []}
    for lang, source, title in (
        ("zho", "google translation", "机器"),
        ("zho", "human translation", "人"),
        ("eng", "original", "By hand"),
    ):
        topic["topics"].append({"lang": lang, "source": source, "topic_title": title, "topic_description": title + "!"})
    neuclir.write_text(json.dumps(topic) + "\n", encoding="utf-8")
    assert read_topics(neuclir, "zh") == {"7": "人\n人!"}
    assert read_topics(neuclir, "en", ["title"]) == {"7": "By hand"}
    with pytest.raises(InputError, match="no topics in fa"):
        read_topics(neuclir, "fa")
    mldr = tmp_path / "test.jsonl.gz"
    record = {"query_id": "q-de-1", "query": "Wie viele Eulen?", "positive_passages": [{"docid": "d1", "text": "…"}]}
    mldr.write_bytes(gzip.compress((json.dumps(record) + "\n").encode()))
    assert read_topics(mldr, "de") == {"q-de-1": "Wie viele Eulen?"}
    assert read_qrels(mldr) == {"q-de-1": {"d1": 1}}
    table = tmp_path / "queries.tsv"
    table.write_text("1\thow many owls\n2\tnew bridge\n")
    assert read_topics(table, "en") == {"1": "how many owls", "2": "new bridge"}


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (read_qrels, "141 0 doc\n", ":1: not a judgement"),
        (read_qrels, "141 0 doc yes\n", ":1: not a judgement"),
        (read_qrels, "\n", "holds no judgements"),
        (read_run, "141 Q0 doc 1\n", ":1: not a line of a run"),
        (read_run, "1 Q0 d 1 0.5 a\n1 Q0 d 2 0.4 a\n", ':2: document "d" occurs twice for topic "1"'),
        (lambda path: read_topics(path, "en"), "<top><num>1</num><FR-desc></FR-desc></top>", 'topic "1" has no text'),
        (lambda path: read_topics(path, "en"), "nothing", "holds no topics"),
    ],
)
def test_files_of_other_kinds_are_refused_by_line(tmp_path, reader, content, message):
    path = tmp_path / "file.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=r"file\.txt") as error:
        reader(path)
    assert message in str(error.value)


def test_clef_is_read_and_judged_as_distributed(clef):
    collection = open_collection(clef)
    (pair,) = collection.pairs
    assert pair.name == "en-de"
    assert pair.qrels == {"141": {"SDA.940101.0001": 1, "SDA.940101.0003": 0}, "142": {"SDA.940101.0002": 1}}
    assert pair.left_out == {"topics without a relevant document": 1}
    documents = {document.id: document for document in collection.documents("de")}
    assert documents["SDA.940101.0001"].text.splitlines() == [
        "Eulen im Stadtpark gezählt",
        "Im Stadtpark leben acht Eulen. Sie jagen in der Nacht.",
    ]
    assert documents["SDA.940101.0002"].text.startswith("Neue Brücke eröffnet\nDie Brücke führt über den Fluss.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("topics: {en: topics-en.xml}", "topics: {en: none.xml}"), "none.xml: cannot be read"),
        (("qrels: {de:", "qrels: {fi:"), 'no qrels for documents in "de"'),
        (("'*.sgml'", "'*.trec'"), r"there is no \*.trec"),
        (("documents:", "document:"), "documents: Field required; document: Extra inputs"),
    ],
)
def test_a_collection_that_does_not_fit_is_refused(clef, change, message):
    clef.write_text(clef.read_text().replace(*change))
    with pytest.raises(InputError, match=message):
        open_collection(clef)


def test_a_beir_folder(tmp_path):
    corpus = [
        {"_id": "d1", "title": "Owls", "text": "They hunt at night."},
        {"_id": "d2", "title": "Only a title", "text": ""},
        {"_id": "d3", "title": "", "text": ""},
    ]
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in corpus))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "owls", "metadata": {}}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq9\td1\t1\n")
    collection = open_collection(tmp_path, ["en-en"])
    (pair,) = collection.pairs
    assert (pair.name, pair.topics, pair.qrels) == ("en-en", {"q1": "owls"}, {"q1": {"d1": 2}})
    assert pair.left_out == {"judged topics without a text": 1}
    assert [(d.id, d.text) for d in collection.documents("en")] == [
        ("d1", "Owls\nThey hunt at night."),
        ("d2", "Only a title\n"),
    ]
    with pytest.raises(InputError, match="no BEIR folder"):
        open_collection(tmp_path / "qrels")


def by_hand(ranking: list[str], judged: dict[str, int]) -> dict[str, float]:
    """The textbook's definitions over a ranking whose order is given."""
    relevant = sum(value > 0 for value in judged.values())
    hits = [judged.get(id_, 0) for id_ in ranking]
    precision = [sum(v > 0 for v in hits[: n + 1]) / (n + 1) for n in range(len(hits))]
    gain = lambda values: sum(v / math.log2(n + 2) for n, v in enumerate(values))  # noqa: E731
    found = {
        "MAP": sum(p for p, v in zip(precision, hits, strict=True) if v > 0) / relevant,
        "MRR": next((1 / (n + 1) for n, v in enumerate(hits) if v > 0), 0.0),
    }
    for k in (10, 20):
        found[f"nDCG@{k}"] = gain(hits[:k]) / gain(sorted(judged.values(), reverse=True)[:k])
    for k in (100, 1000):
        found[f"R@{k}"] = sum(v > 0 for v in hits[:k]) / relevant
    return found


@given(st.integers(0, 10_000))
def test_metrics_of_rankings_with_ties_are_trec_evals(seed):
    """Our order and trec_eval's are one, also through a file: few distinct scores make many ties."""
    random = np.random.default_rng(seed)
    ids = [f"d{number}" for number in random.permutation(150)]
    scores = random.integers(0, 6, size=(5, 150)).astype(np.float32) / np.float32(7)
    qrels = {
        f"q{q}": {ids[n]: int(random.integers(0, 3)) for n in random.choice(150, 20, replace=False)} | {"gone": 1}
        for q in range(5)
    }
    rankings = rank(lambda q, c: scores[q][:, c], 5, ids, 120)
    run = dict(zip(qrels, rankings, strict=True))
    values = values_of_queries(run, qrels)
    for number, (topic, judged) in enumerate(qrels.items()):
        expected = by_hand([id_ for id_, _ in run[topic]], judged)
        assert {name: values[name][number] for name in MEASURES} == pytest.approx(expected)


def test_a_run_file_is_the_ranking_again_and_pytrec_eval_reads_it(tmp_path):
    import pytrec_eval

    random = np.random.default_rng(5)
    ids = [f"d{number}" for number in range(300)]
    scores = random.normal(size=(3, 300)).astype(np.float32)
    scores[:, 100:200] = scores[:, :1]  # ties
    qrels = {f"q{q}": {id_: int(random.integers(0, 2)) for id_ in ids[::7]} for q in range(3)}
    run = dict(zip(qrels, rank(lambda q, c: scores[q][:, c], 3, ids, 200), strict=True))
    write_run(tmp_path / "our.run", run, "our system")
    assert read_run(tmp_path / "our.run") == run
    lines = [line.split() for line in (tmp_path / "our.run").read_text().splitlines()]
    assert len(lines) == 600 and {(line[1], line[5]) for line in lines} == {("Q0", "our-system")}
    assert [int(line[3]) for line in lines[:200]] == list(range(1, 201))
    with open(tmp_path / "our.run") as file:
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"map", "ndcg_cut.10", "recall.100"}).evaluate(
            pytrec_eval.parse_run(file)
        )
    values = values_of_queries(run, qrels)
    for number, topic in enumerate(qrels):
        assert values["MAP"][number] == theirs[topic]["map"]
        assert values["nDCG@10"][number] == theirs[topic]["ndcg_cut_10"]
        assert values["R@100"][number] == theirs[topic]["recall_100"]
    with pytest.raises(InputError, match="white space"):
        write_run(tmp_path / "bad.run", {"q": [("a b", 1.0)]}, "x")
    assert not (tmp_path / "bad.run").exists()


def test_blocks_do_not_change_a_ranking(monkeypatch):
    random = np.random.default_rng(2)
    scores = random.integers(0, 9, size=(7, 500)).astype(np.float32)
    ids = [f"d{number}" for number in random.permutation(500)]
    whole = rank(lambda q, c: scores[q][:, c], 7, ids, 30)
    assert whole == [ordered(ids, row)[:30] for row in scores]
    monkeypatch.setattr("hmde_dist.evaluation.ranking.QUERY_BLOCK", 3)
    monkeypatch.setattr("hmde_dist.evaluation.ranking.DOCUMENT_BLOCK", 37)
    assert rank(lambda q, c: scores[q][:, c], 7, ids, 30) == whole
    with pytest.raises(InputError, match="no finite numbers"):
        rank(lambda q, c: np.full((len(q), len(c)), np.nan), 7, ids, 30)


def test_re_ranking_orders_the_head_and_keeps_the_tail():
    given_run = {"q": [(f"d{number}", 1 / (1 + number)) for number in range(6)]}
    scores = np.array([[0.1, 0.9, 0.5]])
    run = rerank(lambda q, c: scores[q][:, c], ["q", "absent"], ["d0", "d1", "d2"], given_run, 3)
    assert [id_ for id_, _ in run["q"]] == ["d1", "d2", "d0", "d3", "d4", "d5"]
    assert list(run) == ["q"]
    scores_of_run = [score for _, score in run["q"]]
    assert all(a > b for a, b in itertools.pairwise(scores_of_run))


def test_ids_of_clef_topics_are_matched_only_if_none_fits():
    qrels = {"141": {"d": 1}}
    assert matched({"C141": "a", "C142": "b"}, qrels) == {"141": "a", "142": "b"}
    assert matched({"141": "a", "C141": "b"}, qrels) == {"141": "a", "C141": "b"}


def test_words_of_unspaced_scripts_are_pairs():
    assert words("Owls hunt, 2 eulen; été") == ["owls", "hunt", "2", "eulen", "été"]
    assert words("夜行性の鳥 and 鳥") == ["夜行", "行性", "性の", "の鳥", "and", "鳥"]
    assert words("हिंदी में") == ["हिंदी", "में"]


def test_bm25_is_the_formula(tmp_path):
    texts = ["owl owl night", "owl bridge", "bridge river bridge water", "milk"]
    documents = [Document(id=str(n), lang="en", text=text) for n, text in enumerate(texts)]
    ids, scorer = bm25(documents, tmp_path)
    score = scorer([Document(id="q", lang="en", text="owl bridge bridge nowhere"), Document("r", "en", text="none")])
    lengths = [len(text.split()) for text in texts]
    expected = []
    for text, length in zip(texts, lengths, strict=True):
        total = 0.0
        for word in ("owl", "bridge", "bridge"):
            having = sum(word in other.split() for other in texts)
            tf = text.split().count(word)
            norm = 1.5 * (1 - 0.75 + 0.75 * length / np.mean(lengths))
            total += math.log(1 + (4 - having + 0.5) / (having + 0.5)) * tf / (tf + norm)
        expected.append(total)
    found = score(np.array([0, 1]), np.arange(4))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert not found[1].any() and ids == ["0", "1", "2", "3"]


def test_a_collection_is_ranked_tested_and_re_ranked(clef, model, tmp_path):
    systems = collection_systems(model, "sentence-mean", baselines=True)
    runs = tmp_path / "runs"
    report = evaluate_collection(open_collection(clef), systems, depth=2, runs=runs)
    assert list(report["systems"]) == ["HMDE", "mean of its sentence vectors", "untrained", "BM25"]
    for name, system in report["systems"].items():
        assert system["pairs"]["en-de"]["queries"] == 2
        run = read_run(runs / name.replace(" ", "-") / "en-de.run")
        assert {len(ranking) for ranking in run.values()} == {2}
        qrels = open_collection(clef).pairs[0].qrels
        assert system["macro"]["MAP"] == pytest.approx(values_of_queries(run, qrels)["MAP"].mean())
    assert {row["against"] for row in report["significance"]["MAP"]} == set(list(systems)[1:])
    assert report["left_out"] == {"en-de": {"topics without a relevant document": 1}}

    again = evaluate_collection(
        open_collection(clef),
        {"HMDE": systems["HMDE"]},
        rerank_given=runs / "BM25",
        rerank_depth=1,
        beside=[runs / "untrained", runs / "HMDE"],
    )
    assert list(again["systems"]) == ["HMDE", "given run", "untrained", str(runs / "HMDE")]
    assert again["systems"][str(runs / "HMDE")]["pairs"] == report["systems"]["HMDE"]["pairs"]
    # One document re-ranked is none.
    assert again["systems"]["HMDE"]["macro"] == again["systems"]["given run"]["macro"]
    for name in ("given run", "untrained"):
        before = report["systems"]["BM25" if name == "given run" else name]
        assert again["systems"][name]["pairs"] == before["pairs"]


def test_folders_are_told_apart_in_tables(tmp_path):
    one, other = tmp_path / "a" / "HMDE", tmp_path / "b" / "x"
    assert named([one, other], ["HMDE"]) == {str(one): one, "x": other}
    assert list(named([other, tmp_path / "c" / "x"], [])) == ["x", str(tmp_path / "c" / "x")]
    with pytest.raises(InputError, match="named twice"):
        named([other, other, other], [])


def test_runs_and_documents_of_another_collection_are_refused(clef, model, tmp_path):
    systems = collection_systems(model)
    (tmp_path / "other.run").write_text("141 Q0 LA1 1 0.5 x\n")
    with pytest.raises(InputError, match='that the collection lacks in de, such as "LA1"'):
        evaluate_collection(open_collection(clef), systems, rerank_given=tmp_path / "other.run")
    (tmp_path / "other.run").write_text("999 Q0 SDA.940101.0001 1 0.5 x\n")
    with pytest.raises(InputError, match="ranks nothing for the topics"):
        evaluate_collection(open_collection(clef), systems, rerank_given=tmp_path / "other.run")
    (clef.parent / "qrels-de.txt").write_text("141 0 LA1 1\n")
    with pytest.raises(InputError, match="none of the relevant documents"):
        evaluate_collection(open_collection(clef), systems)


def test_the_command_on_a_collection(evaluate, clef, model_folder, tmp_path):
    command = ("retrieval", "--model", model_folder, "--collection", clef, "--baselines", "--runs", tmp_path / "runs")
    job = evaluate(*command, "--out", tmp_path / "report.json")
    assert job.code == 0, job.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["task"], report["queries"]) == ("retrieval", "document")
    for name, system in report["systems"].items():
        row = next(line for line in job.output.splitlines() if line.startswith(name + " "))
        assert row.split()[-6:] == [f"{system['macro'][measure]:.3f}" for measure in MEASURES]
    maps = [f"{system['pairs']['en-de']['MAP']:.3f}" for system in report["systems"].values()]
    assert next(line for line in job.output.splitlines() if line.startswith("en-de ")).split()[1:] == maps
    assert "en-de: 1 topics without a relevant document" in job.output
    assert "MAP: significantly better than BM25 in 0 of 1 pairs, worse in 0" in job.output
    again = ("--rerank", tmp_path / "runs" / "BM25", "--out", tmp_path / "again.json")
    job = evaluate("retrieval", "--model", model_folder, "--collection", clef, *again)
    assert job.code == 0 and "given run" in job.output, job.output
    assert json.loads((tmp_path / "again.json").read_text())["rerank"]["depth"] == 100
    job = evaluate("retrieval", "--model", model_folder, "--collection", tmp_path / "none.yaml")
    assert job.code == 2 and "cannot be read" in job.output


def test_other_models_are_evaluated_beside(clef, model, model_folder, tokenizer, tmp_path):
    """A sentence-transformers model is one; an export of ours, too; a folder of anything else is none."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    model.lower.save_pretrained(tmp_path / "lower")
    tokenizer.save_pretrained(tmp_path / "lower")
    transformer = Transformer(str(tmp_path / "lower"), max_seq_length=30)
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(tmp_path / "labse"))
    others = [tmp_path / "labse", model_folder]
    report = evaluate_collection(open_collection(clef), collection_systems(model, others=others), depth=3)
    assert list(report["systems"]) == ["HMDE", "labse", "model"]
    assert report["systems"]["model"]["pairs"] == report["systems"]["HMDE"]["pairs"]
    documents = list(open_collection(clef).documents("de"))
    expected = SentenceTransformer(str(tmp_path / "labse"), device="cpu").encode([d.text for d in documents])
    np.testing.assert_allclose(encoders(model, others=others)["labse"](documents), expected, rtol=1e-5)
    for folder, message in ((tmp_path, "no exported model"), (tmp_path / "none", "no exported model")):
        with pytest.raises(InputError, match=message):
            collection_systems(model, others=[folder])
