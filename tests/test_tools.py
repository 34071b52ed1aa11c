"""The tools as their user runs them, on a model of seconds."""

import gzip
import json

import pytest
from launch import PROGRAMS, environment, finish, start


def tool(name, *arguments, folder=None):
    from launch import ROOT

    return finish(start([PROGRAMS / "python", ROOT / "tools" / name, *arguments], environment(), folder or ROOT))


def test_documents_to_search_results(trained_run, documents_folder, tmp_path):
    test = documents_folder / "test.jsonl.gz"
    model, vectors, index = tmp_path / "model", tmp_path / "vectors", tmp_path / "index"
    for command in (
        ("export.py", trained_run, "--out", model),
        ("encode.py", "--model", model, "--documents", test, "--out", vectors),
        ("build_index.py", "--vectors", vectors, "--out", index),
    ):
        job = tool(*command)
        assert job.code == 0, job.output
    with gzip.open(test, "rt", encoding="utf-8") as file:
        document = json.loads(file.readline())
    query = tmp_path / "query.txt"
    query.write_text(document["text"], encoding="utf-8")
    by_file = tool("search_index.py", "--index", index, "--model", model, "--query", query, "--k", "3")
    assert by_file.code == 0, by_file.output
    by_text = tool("search_index.py", "--index", index, "--model", model, "--query", document["text"], "--k", "3")
    assert next(line for line in by_text.output.splitlines() if line.startswith("  1 ")).split()[3] == document["id"]
    results = [line for line in by_file.output.splitlines() if document["id"].split(":")[0] + ":" in line]
    assert len(results) == 3
    assert results[0].split()[1:4] == ["1.000", document["lang"], document["id"]]
    assert document["title"] in results[0]


def test_the_report_holds_every_number_that_is_printed(trained_run, small_corpus, tmp_path):
    job = tool(
        *("evaluate.py", "retrieval", "--model", trained_run / "export", "--documents", small_corpus),
        *("--baselines", "--pairs", "en-ja,zh-cn-ru", "--out", tmp_path / "report.json"),
    )
    assert job.code == 0, job.output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(report["systems"]) == [
        "HMDE",
        "mean of its sentence vectors",
        "untrained",
        "TF-IDF, character 3-4-grams",
    ]
    assert "macro average over 2 language pairs, 88 queries" in job.output
    for name, system in report["systems"].items():
        (row,) = [line for line in job.output.splitlines() if line.startswith(name + " ")]
        assert row.split()[-4:] == [f"{system['macro'][m]:.3f}" for m in ("R@1", "R@10", "MRR@10", "nDCG@10")]
        assert set(system["pairs"]) == {"en-ja", "zh-cn-ru"}
        assert all(pair["queries"] == 44 for pair in system["pairs"].values())


def test_inspect_shows_the_shards_as_text(shards):
    job = tool("inspect_shards.py", shards("wds"), "--samples", "2")
    assert job.code == 0, job.output
    assert job.output.startswith("wds, ") and "37 groups, 222 documents" in job.output
    assert job.output.count("small:") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"lang": "en", "text": "No id."}', 'needs a non-empty string "id"'),
        (b'{"id": "a", "lang": "en", "text": "  "}', 'document "a" (en) is empty'),
        (b'{"id": "a", "lang": "en", "text": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(line, message, tokenizer_folder, tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_bytes(b'{"id": "a", "lang": "de", "text": "Gut."}\n' + line + b"\n")
    for command in (
        ("build_documents.py", "files", "--documents", documents),
        ("build_shards.py", "--documents", documents, "--tokenizer", tokenizer_folder, "--format", "mds"),
    ):
        job = tool(*command, "--out", tmp_path / "out")
        assert job.code == 2
        (error,) = [row for row in job.output.splitlines() if row.startswith("error:")]
        assert f"{documents}:2: " in error and message in error
        assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_the_demo_runs_on_given_documents(small_corpus, tmp_path):
    """The whole of `make demo` but its installation, cut to a few steps."""
    small = ["data.pairs_per_batch=8", "run.steps=3", "run.checkpoint_every=0", "run.validate_every=0"]
    job = tool("demo.py", "--documents", small_corpus, "--out", tmp_path / "demo", *small, "optimizer.warmup_steps=0")
    assert job.code == 0, job.output
    assert "macro average over 30 language pairs" in job.output
    assert f"tensorboard --logdir {tmp_path}/demo/run/tensorboard" in job.output
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["systems"]["HMDE"]["macro"]["queries"] == 90
