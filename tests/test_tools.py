"""The tools as their user runs them, on a model of seconds."""

import gzip
import itertools
import json
import runpy

import pyarrow
import pytest
from launch import PROGRAMS, ROOT, Finished, finish, start
from pyarrow import parquet


@pytest.fixture
def tool(forks):
    """`tool("x.py", arguments)` as its user runs it, but in a process that has imported everything already."""

    def run(name, *arguments) -> Finished:
        argv, program = [name, *map(str, arguments)], str(ROOT / "tools" / name)
        code = f"import runpy, sys\nsys.argv = {argv!r}\nrunpy.run_path({program!r}, run_name='__main__')"
        ended = forks.run(1, code)
        return Finished(ended.codes[0], ended.output)

    return run


def test_documents_to_search_results(trained_run, documents_folder, tmp_path, tool):
    test = documents_folder / "test.jsonl.gz"
    model, vectors, index = tmp_path / "model", tmp_path / "vectors", tmp_path / "index"
    for command in (
        ("export.py", trained_run, "--out", model),
        # In fp16 the vectors of a model of three steps may be the same.
        ("encode.py", "--model", model, "--documents", test, "--out", vectors, "--precision", "fp32"),
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


def test_the_report_holds_every_number_that_is_printed(trained_run, small_corpus, tmp_path, tool):
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


def test_inspect_shows_the_shards_as_text(shards, tool):
    job = tool("inspect_shards.py", shards("wds"), "--samples", "2")
    assert job.code == 0, job.output
    assert job.output.startswith("wds, ") and "37 groups, 222 documents" in job.output
    assert job.output.count("small:") == 2


def test_inspect_reports_what_it_prints_and_finds_a_group(shards, tmp_path, tool):
    plot, path = tmp_path / "plots" / "shards.png", tmp_path / "report.json"
    options = ("--group", "small:owl", "--sentences", "1", "--plot", plot, "--json", path)
    job = tool("inspect_shards.py", shards("mds"), *options)
    assert job.code == 0, job.output
    assert plot.read_bytes().startswith(b"\x89PNG") and f"plot written to {plot}" in job.output
    report = json.loads(path.read_text(encoding="utf-8"))
    (sample,) = report["samples"]
    assert (sample["id"], sample["category"]) == ("small:owl", "animals")
    assert "small:owl  [animals]" in job.output
    for document in sample["documents"]:
        (first,) = document["first"]
        assert f"  {document['language']}: {document['sentences']} sentences, {document['tokens']} tokens" in job.output
        assert f"{first['tokens']:>3} tokens  {first['text']}" in job.output
    rows = [line.split() for line in job.output.splitlines()]
    for language, facts in report["languages"].items():
        assert [language, *(f"{facts[name]:,}" for name in ("documents", "sentences", "tokens"))] in [
            r[:4] for r in rows
        ]
    assert "12 categories; 0 groups (0.0%) have none" in job.output
    refused = tool("inspect_shards.py", shards("mds"), "--group", "nowhere")
    assert refused.code == 2 and 'none of its 37 groups has the id "nowhere"' in refused.output


def test_pairs_are_a_matrix_or_of_many_languages_a_list(capsys):
    print_pairs = runpy.run_path(str(ROOT / "tools" / "inspect_shards.py"))["print_pairs"]
    languages = [f"l{number:02}" for number in range(13)]
    pairs = [
        {"languages": list(both), "groups": 12_345, "tokens": 6_789_000}
        for both in itertools.combinations(languages, 2)
    ]
    print_pairs(pairs[:1], languages[:3])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert rows == [["l00", "-", "12.3k", "0"], ["l01", "6.79M", "-", "0"], ["l02", "0", "0", "-"]]
    print_pairs(pairs, languages)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "the 20 largest of 78 language pairs"
    assert len(lines) == 22 and lines[2].split() == ["l00-l01", "12,345", "groups", "6,789,000", "tokens"]


def test_documents_of_several_kinds_with_other_names(small_corpus, documents_folder, tmp_path, tool):
    """English as parquet that does not say so, the other languages as JSON lines."""
    records = [json.loads(line) for line in small_corpus.read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["body"] = record.pop("text")
    others, english = tmp_path / "others.jsonl", tmp_path / "english.parquet"
    others.write_text("\n".join(json.dumps(r) for r in records if r["lang"] != "en"), encoding="utf-8")
    names = ("id", "title", "body", "categories")
    rows = {name: [record[name] for record in records if record["lang"] == "en"] for name in names}
    parquet.write_table(pyarrow.table(rows), english)
    command = ("build_documents.py", "files", "--documents", others, english, "--field", "text=body", "--lang", "en")
    job = tool(*command, "--out", tmp_path / "out")
    assert job.code == 0, job.output
    for name in ("train.jsonl.gz", "validation.jsonl.gz", "test.jsonl.gz", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (documents_folder / name).read_bytes()
    for wrong in ("body=text", "text"):
        job = tool("build_documents.py", "files", "--documents", others, "--field", wrong, "--out", tmp_path / "no")
        assert job.code == 2 and f'"{wrong}" is no NAME=SOURCE with a NAME of id, lang, title' in job.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"lang": "en", "text": "No id."}', 'needs a non-empty string "id"'),
        (b'{"id": "a", "lang": "en", "text": "  "}', 'document "a" (en) is empty'),
        (b'{"id": "a", "lang": "en", "text": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(line, message, tokenizer_folder, tmp_path, tool):
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
    small += ["optimizer.warmup_steps=0"]
    command = [PROGRAMS / "python", ROOT / "tools" / "demo.py", "--documents", small_corpus, "--out", tmp_path / "demo"]
    job = finish(start([*command, *small]))
    assert job.code == 0, job.output
    assert "macro average over 30 language pairs" in job.output
    assert f"tensorboard --logdir {tmp_path}/demo/run/tensorboard" in job.output
    assert f"report: {tmp_path}/demo/report/report.html" in job.output
    assert "R@1 of every pair" in (tmp_path / "demo" / "report" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["systems"]["HMDE"]["macro"]["queries"] == 90
