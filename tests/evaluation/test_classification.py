"""Heads on one language, tested on all: data whose classes are made of words (the texts are invented)."""

import json

import numpy as np
import pytest
from launch import environment, finish, start, torchrun
from sklearn import metrics

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.baselines import encoders, tfidf
from hmde_dist.evaluation.classification import classify, linear_head, measures
from hmde_dist.evaluation.labelled import Labelled, read_labelled, read_mldoc

WORDS = {
    "animals": "owl fox whale nest forest hunts wings",
    "food": "bread milk cheese oven salt cooks dinner",
    "rivers": "bridge water boat bank flows lake shore",
}


def texts(seed: int, count: int):
    """(label, text) of documents whose words tell their label."""
    random = np.random.default_rng(seed)
    for number in range(count):
        label = list(WORDS)[number % 3]
        sentences = (" ".join(random.choice(WORDS[label].split(), size=5)).capitalize() + "." for _ in range(3))
        yield label, " ".join(sentences)


def groups(count: int = 90, languages=("en", "de", "ja"), seed: int = 0) -> Labelled:
    documents, labels = [], []
    for number, (label, text) in enumerate(texts(seed, count)):
        for lang in languages:
            documents.append(Document(id=f"g{number}", lang=lang, text=text))
            labels.append((label,))
    return Labelled(documents, labels, many=False)


def one_hot_words(documents):
    """Vectors of a model that knows every word of `WORDS`, with a little noise."""
    vocabulary = " ".join(WORDS.values()).split()
    counts = [[document.text.lower().count(word) for word in vocabulary] for document in documents]
    return np.array(counts) + np.random.default_rng(0).normal(scale=0.1, size=(len(documents), len(vocabulary)))


def test_a_separable_task_is_solved_and_shuffled_labels_are_chance():
    data = groups()
    fit = {"words": lambda: linear_head(data.documents, one_hot_words, many=False)}
    report = classify(data, "en", fit, seeds=range(3), seen=["en", "de"])
    found = report["systems"]["words"]
    assert {lang: facts["kind"] for lang, facts in found["languages"].items()} == {
        "en": "training",
        "de": "seen",
        "ja": "unseen",
    }
    assert all(facts["accuracy"] > 0.97 and facts["macro_f1"] > 0.97 for facts in found["languages"].values())
    assert found["macro"]["all other languages"]["languages"] == ["de", "ja"]
    assert found["macro"]["seen"]["languages"] == ["de"] and found["macro"]["unseen"]["languages"] == ["ja"]

    random = np.random.default_rng(1)
    shuffled = Labelled(data.documents, [data.labels[i] for i in random.permutation(len(data.labels))], many=False)
    report = classify(shuffled, "en", fit, seeds=range(5))
    for facts in report["systems"]["words"]["languages"].values():
        assert abs(facts["accuracy"] - 1 / 3) < 0.15
        low, high = facts["accuracy_interval"]
        assert low < facts["accuracy"] < high and low < 1 / 3 < high
        assert facts["accuracy_deviation"] > 0
        assert facts["kind"] in ("training", "unknown")


def test_a_group_is_never_on_both_sides_and_seeds_split_otherwise():
    data = groups(200)
    tested = []
    for seed in range(3):
        rows = data.split("de", seed)
        ids = [{data.documents[row].id for row in part} for part in (rows.train, rows.validation, rows.test)]
        assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
        assert {data.documents[row].lang for row in rows.train} == {"de"}
        assert 0.1 < len(ids[2]) / 200 < 0.3 and 0.04 < len(ids[1]) / 200 < 0.16
        tested.append(frozenset(ids[2]))
    assert len(set(tested)) == 3
    with pytest.raises(InputError, match=r'0 documents in "fr" to train on .* the languages here are de, en, ja'):
        data.split("fr", 0)


def test_measures_are_scikit_learns():
    random = np.random.default_rng(0)
    for many in (False, True):
        targets, predicted = np.zeros((2, 40, 4), dtype=bool)
        if many:
            targets, predicted = random.random((2, 40, 4)) < 0.4
        else:
            targets[np.arange(40), random.integers(0, 4, 40)] = True
            predicted[np.arange(40), random.integers(0, 4, 40)] = True
        drawn = random.integers(0, 40, 40)
        weights = np.stack([np.ones(40), np.bincount(drawn, minlength=40)])
        found = measures(targets, predicted, weights)
        for number, rows in enumerate((np.arange(40), drawn)):
            true, guess = targets[rows], predicted[rows]
            assert found["accuracy"][number] == pytest.approx(metrics.accuracy_score(true, guess))
            for average in ("macro", "micro"):
                assert found[f"{average}_f1"][number] == pytest.approx(
                    metrics.f1_score(true, guess, average=average, zero_division=0)
                )


