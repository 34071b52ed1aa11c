"""Laws of the measures, on encoders that are biased as the measure says, or not at all."""

import json

import numpy as np
import pytest

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation import bias
from hmde_dist.evaluation.bias import (
    SEGMENTS,
    language_bias,
    length_stress,
    position_bias,
    prefix,
    sample,
    sentences_of,
)
from hmde_dist.model.export import load_model

LANGUAGES = ("de", "en", "ja")


def corpus(groups: int = 40, sentences: int = 12) -> list[Document]:
    """Sentences are names: group.sentence.language."""
    return [
        Document(f"g{g}", lang, sentences=tuple(f"{g}.{number}.{lang}" for number in range(sentences)))
        for g in range(groups)
        for lang in LANGUAGES
    ]


def direction(name: str) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).normal(size=64)


def topic_vectors(documents, weigh=lambda count: np.ones(count), language=0.0):
    """Every sentence is a direction of its group, the same in all languages; a document is their weighed sum, and a
    direction of its language."""
    rows = []
    for document in documents:
        parts = np.array([direction(sentence.split(".")[0]) for sentence in document.sentences])
        weights = weigh(len(parts))
        row = weights @ parts / weights.sum()
        rows.append(row + language * 8 * direction("language " + document.lang))
    return np.array(rows)


def only_language(documents):
    return np.array([direction("language " + document.lang) for document in documents])


def test_a_model_that_ignores_order_has_no_slope():
    report = position_bias(sentences_of(corpus()), topic_vectors, places=8)
    for lang in LANGUAGES:
        found = report["languages"][lang]
        assert found["slope"] == 0.0 and found["p"] == 1.0 and found["interval"] == [0.0, 0.0]
        assert np.ptp(found["cosine_by_place"]) < 1e-9
        assert found["documents"] == 40
    # Sentences mean the same in all languages, so a foreign segment is as near as one of the document's own.
    assert all(abs(found["difference"]) < 1e-9 for found in report["foreign"].values())
    assert len(report["foreign"]) == 6
    assert report["macro"] == {"slope": 0.0, "foreign": pytest.approx(0.0, abs=1e-9)}


def test_a_model_that_reads_the_beginning_falls_and_one_that_reads_the_end_rises():
    groups = sentences_of(corpus())

    def first(count):
        return (np.arange(count) < count // SEGMENTS).astype(float) if count >= SEGMENTS else np.ones(count)

    report = position_bias(groups, lambda d: topic_vectors(d, first), places=8)
    for found in report["languages"].values():
        assert found["cosine_by_place"][0] == pytest.approx(1.0)
        # From 1 at the first place to about 0 at the others: the least-squares line falls 0.3 a place.
        assert found["slope"] == pytest.approx(-0.3, abs=0.05) and found["p"] < 0.01
        assert found["interval"][1] < 0
    rising = position_bias(groups, lambda d: topic_vectors(d, lambda n: np.arange(1.0, n + 1) ** 2), places=8)
    assert all(found["slope"] > 0.05 for found in rising["languages"].values())


def test_a_foreign_segment_counts_for_nothing_in_a_model_of_languages():
    report = position_bias(sentences_of(corpus(12)), only_language, places=8)
    for pair, found in report["foreign"].items():
        other, lang = pair.split("-")
        expected = np.corrcoef(direction("language " + other), direction("language " + lang))[0, 1]
        assert found["difference"] == pytest.approx(expected - 1, abs=0.2) and found["p"] < 0.01
    assert report["macro"]["slope"] == 0.0


def test_segments_fit_into_the_model():
    assert prefix(["a", "b", "c"], 2, lambda s: [1] * len(s)) == ("a", "b")
    assert prefix(["a", "b", "c"], 2, lambda s: [1, 2, 1]) == ("a",)
    assert prefix(["a"], 2, lambda s: [3]) == ()
    longest = []

    def encode(documents):
        longest.append(max(len(document.sentences) for document in documents))
        return topic_vectors(documents)

    position_bias(sentences_of(corpus(8)), encode, places=11)
    assert longest == [8]
    too_few = position_bias(sentences_of(corpus(3)), topic_vectors, places=8)
    assert too_few == {"segments": 4, "languages": {}, "foreign": {}, "macro": {}}


def test_a_model_of_languages_alone_has_maximal_language_bias():
    report = language_bias(corpus(), only_language)
    assert all(found["same_language"] == 1.0 for found in report["languages"].values())
    assert report["macro"]["same_language"] == 1.0
    assert report["macro"]["MRR@10 mixed"] == 0.0


def test_a_model_without_languages_has_none():
    documents = corpus()
    report = language_bias(documents, topic_vectors)
    # Each document's two versions in other languages come first: 2 of 10 places, then all languages alike (by ties).
    assert -0.35 < report["macro"]["same_language"] < 0.05
    assert report["macro"]["MRR@10 mixed"] == report["macro"]["MRR@10 alone"] == 1.0 and report["macro"]["gap"] == 0.0
    noise = np.random.default_rng(0).normal(size=(len(documents), 32))
    report = language_bias(documents, lambda documents: noise)
    assert abs(report["macro"]["same_language"]) < 0.1
    assert report["languages"]["de"]["interval"][0] < 0 < report["languages"]["de"]["interval"][1]
    constant = language_bias(documents, lambda documents: np.ones((len(documents), 4)))
    assert constant["macro"]["same_language"] == pytest.approx(0.0)


def test_language_bias_grows_with_the_language_and_mixing_never_helps():
    found = [language_bias(corpus(), lambda d, w=w: topic_vectors(d, language=w))["macro"] for w in (0, 0.05, 0.3, 2)]
    shares = [macro["same_language"] for macro in found]
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] > 0.9
    assert all(macro["MRR@10 mixed"] <= macro["MRR@10 alone"] for macro in found)

    def without_japanese(documents):
        vectors = topic_vectors(documents)
        vectors[[document.lang == "ja" for document in documents]] = direction("nothing")
        return vectors

    report = language_bias(corpus(), without_japanese)
    assert report["pairs"]["de-en"]["mixed"]["MRR@10"] == 1.0 and report["pairs"]["de-ja"]["mixed"]["MRR@10"] == 0.0
    assert report["macro"]["gap"] > 0.6
    with pytest.raises(InputError, match="two languages"):
        language_bias([Document("a", "de", text="x"), Document("b", "en", text="y")], only_language)


