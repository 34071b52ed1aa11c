"""Ablations of seconds, as their user runs them: killed, resumed, with a cell that fails; and the arithmetic of the table."""

import json
import re
import runpy
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from launch import PROGRAMS, ROOT, Finished, start, write_recipe
from scipy import stats

from hmde_dist.ablation import Evaluation, begin, check_cells, read_cells, write_report
from hmde_dist.command import InputError
from hmde_dist.evaluation.ablation_table import as_markdown, compare_cells
from hmde_dist.submission import ShareJob

MEASURES = ("R@1",)


@pytest.fixture
def recipe(shards, tmp_path):
    return write_recipe(tmp_path / "plain.yaml", shards("mds"), engine={"self_test": False})


@pytest.fixture
def ablate(monkeypatch, capfd):
    """tools/ablate.py as its user runs it, but in this process, which has imported everything already."""

    def run(*arguments) -> Finished:
        monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
        code = runpy.run_path(str(ROOT / "tools" / "ablate.py"))["main"]()
        return Finished(code, "".join(capfd.readouterr()))

    return run


def test_killed_between_cells_it_goes_on_and_the_table_has_the_numbers_of_the_reports(
    recipe, small_corpus, ablate, tmp_path
):
    out = tmp_path / "out"
    cells = (recipe, f"alone={recipe},data.neighbours_per_batch=0")
    options = ("--documents", small_corpus, "--out", out, "--ranks", "1", "run.steps=2")
    process = start([PROGRAMS / "python", ROOT / "tools" / "ablate.py", *cells, "--seeds", "0", "1", *options])
    first = out / "plain" / "seed-0" / "result.json"
    until = time.monotonic() + 900
    while not first.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    process.kill()
    output, _ = process.communicate()
    assert first.exists(), output
    written = first.stat().st_mtime_ns
    job = ablate(*cells, "--seeds", "0", "1", *options, "--parallel", "2")
    assert job.code == 0, job.output
    job = ablate(*cells, f"broken={recipe},model.upper.heads=5", "--seeds", "0", "1", *options, "--share", "2/6")
    assert job.code == 1, job.output
    assert first.stat().st_mtime_ns == written
    assert "broken, seed 0: FAILED: train.py ended with 2: error: model.upper.heads=5 does not divide" in job.output
    assert f"failed: broken, seed 0: see {out}/broken/seed-0/log.txt" in job.output

    table = json.loads((out / "table.json").read_text())
    assert table["missing"] == [["broken", 0], ["broken", 1]] and table["pairs"] == 16
    assert set(table["cells"]) == {"plain", "alone"}
    for name, found in table["cells"].items():
        for task, measure, place in (
            ("retrieval", "R@1", ("macro", "R@1")),
            ("retrieval", "MRR@10", ("macro", "MRR@10")),
            ("classification", "accuracy", ("macro", "all other languages", "accuracy")),
            ("classification", "macro-F1", ("macro", "all other languages", "macro_f1")),
        ):
            values = []
            for seed in ("0", "1"):
                value = json.loads((out / name / f"seed-{seed}" / f"{task}.json").read_text())["systems"]["HMDE"]
                for key in place:
                    value = value[key]
                assert found[measure]["values"][seed] == value
                values.append(value)
            assert found[measure]["mean"] == pytest.approx(np.mean(values))
            assert f"{np.mean(values):.3f}" in (out / "table.md").read_text()
    # Seeds draw other weights and batches; cells differ in their batches.
    assert len({str(found["R@1"]["values"]) for found in table["cells"].values()}) == 2
    ElementTree.parse(out / "plot.svg")

    (out / "table.md").unlink()
    again = ablate(*cells, "--seeds", "0", "1", "--out", out, "--report-only", "run.steps=2")
    assert again.code == 0 and (out / "table.md").read_text().strip() in again.output


def test_means_intervals_and_paired_tests():
    values = {
        "a": {0: {"R@1": 0.70}, 1: {"R@1": 0.74}, 2: {"R@1": 0.72}},
        "b": {0: {"R@1": 0.60}, 1: {"R@1": 0.641}, 2: {"R@1": 0.619}},
        "c": {0: {"R@1": 0.71}, 1: {"R@1": 0.70}, 2: {"R@1": 0.74}},
        "one": {1: {"R@1": 0.1}},
        "none": {},
    }
    cells = compare_cells(values, MEASURES)
    assert list(cells) == ["a", "b", "c", "one"]
    a, b, c, one = (cells[name]["R@1"] for name in cells)
    assert a["mean"] == pytest.approx(0.72) and [cell["best"] for cell in (a, b, c, one)] == [True, False, False, False]
    # 4.3027 is Student's t at 97.5 % with two degrees of freedom.
    assert a["interval"] == pytest.approx([0.72 - 4.3027 * 0.02 / 3**0.5, 0.72 + 4.3027 * 0.02 / 3**0.5], abs=1e-5)
    p = [stats.ttest_rel([0.60, 0.641, 0.619], [0.70, 0.74, 0.72]).pvalue, None]
    p[1] = stats.ttest_rel([0.71, 0.70, 0.74], [0.70, 0.74, 0.72]).pvalue
    assert b["against_best"]["p"] == pytest.approx(p[0]) and c["against_best"]["p"] == pytest.approx(p[1])
    assert b["against_best"]["p_holm"] == pytest.approx(2 * p[0]) and b["against_best"]["significant"]
    assert not c["against_best"]["significant"] and one["against_best"] is None and one["interval"] is None
    rows = {row.split("|")[1].strip(): row for row in as_markdown(cells, MEASURES).splitlines() if row.startswith("|")}
    assert "**0.720 ± 0.050**" in rows["a"]
    assert ", worse)" in rows["b"] and ", n.s.)" in rows["c"] and "too few seeds" in rows["one"]