def test_the_interval_is_that_of_a_mean():
    """Of 300 documents of which 80 % are right, the share lies within 1.96 standard errors, 19 times of 20."""
    data = groups(1500, languages=("en",))

    def encode(documents):
        return one_hot_words(documents)

    fit = linear_head(data.documents, encode, many=False)

    def often_wrong(rows, targets, seed):
        predicted = fit(rows, targets, seed)
        wrong = np.random.default_rng(3).random(len(predicted)) < 0.2
        predicted[wrong] = np.roll(predicted[wrong], 1, axis=1)
        return predicted

    found = classify(data, "en", {"x": lambda: often_wrong}, seeds=[0])["systems"]["x"]["languages"]["en"]
    low, high = found["accuracy_interval"]
    error = (found["accuracy"] * (1 - found["accuracy"]) / found["documents"]) ** 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert "accuracy_deviation" not in found


def write_mldoc(folder):
    folder.mkdir()
    for place, language in enumerate(("english", "german")):
        for number, (split, size) in enumerate((("train.1000", 60), ("dev", 15), ("test", 30))):
            lines = (f"{label}\t{text}\n" for label, text in texts(10 * place + number, size))
            (folder / f"{language}.{split}").write_text("".join(lines), encoding="utf-8")
    return folder


def test_mldoc_is_read_as_distributed(tmp_path, model):
    folder = write_mldoc(tmp_path / "mldoc")
    with open(folder / "german.test", "a", encoding="utf-8") as file:
        file.write("animals\t \n")
    data = read_mldoc(folder)
    rows = data.split("en", 0)
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (60, 15, 60)
    assert data.documents[rows.train[1]].id == "english.train.1000:2" and data.labels[rows.train[1]] == ("food",)
    assert data.left_out == {"documents without text": 1}
    makers = encoders(model) | {"TF-IDF": tfidf}
    systems = {name: lambda make=make: linear_head(data.documents, make, many=False) for name, make in makers.items()}
    report = classify(data, "en", systems, seeds=[0])
    for system in report["systems"].values():
        # Even a model without any training tells these words apart.
        assert system["languages"]["de"]["accuracy"] > 0.9
    (folder / "german.test").write_text("animals no tab\n")
    with pytest.raises(InputError, match=r"german.test:1: not a label"):
        read_mldoc(folder)
    with pytest.raises(InputError, match="no MLDoc"):
        read_mldoc(tmp_path)


def test_labels_are_found_by_a_dotted_path(tmp_path):
    path = tmp_path / "documents.jsonl"
    records = [
        {
            "id": "a",
            "lang": "en",
            "text": "One.",
            "categories": ["x", "y"],
            "facts": {"topic": "t1", "levels": [[3, 5]]},
        },
        {"id": "a", "lang": "de", "text": "Eins.", "categories": [], "facts": {"topic": "t1", "levels": [[3]]}},
        {"id": "b", "lang": "de", "text": "Zwei.", "facts": {"levels": [[]]}},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for field, labels, many, left_out in (
        ("categories.0", [("x",)], False, 2),
        ("categories.1", [("y",)], False, 2),
        ("facts.topic", [("t1",), ("t1",)], False, 1),
        ("facts.levels.0", [("3", "5"), ("3",), ()], True, 0),
    ):
        data = read_labelled([path], field)
        assert (data.labels, data.many) == (labels, many), field
        assert data.left_out.get("documents without a label", 0) == left_out
    with pytest.raises(InputError, match='no document has a "topic"'):
        read_labelled([path], "topic")
    with pytest.raises(InputError, match="must be a label or a list of labels"):
        read_labelled([path], "facts")
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "b", "lang": "en", "text": "Two.", "facts": {"levels": [[1]]}}\n')
    with pytest.raises(InputError, match='"b" is both trained and tested on'):
        read_labelled([path], "facts.levels.0", [other])
    other.write_text('{"id": "c", "lang": "en", "text": "Two.", "facts": {"levels": ["one"]}}\n')
    with pytest.raises(InputError, match=r"is one label in .*other\.jsonl:1 and a list in .*documents\.jsonl:1"):
        read_labelled([path], "facts.levels.0", [other])


