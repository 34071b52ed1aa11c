import json

import numpy as np
import pytest
from launch import ROOT, torchrun, write_documents
from vector_folders import PEAK, python, same_files, small_model

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.steps import ShareDone
from hmde_dist.evaluation import encode as encode_module
from hmde_dist.evaluation.encode import OUTPUTS, STEPS, calls, encode_documents, encode_to_folder
from hmde_dist.model.export import load_model
from hmde_dist.stream.vectors import Facts, Vectors


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    return small_model(tokenizer, tmp_path_factory.mktemp("model") / "out")


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(encode_module, "SHARD_DOCUMENTS", 60)
    monkeypatch.setattr(encode_module, "WINDOW", 32)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_folder_holds_what_the_model_gives(output, model, model_folder, small_corpus, small_shards, tmp_path):
    out = tmp_path / "vectors"
    manifest = encode_to_folder(model_folder, [small_corpus], output, "fp32", out)
    documents = list(read_documents([small_corpus]))
    vectors, facts = Vectors(out), Facts(out, manifest["languages"])
    assert len(vectors.shards) == 5 and manifest["documents"] == len(facts) == len(documents) == 264
    assert [facts[n] for n in range(264)] == [{"id": d.id, "lang": d.lang, "title": d.title} for d in documents]
    alone = list(encode_documents(model, documents, output))
    whole = vectors.take(np.arange(len(vectors)))
    if output in ("document", "sentence-mean"):
        expected = np.stack(alone)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    else:
        expected = np.concatenate(alone)
        rows = np.load(out / "rows.npy")
        np.testing.assert_array_equal(np.diff(rows), [len(vectors) for vectors in alone])
        assert manifest["rows"] == rows[-1] == len(expected) > 264
    np.testing.assert_allclose(whole, expected, atol=2e-6)
    counts = [len(model.tokenise([d.text], d.lang)[0]) for d in documents]
    assert manifest["sentences_left_out"] == sum(max(0, count - 6) for count in counts) > 0
    assert manifest["without_tokens"] == 0


def test_sentences_of_a_document_are_where_it_says(model, small_corpus):
    """Contextual states depend on the document around them, sentence vectors do not."""
    document = Document("a", "en", sentences=("An owl is a bird.", "It hunts at night.", "It sleeps by day."))
    other = Document("b", "en", sentences=("It hunts at night.",))
    longer = next(d for d in read_documents([small_corpus]) if d.lang == "ja")
    for output, same in (("sentence", True), ("contextual", False)):
        first, second, _ = encode_documents(model, [document, other, longer], output)
        assert first.shape == (3, 32) and second.shape == (1, 32)
        assert np.allclose(first[1], second[0], atol=1e-5) == same
        (alone,) = encode_documents(model, [document], output)
        np.testing.assert_allclose(alone, first, atol=1e-5)


def test_calls_hold_alike_documents_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(encode_module, "TOKENS_PER_CALL", 100)
    tokens = np.array([50, 3, 400, 0, 48, 7, 60, 0])
    found = [chosen.tolist() for chosen in calls(tokens)]
    assert found == [[3, 7, 1, 5, 4], [0], [6], [2]]