def test_cells_are_named_and_have_settings_of_their_own(recipe, tmp_path):
    other = f"other={recipe},optimizer.betas=[0.9, 0.95],run.log_every=2"
    cells = read_cells([str(recipe), other], [3, 4], ["run.steps=7"], tmp_path / "out")
    assert [(cell.name, cell.seed) for cell in cells] == [("plain", 3), ("other", 3), ("plain", 4), ("other", 4)]
    one = cells[3].recipe
    assert (one.optimizer.betas, one.run.log_every, one.run.steps, one.run.seed) == ((0.9, 0.95), 2, 7, 4)
    assert one.run.folder == tmp_path / "out" / "other" / "seed-4" / "run"


@pytest.mark.parametrize(
    ("texts", "seeds", "message"),
    [
        (["{}", "{}"], [0], 'two cells are called "plain"'),
        (["{}", "a b={}"], [0], '"a b" is no name of a cell'),
        (["{}"], [0, 0], "--seeds: 0 occurs twice"),
        (["{}", "long={},run.steps=9"], [0], "plain 3 x 8 = 24, long 9 x 8 = 72; set them alike"),
        (["{}", "bad={},run.stepps=9"], [0], "cell bad: run.stepps: no such setting; did you mean run.steps?"),
    ],
)
def test_cells_that_cannot_be_compared_are_refused(texts, seeds, message, recipe, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        read_cells([text.format(recipe) for text in texts], seeds, [], tmp_path)


def test_what_cannot_be_run_is_refused_before_anything_is(recipe, small_corpus, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"cell plain: data.pairs_per_batch=8 is not divisible by 3 ranks"):
        check_cells(read_cells([str(recipe)], [0], [], out), ranks=3)
    with pytest.raises(InputError, match=r"nowhere.*no such file"):
        Evaluation((tmp_path / "nowhere",), "en", "categories.0").check()
    with pytest.raises(InputError, match="no document has a"):
        Evaluation((small_corpus,), "en", "topic").check()
    with pytest.raises(InputError, match="no cell is complete yet"):
        write_report(read_cells([str(recipe)], [0], [], out), out)
    assert not out.exists()
    cells = read_cells([str(recipe)], [0], [], out)
    begin(cells, Evaluation((small_corpus,), "en", "categories.0"), out)
    check_cells(cells, ranks=1)
    with pytest.raises(InputError, match=r"was begun with another data.sentences, optimizer.learning_rate: remove"):
        check_cells(read_cells([str(recipe)], [0], ["data.sentences=5", "optimizer.learning_rate=1"], out), ranks=1)
    with pytest.raises(InputError, match="evaluated with other train_language"):
        begin(cells, Evaluation((small_corpus,), "ja", "categories.0"), out)


def test_an_array_has_a_job_for_each_cell_and_a_job_runs_its_cell(recipe, small_corpus, ablate, tmp_path):
    out = tmp_path / "out"
    common = (str(recipe), "--seeds", "0", "1", "2", "--documents", str(small_corpus), "--out", str(out))
    for profile, ranks, lines in (
        ("gpu", "4", ("gpus-per-node=4", "cpus-per-task=32")),
        ("cpu", "2", ("cpus-per-task=16",)),
    ):
        script = ablate(*common, "--profile", profile, "--ranks", ranks, "--dry-run").output
        assert not out.exists()
        assert all(f"#SBATCH --{line}\n" in script for line in ("array=0-2%3", "ntasks-per-node=1", *lines))
        assert ("gpus" in script) == (profile == "gpu")
    with pytest.raises(InputError, match=r"--ranks 16: .* the profile gives it 8 GPUs"):
        ablate(*common, "--profile", "gpu", "--ranks", "16", "--dry-run", "data.pairs_per_batch=16")
    (out / "plain" / "seed-0").mkdir(parents=True)
    (out / "plain" / "seed-0" / "result.json").write_text('{"scores": {}}')
    # Of a job: its cell is complete, so nothing is trained, and the table is not its business.
    ShareJob((str(ROOT / "tools" / "ablate.py"), *common, "--ranks", "1"), "cells", 3, 1)(0)
    assert (out / "plain" / "seed-2" / "recipe.yaml").is_file() and not (out / "table.md").exists()