def test_multieurlex_with_many_labels_a_document(tmp_path):
    """Records as MultiEURLEX distributes them: the texts of all languages and levels of concepts in one."""
    names, random = list(WORDS), np.random.default_rng(4)
    for split, count in (("train", 80), ("test", 40)):
        with open(tmp_path / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for number in range(count):
                labels = [name for name in names if random.random() < 0.5]
                pool = " ".join(WORDS[name] for name in labels) or "nothing"
                text = " ".join(random.choice(pool.split(), size=20))
                record = {
                    "celex_id": f"{split}{number}",
                    "text": {"en": text, "de": text, "mt": None},
                    "eurovoc_concepts": {"level_1": [names.index(name) for name in labels]},
                }
                file.write(json.dumps(record) + "\n")
    data = read_labelled(
        [tmp_path / "train.jsonl"], "eurovoc_concepts.level_1", [tmp_path / "test.jsonl"], {"id": "celex_id"}
    )
    assert data.many and {d.lang for d in data.documents} == {"en", "de"}
    systems = {"words": lambda: linear_head(data.documents, one_hot_words, many=True)}
    report = classify(data, "en", systems, seeds=[0])
    found = report["systems"]["words"]["languages"]["de"]
    assert found["documents"] == 40
    assert found["macro_f1"] > 0.95 and found["micro_f1"] > 0.95 and found["accuracy"] > 0.85


def test_labels_that_training_lacks_count_as_wrong():
    data = groups(30, languages=("en", "de"))
    roles = ["test" if int(d.id[1:]) >= 15 else "train" for d in data.documents]
    labels = [
        ("new",) if document.id == "g29" else labels
        for document, labels in zip(data.documents, data.labels, strict=True)
    ]
    data = Labelled(data.documents, labels, many=False, roles=roles)
    report = classify(data, "en", {"w": lambda: linear_head(data.documents, one_hot_words, False)}, seeds=[0])
    assert report["test_documents_with_an_unseen_label"] == pytest.approx(1 / 15)
    assert report["systems"]["w"]["languages"]["de"]["accuracy"] == pytest.approx(14 / 15)
    alone = Labelled(data.documents, [("same",)] * len(labels), many=False, roles=roles)
    with pytest.raises(InputError, match="all have the same label"):
        classify(alone, "en", {}, seeds=[0])


def test_the_command_and_fine_tuning_on_two_ranks(evaluate, tmp_path, model_folder):
    """Both ways learn the separable task; the report holds every number of the table."""
    folder = write_mldoc(tmp_path / "mldoc")
    command = ("classification", "--model", model_folder, "--mldoc", folder, "--train-lang", "en")
    command += ("--out", tmp_path / "report.json")
    job = evaluate(*command)
    assert job.code == 0, job.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["task"] == "classification"
    german = report["systems"]["HMDE"]["languages"]["de"]
    assert german["kind"] == "unseen" and german["accuracy"] > 0.9
    row = next(line for line in job.output.splitlines() if line.startswith("de "))
    assert f"{german['accuracy']:.3f}  ({german['accuracy_interval'][0]:.3f} to" in row
    assert f"{german['macro_f1']:.3f}" in row and "30 documents, unseen" in row

    tuned = ("--fine-tune", "--steps", "24", "--batch-documents", "20", "--learning-rate", "0.005", "--seeds", "1")
    job = finish(start(torchrun(2, "tools/evaluate.py", *command, *tuned), environment()), seconds=300)
    assert job.code == 0, job.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == "fine-tuning" and report["settings"]["steps"] == 24
    assert report["systems"]["HMDE"]["languages"]["de"]["accuracy"] > 0.9
    assert job.output.count("written to") == 1


def test_baselines_are_not_fine_tuned(evaluate):
    job = evaluate("classification", "--model", "x", "--mldoc", "x", "--train-lang", "en", "--fine-tune", "--baselines")
    assert job.code == 2 and "without --fine-tune" in job.output