def test_shares_end_with_the_same_bytes(model_folder, small_corpus, small_shards, tmp_path):
    arguments = (model_folder, [small_corpus], "document", "bf16")
    encode_to_folder(*arguments, tmp_path / "one")
    for step, many in STEPS.items():
        for share in range(2 if many else 1):
            if step == "finish":
                encode_to_folder(*arguments, tmp_path / "two", step)
                continue
            with pytest.raises(ShareDone):
                encode_to_folder(*arguments, tmp_path / "two", step, (share, 2))
    assert "vectors-00004.npy" in same_files(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two.partial").exists()


# Runs the tool with small shards; with a number in KILL it kills itself with -9 in the middle of that block.
PROGRAM = f"""
import os, runpy, signal, sys
from hmde_dist.evaluation import encode
encode.SHARD_DOCUMENTS = 40
append, count = encode.VectorFile.append, 0
def die(file, rows):
    global count
    append(file, rows)
    count += 1
    if os.environ.get("KILL") == f"{{os.environ.get('RANK', '0')}}:{{count}}":
        os.kill(os.getpid(), signal.SIGKILL)
encode.VectorFile.append = die
sys.argv[0] = "encode.py"
runpy.run_path({str(ROOT / "tools" / "encode.py")!r}, run_name="__main__")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_while_it_encodes_it_ends_with_the_same_bytes(ranks, model_folder, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "SHARD_DOCUMENTS", 40)
    encode_to_folder(model_folder, [small_corpus], "document", "fp16", tmp_path / "whole")
    launcher = torchrun(ranks) if ranks > 1 else None
    command = ("--model", model_folder, "--documents", small_corpus, "--out", tmp_path / "out")
    monkeypatch.setenv("KILL", f"{ranks - 1}:2")
    killed = python(PROGRAM, *command, launcher=launcher, folder=tmp_path)
    assert killed.code != 0 and not (tmp_path / "out").exists(), killed.output
    done = len(list((tmp_path / "out.partial" / "encode").glob("[0-9]*/result.json")))
    assert 1 <= done < 7
    monkeypatch.delenv("KILL")
    job = python(PROGRAM, *command, launcher=torchrun(ranks) if ranks > 1 else None, folder=tmp_path)
    assert job.code == 0, job.output
    assert "done before" in job.output and "264 vectors of 264 documents in 6 languages" in job.output
    same_files(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(InputError, match="exists and is not empty"):
        encode_to_folder(model_folder, [small_corpus], "document", "fp16", tmp_path / "out")


MEMORY = (
    PEAK
    + """
import sys
from pathlib import Path
from hmde_dist.evaluation import encode
encode.SHARD_DOCUMENTS, encode.WINDOW = 1024, 256
encode.encode_to_folder(Path(sys.argv[1]), [Path(sys.argv[2])], "contextual", "fp32", Path(sys.argv[3]))
print("peak", peak_mib())
"""
)


def test_memory_does_not_grow_with_the_documents(model_folder, tmp_path):
    # Most of a text is white space: it costs memory, if it is held, but little time.
    text = "A sentence of some words that fill the memory. " * 10 + " " * 9000 + "End."
    peaks = []
    for count in (1500, 12_000):
        path = tmp_path / f"{count}.jsonl"
        write_documents(path, (Document(f"d{n}", "en", text=f"{n}. {text}") for n in range(count)))
        job = python(MEMORY, model_folder, path, tmp_path / str(count), folder=tmp_path)
        assert job.code == 0, job.output
        peaks.append(float(job.output.split()[-1]))
    # The texts of the 10,500 more documents have 95 MiB; equal runs differ by some 30 MiB of what the allocator keeps.
    assert path.stat().st_size > 110e6
    assert peaks[1] - peaks[0] < 60, peaks


def test_what_cannot_be_encoded_is_refused_and_leaves_nothing(model, model_folder, tokenizer, small_corpus, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(small_corpus.read_text(encoding="utf-8")[:2000] + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad.jsonl:\d+: not JSON"):
        encode_to_folder(model_folder, [bad], "document", "fp16", tmp_path / "out")
    with pytest.raises(InputError, match="no such file"):
        encode_to_folder(model_folder, [tmp_path / "none.jsonl"], "document", "fp16", tmp_path / "out")
    with pytest.raises(InputError, match="no exported model"):
        encode_to_folder(tmp_path, [small_corpus], "document", "fp16", tmp_path / "out")
    damaged = small_model(tokenizer, tmp_path / "damaged")
    broken = load_model(damaged)
    broken.upper.dcls.data[3] = float("nan")
    broken.save_pretrained(damaged)
    first = json.loads(small_corpus.read_text(encoding="utf-8").splitlines()[0])
    with pytest.raises(InputError, match=rf'document "{first["id"]}" .* not finite'):
        encode_to_folder(damaged, [small_corpus], "document", "fp16", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "damaged"]