def test_length_stress():
    groups = sentences_of(corpus(20))

    def noisy(documents):
        """The group shows only in the mean of many sentences."""
        rows = []
        for document in documents:
            parts = [direction(s.split(".")[0]) + 4 * direction(s) for s in document.sentences[:12]]
            rows.append(np.mean(parts, axis=0))
        return np.array(rows)

    report = length_stress(groups, noisy)
    score = {name: found["macro"]["MRR@10"] for name, found in report.items()}
    assert next(iter(report)) == "whole" and len(report["whole"]["pairs"]) == 6
    assert score["first 1 sentences"] < score["first 4 sentences"] < score["whole"]
    # This encoder reads 12 sentences: what follows is not seen, and behind others the document is not.
    assert report["before 1 others"] == report["whole"]
    assert score["after 1 others"] < 0.35 and score["after 3 others"] < 0.35
    long = length_stress(sentences_of(corpus(3, sentences=2)), topic_vectors)
    assert long["first 2 sentences"] == long["first 8 sentences"] == long["whole"]
    assert "after 3 others" not in long


def test_the_sample_prefers_groups_of_many_languages():
    documents = [*corpus(10), Document("x", "de", text="Eins. Zwei."), Document("y", "de", text="Drei.")]
    groups = sentences_of(documents)
    assert groups["x"] == {"de": ("Eins.", "Zwei.")}
    chosen = sample(groups, 6, seed=0)
    assert len(chosen) == 6 and not chosen.keys() & {"x", "y"} and sample(groups, 6, seed=0) == chosen
    assert sample(groups, 6, seed=1).keys() != chosen.keys()
    assert sample(groups, 99, seed=0) == groups
    with pytest.raises(InputError, match="twice"):
        sentences_of([*documents, documents[0]])


def test_room_is_counted_in_tokens_where_a_model_reads_windows(
    evaluate, windows_folder, small_corpus, tmp_path, monkeypatch
):
    asked, measured = {}, bias.evaluate_bias
    monkeypatch.setattr(bias, "evaluate_bias", lambda *given, **how: asked.update(how) or measured(*given, **how))
    arguments = ("--model", windows_folder, "--documents", small_corpus, "--groups", "8", "--out", tmp_path / "r.json")
    job = evaluate("bias", *arguments)
    assert job.code == 0, job.output
    model = load_model(windows_folder)
    sentences = ["Insert a table.", "Choose how many rows and how many columns it has, and where it stands. " * 3]
    tokens = [sum(map(len, pieces)) for pieces in model.sentence_tokenizer().encode([s] for s in sentences)]
    assert (asked["places"], asked["size"](sentences)) == (110, tokens) and tokens[1] > 30
    found = json.loads((tmp_path / "r.json").read_text())["systems"]["HMDE"]
    assert found["position"]["languages"] and found["length"]["whole"]["macro"]["MRR@10"] > 0


def test_the_command(evaluate, model_folder, small_corpus, tmp_path):
    arguments = ("--model", model_folder, "--documents", small_corpus, "--groups", "8", "--out", tmp_path / "r.json")
    job = evaluate("bias", *arguments)
    assert job.code == 0, job.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["task"], report["groups"], report["documents"]) == ("bias", 8, 48)
    found = report["systems"]["HMDE"]
    for lang in ("en", "zh-cn"):
        position, language = found["position"]["languages"][lang], found["language"]["languages"][lang]
        row = next(line for line in job.output.splitlines() if line.startswith(f"{lang} ")).split()
        assert row[1:5] == [f"{cosine:.3f}" for cosine in position["cosine_by_place"]]
        assert row[5:] == [f"{position['slope']:+.4f}", f"{position['p']:.3f}", f"{language['same_language']:+.3f}"]
    for name, stressed in found["length"].items():
        row = next(line for line in job.output.splitlines() if line.startswith(name + "  "))
        assert row.split()[-4:] == [f"{stressed['macro'][m]:.3f}" for m in ("R@1", "R@10", "MRR@10", "nDCG@10")]
