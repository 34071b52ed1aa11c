"""Laws of what is done to vectors after encoding, on vectors whose languages were moved apart on purpose."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
from launch import ROOT
from vector_folders import LANGUAGES, write_vectors

from hmde_dist.command import InputError
from hmde_dist.evaluation import postprocess
from hmde_dist.evaluation.index import build_index
from hmde_dist.evaluation.postprocess import (
    STEPS,
    Folder,
    augment,
    augment_folder,
    calibrate,
    fit,
    load_calibration,
    truncate,
    truncate_folder,
    unit,
)
from hmde_dist.evaluation.search import DocumentIndex
from hmde_dist.stream import vectors
from hmde_dist.stream.vectors import Vectors

GROUPS, WIDTH = 300, 24


def random_rotation(random, width):
    return np.linalg.qr(random.normal(size=(width, width)))[0]


def languages_apart(kind: str, groups: int = GROUPS, seed: int = 0) -> np.ndarray:
    """Unit vectors of `groups` documents in each of three languages (language by language), each moved in its own way."""
    random = np.random.default_rng(seed)
    meaning = random.normal(size=(groups, WIDTH))
    moves = np.random.default_rng(99)  # alike for every seed
    rows = []
    for _ in LANGUAGES:
        shift, stretch = 2 * moves.normal(size=WIDTH), np.exp(1.5 * moves.normal(size=WIDTH))
        rotation = random_rotation(moves, WIDTH)
        own = meaning + 0.3 * random.normal(size=meaning.shape)
        rows.append(unit({"shift": own + shift, "scale": own * stretch, "rotate": own @ rotation}[kind]))
    return np.concatenate(rows).astype(np.float32)


def write_groups(path, rows, precision="fp32", shard_rows=250):
    groups = len(rows) // len(LANGUAGES)
    documents = [(f"d{number}", language) for language in LANGUAGES for number in range(groups)]
    return write_vectors(path, rows, precision, shard_rows, documents)


def everything(folder):
    found = Vectors(folder)
    return found.take(np.arange(len(found)))


def by_language(rows):
    return dict(zip(LANGUAGES, np.split(rows, len(LANGUAGES)), strict=True))


def cosines(rows):
    return unit(rows) @ unit(rows).T


@pytest.fixture(params=[None, 1 << 12], ids=["one block", "many blocks"], autouse=True)
def block_bytes(request, monkeypatch):
    """Also in blocks of 42 vectors, which must change nothing."""
    if request.param:
        monkeypatch.setattr(vectors, "BLOCK_BYTES", request.param)


def test_centered_languages_have_no_mean_and_scaled_ones_deviation_one(tmp_path):
    rows = languages_apart("shift")
    folder = Folder.open(write_groups(tmp_path / "in", rows))
    centered, both = fit(folder, ["center"], 100), fit(folder, ["scale", "center"], 100)
    assert both.facts["steps"] == ["center", "scale"]
    for language, own in by_language(rows).items():
        assert np.abs(own.mean(axis=0)).max() > 0.1
        assert np.abs(centered.apply(own, language).mean(axis=0)).max() < 1e-6
        scaled = both.apply(own, language)
        np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=1e-4)
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_only_rotation_leaves_scores_within_a_language_as_they_are(step, tmp_path):
    rows = languages_apart("rotate")
    folder = Folder.open(write_groups(tmp_path / "in", rows))
    calibrate(folder, fit(folder, [step], 100, "en" if step == "rotate" else None), tmp_path / "out")
    for before, after in zip(
        by_language(rows).values(), by_language(everything(tmp_path / "out")).values(), strict=True
    ):
        moved = np.abs(cosines(before) - cosines(after)).max()
        assert moved < 1e-6 if step == "rotate" else moved > 1e-3
        np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "steps"), [("shift", ["center"]), ("scale", ["center", "scale"]), ("rotate", ["rotate"])]
)
def test_calibration_finds_versions_that_languages_had_moved_apart(kind, steps, evaluate, tmp_path):
    """Fitted on other documents than those that are searched."""
    fitted_on = Folder.open(write_groups(tmp_path / "train", languages_apart(kind, seed=1)))
    folder = write_groups(tmp_path / "plain", languages_apart(kind, groups=100), "fp16")
    calibrate(Folder.open(folder), fit(fitted_on, steps, 200), tmp_path / "calibrated")
    job = evaluate(
        *("retrieval", "--vectors", folder, tmp_path / "calibrated", "--out", tmp_path / "report.json"),
    )
    assert job.code == 0, job.output
    systems = json.loads((tmp_path / "report.json").read_text())["systems"]
    plain, calibrated = (systems[name]["macro"]["R@1"] for name in ("plain", "calibrated"))
    assert plain < 0.7 and calibrated > plain + 0.2 and calibrated > 0.85
    assert f"{plain:.3f}" in job.output and f"{calibrated:.3f}" in job.output


def test_languages_with_too_few_vectors_are_left_alone_and_told_of(monkeypatch, capsys, tmp_path):
    rows = languages_apart("shift")[: 2 * GROUPS + 50]
    documents = [(f"d{n % GROUPS}", LANGUAGES[n // GROUPS]) for n in range(len(rows))]
    folder = write_vectors(tmp_path / "in", rows, documents=documents)
    monkeypatch.setattr(postprocess, "PIVOTS", 100)
    tool(monkeypatch, folder, "--out", tmp_path / "out", "--calibrate", "center", "rotate", "--least", "90")
    output = capsys.readouterr().out
    # Every third of the pivot's 300 documents; "sw" has the first 50.
    assert "center and rotate, fitted on documents shared with de: de 300, en 100" in output
    assert "left alone, for too few to fit on: sw 50" in output
    np.testing.assert_array_equal(everything(tmp_path / "out")[2 * GROUPS :], rows[2 * GROUPS :])
    assert load_calibration(tmp_path / "out").facts["left_alone"] == {"sw": 17}
    with pytest.raises(InputError, match="no language has 301 vectors"):
        fit(Folder.open(folder), ["center"], 301)
    with pytest.raises(InputError, match="--pivot sw: 50 vectors, 90 needed"):
        fit(Folder.open(folder), ["rotate"], 90, "sw")


def test_a_calibration_is_a_file_that_does_the_same_again(monkeypatch, tmp_path):
    folder = write_groups(tmp_path / "in", languages_apart("shift"))
    tool(monkeypatch, folder, "--out", tmp_path / "one", "--calibrate", *STEPS, "--least", "100", "--pivot", "en")
    tool(monkeypatch, folder, "--out", tmp_path / "two", "--calibration", tmp_path / "one")
    np.testing.assert_array_equal(everything(tmp_path / "one"), everything(tmp_path / "two"))
    found = load_calibration(tmp_path / "one" / "calibration.safetensors")
    assert found.facts["pivot"] == "en" and "rotation/en" not in found.tensors
    rotation = found.tensors["rotation/de"].astype(np.float64)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(WIDTH), atol=1e-6)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"model": {"name": "other", "sha256": "1"}}))
    with pytest.raises(InputError, match="not of the model that made"):
        calibrate(Folder.open(folder), found, tmp_path / "three")
    with pytest.raises(InputError, match=r"no calibration of tools/postprocess.py"):
        load_calibration(folder)
    assert not (tmp_path / "three").exists()


def test_side_vectors_are_summed_not_averaged_and_nothing_is_normalised(tmp_path):
    one, two, side = np.array([[1.0, 0, 0]]), np.array([[0, 1.0, 0]]), np.array([[0, 0.6, 0.8]])
    np.testing.assert_allclose(augment(one, two + side, 0.1), [[0.9, 0.16, 0.08]], rtol=1e-6)
    source = write_vectors(
        tmp_path / "in", np.eye(3, dtype=np.float32), documents=[("a", "de"), ("b", "de"), ("a", "en")], shard_rows=2
    )
    sides = np.concatenate([two, side, side, one]).astype(np.float32)
    write_vectors(tmp_path / "side", sides, documents=[("a", "sw"), ("x", "de"), ("a", "de"), ("a", "de")])
    without = augment_folder(Folder.open(source), Folder.open(tmp_path / "side"), 0.1, tmp_path / "out")
    total = 0.1 * (two + side + one)
    np.testing.assert_allclose(
        everything(tmp_path / "out"), [[0.9, 0, 0] + total[0], [0, 0.9, 0], [0, 0, 0.9] + total[0]], rtol=1e-6
    )
    assert without == 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["processed"] == [{"augment": {"side": "side", "alpha": 0.1}}]


def test_a_truncated_prefix_has_unit_length(monkeypatch, tmp_path):
    rows = languages_apart("shift")
    folder = write_groups(tmp_path / "in", rows)
    tool(monkeypatch, folder, "--out", tmp_path / "out", "--truncate", "7")
    found = everything(tmp_path / "out")
    assert found.shape == (len(rows), 7) and Folder.open(tmp_path / "out").facts[5]["id"] == "d5"
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found, truncate(rows, 7))
    np.testing.assert_allclose(found * np.linalg.norm(rows[:, :7], axis=1)[:, None], rows[:, :7], atol=1e-6)
    with pytest.raises(InputError, match="--truncate 24: the vectors have width 24"):
        tool(monkeypatch, folder, "--out", tmp_path / "no", "--truncate", "24")


def test_an_index_cuts_queries_like_its_vectors_and_takes_no_calibrated_ones(tmp_path):
    rows = languages_apart("shift")
    folder = Folder.open(write_groups(tmp_path / "in", rows))
    truncate_folder(folder, 7, tmp_path / "narrow")
    build_index(tmp_path / "narrow", None, "cpu", tmp_path / "index")
    queries = rows[::90]
    scores, numbers = DocumentIndex(tmp_path / "index").search(queries, 3)
    expected = truncate(queries, 7) @ truncate(rows, 7).T
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :3], rtol=1e-5)
    np.testing.assert_array_equal(numbers[:, 0], np.arange(0, len(rows), 90))
    calibrate(folder, fit(folder, ["center"], 100), tmp_path / "centered")
    with pytest.raises(InputError, match="holds calibrated vectors, but queries are not"):
        build_index(tmp_path / "centered", None, "cpu", tmp_path / "no")


def test_queries_may_have_vectors_of_their_own(evaluate, tmp_path):
    """As after augmentation: the documents were changed, the queries were not."""
    rows = languages_apart("shift", groups=50)
    plain, mirrored = write_groups(tmp_path / "plain", rows), write_groups(tmp_path / "mirrored", -rows)
    common = ("retrieval", "--vectors", mirrored, "--out", tmp_path / "report.json", "--pairs", "de-en")
    macro = []
    for more in ((), ("--query-vectors", plain)):
        assert evaluate(*common, *more).code == 0
        macro.append(json.loads((tmp_path / "report.json").read_text())["systems"]["mirrored"]["macro"]["R@10"])
    assert macro[0] > macro[1] + 0.3
    other = write_vectors(tmp_path / "other", rows)
    job = evaluate("retrieval", "--vectors", plain, other, "--out", tmp_path / "no.json")
    assert job.code == 2 and "has vectors of other documents than the first folder" in job.output
    job = evaluate("retrieval", "--vectors", plain, "--model", tmp_path, "--out", tmp_path / "no.json")
    assert job.code == 2 and "--vectors are compared as they lie" in job.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--truncate", "3", "--least", "9"), "--fit and --least go with --calibrate"),
        (("--calibrate", "center", "--pivot", "de"), "--pivot goes with --calibrate rotate"),
        (("--truncate", "3", "--alpha", "0.1"), "--alpha goes with --augment"),
    ],
)
def test_settings_that_would_not_act_are_refused(arguments, message, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        tool(monkeypatch, tmp_path / "in", "--out", tmp_path / "out", *arguments)


def tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["postprocess.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "postprocess.py"))["main"]()
