"""MTEB with an exported model, on folders in the layout of its datasets: nothing is fetched."""

import json

import pytest

from hmde_dist.command import InputError
from hmde_dist.corpus.readers import read_documents
from hmde_dist.evaluation.mteb_tasks import DOCUMENT_TASKS, encoder, run_tasks

mteb = pytest.importorskip("mteb", reason='mteb is not installed: pip install -e ".[mteb]"')


def write_dataset(folder, configurations):
    """A dataset as it lies on the hub: JSON lines, and a README that names them by configuration and split."""
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / f"{name}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            lines += [f"  - split: {split}", f"    path: {path.name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def data(small_corpus, tmp_path_factory):
    """Titles that look for documents in Russian and Arabic; English documents labelled by category."""
    folder, documents = tmp_path_factory.mktemp("mteb"), list(read_documents([small_corpus]))
    retrieval = {}
    for language in ("ru", "ar"):
        mine = [d for d in documents if d.lang == language]
        retrieval |= {
            f"{language}-corpus": {"test": [{"_id": d.id, "title": d.title, "text": d.text} for d in mine]},
            f"{language}-queries": {"test": [{"_id": f"q-{d.id}", "text": d.title} for d in mine]},
            f"{language}-qrels": {"test": [{"query-id": f"q-{d.id}", "corpus-id": d.id, "score": 1} for d in mine]},
        }
    write_dataset(folder / "mteb" / "MultiLongDocRetrieval", retrieval)
    english = [d for d in documents if d.lang == "en"]
    categories = sorted({d.categories[0] for d in english})
    rows = [{"text": d.text, "category": categories.index(d.categories[0])} for d in english]
    write_dataset(folder / "mteb" / "masakhanews", {"eng": {"train": rows[::2], "test": rows[1::2]}})
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """datasets keeps what it converted."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_tasks_run_from_folders_and_sentence_transformers_gives_the_same(model, data, model_folder):
    retrieval = run_tasks(model, ["MultiLongDocRetrieval"], ["rus", "ara"], data)["tasks"]["MultiLongDocRetrieval"]
    report = run_tasks(model, ["MasakhaNEWSClassification"], ["eng"], data)
    classification = report["tasks"]["MasakhaNEWSClassification"]
    assert (retrieval["metric"], retrieval["split"], set(retrieval["subsets"])) == ("ndcg_at_10", "test", {"ru", "ar"})
    assert 0 < retrieval["score"] == pytest.approx(sum(retrieval["subsets"].values()) / 2)
    assert classification["metric"] == "accuracy" and 0 < classification["subsets"]["eng"] <= 1
    from sentence_transformers import SentenceTransformer

    task = mteb.get_task("MultiLongDocRetrieval", languages=["rus"])
    task.metadata = task.metadata.model_copy(deep=True)
    task.metadata.dataset["path"] = str(data / "mteb" / "MultiLongDocRetrieval")
    other = SentenceTransformer(str(model_folder), trust_remote_code=True)
    (result,) = mteb.evaluate(other, task, cache=None, co2_tracker=False).task_results
    assert result.scores["test"][0]["main_score"] == pytest.approx(retrieval["subsets"]["ru"])


def test_the_command_prints_what_it_reports(evaluate, model_folder, data, tmp_path):
    command = ("mteb", "--model", model_folder, "--tasks", "MultiLongDocRetrieval", "--languages", "rus,ara")
    job = evaluate(*command, "--data", data, "--out", tmp_path / "report.json")
    assert job.code == 0, job.output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    task = report["tasks"]["MultiLongDocRetrieval"]
    assert report["task"] == "mteb" and report["mteb"] == mteb.__version__
    assert f"MultiLongDocRetrieval: ndcg_at_10 {task['score']:.4f}, mean over 2 subsets (test)" in job.output
    assert f"ru {task['subsets']['ru']:.4f}" in job.output


def test_the_wrapper_gives_the_vectors_of_the_model(model):
    texts = ["Eine Stadt am Fluss. Sie ist alt.", "A river. It is long."]
    found = encoder(model).encode([{"text": texts[:1], "title": ["x"]}, {"text": texts[1:]}])
    assert found == pytest.approx(model.encode(texts), abs=1e-5)


def test_the_tasks_for_documents_exist():
    assert [mteb.get_task(name).metadata.name for name in DOCUMENT_TASKS] == list(DOCUMENT_TASKS)


@pytest.mark.parametrize(
    ("task", "language", "message"),
    [
        ("MultiLongDocRetrievl", "rus", "Did you mean: 'MultiLongDocRetrieval'"),
        ("MultiLongDocRetrieval", "xxx", "--languages"),
        ("MultiLongDocRetrieval", "eus", "No subsets were found for MultiLongDocRetrieval"),
        ("MultiLongDocRetrieval", "deu", "not the data of MultiLongDocRetrieval"),
        ("BelebeleRetrieval", "deu", "mteb/belebele: no such folder"),
    ],
)
def test_what_is_not_there_is_named(task, language, message, model, data):
    with pytest.raises(InputError, match=message):
        run_tasks(model, [task], [language], data)


def test_without_a_folder_and_without_network_the_way_out_is_named(model):
    with pytest.raises(InputError, match=r"SwissJudgementClassification.*--data"):
        run_tasks(model, ["SwissJudgementClassification"], ["deu"])
