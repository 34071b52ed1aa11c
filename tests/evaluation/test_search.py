"""The search tool, in this process, on an index of a model of seconds."""

import io
import json
import runpy
import sys

import pytest
from launch import ROOT
from vector_folders import small_model

from hmde_dist.command import InputError
from hmde_dist.corpus.readers import read_documents
from hmde_dist.evaluation.encode import encode_to_folder
from hmde_dist.evaluation.index import build_index


@pytest.fixture(scope="module")
def folders(tokenizer, small_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    small_model(tokenizer, folder / "model")
    encode_to_folder(folder / "model", [small_corpus], "document", "fp16", folder / "vectors")
    build_index(folder / "vectors", "IVF4,PQ8x4fs", "cpu", folder / "index")
    return folder


@pytest.fixture
def search(folders, monkeypatch, capfd):
    def run(*arguments, typed: str = "", model="model"):
        command = ["--index", folders / "index", "--model", folders / model, *arguments]
        monkeypatch.setattr(sys, "argv", ["search_index.py", *map(str, command)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        runpy.run_path(str(ROOT / "tools" / "search_index.py"))["main"]()
        return capfd.readouterr().out

    return run


def test_a_query_finds_its_document(search, small_corpus):
    document = list(read_documents([small_corpus]))[7]
    lines = search("--query", document.text, "--k", "3").splitlines()
    assert lines[0].split()[:4] == ["1", "1.000", document.lang, document.id] and document.title in lines[0]
    assert len(lines) == 3
    lines = search("--query", document.text, "--k", "3", "--languages", "ja,ru").splitlines()
    assert len(lines) == 3 and {line.split()[2] for line in lines} <= {"ja", "ru"}


def test_a_file_of_queries_gives_json_lines_and_nothing_else(search, small_corpus, tmp_path):
    documents = list(read_documents([small_corpus]))
    printed = search("--queries", small_corpus, "--k", "2")
    records = [json.loads(line) for line in printed.splitlines()]
    assert [(r["id"], r["lang"]) for r in records] == [(d.id, d.lang) for d in documents]
    first = [record["results"][0] for record in records]
    assert sum(hit["id"] == d.id and hit["lang"] == d.lang for hit, d in zip(first, documents, strict=True)) > 255
    assert all([hit["rank"] for hit in record["results"]] == [1, 2] for record in records)
    search("--queries", small_corpus, "--k", "2", "--out", tmp_path / "found.jsonl")
    assert (tmp_path / "found.jsonl").read_text(encoding="utf-8") == printed


def test_lines_are_answered_until_an_empty_one(search):
    printed = search("--interactive", "--k", "2", typed="The owl is a bird.\nDie Eule.\n\nnot read\n")
    answers = printed.split("\n\n")
    assert [len(answer.splitlines()) for answer in answers if answer] == [2, 2]


def test_what_cannot_be_searched_for_is_refused(search, folders, tokenizer, tmp_path):
    with pytest.raises(InputError, match="nothing to search for"):
        search()
    with pytest.raises(InputError, match="is empty"):
        search("--query", " ")
    with pytest.raises(InputError, match="--out is for"):
        search("--query", "owl", "--out", tmp_path / "found.jsonl")
    with pytest.raises(InputError, match='no document is in "tlh"'):
        search("--query", "owl", "--languages", "tlh")
    small_model(tokenizer, folders / "other", seed=1)
    with pytest.raises(InputError, match="is not the model that made the vectors"):
        search("--query", "owl", model="other")
