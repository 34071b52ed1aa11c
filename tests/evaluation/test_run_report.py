"""The report: right numbers from a journal and from evaluations, whole without either, and legible in a browser."""

import json
import re
import shutil
from xml.etree import ElementTree

import pytest
from launch import PROGRAMS, ROOT, environment, finish, start

from hmde_dist.command import InputError
from hmde_dist.evaluation import figures
from hmde_dist.evaluation.report_sections import split_pairs
from hmde_dist.evaluation.run_report import POINTS, find_reports, read_journal, training_sections, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Loads the report at a width and writes down what a reader would see.
VIEWER = """<iframe id="page" src="report.html" width="{width}" height="2000"></iframe><pre id="seen"></pre><script>
document.getElementById("page").onload = event => {{
  const page = event.target.contentDocument, figures = [...page.querySelectorAll("svg")];
  page.querySelectorAll("details").forEach(details => details.open = true);
  const texts = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect());
  const boxes = figures.map(svg => svg.getBoundingClientRect());
  const heat = page.querySelector(".heat td.high");
  document.getElementById("seen").textContent = JSON.stringify({{
    figures: figures.length,
    narrowest: Math.min(...boxes.map(box => box.width)),
    lowest: Math.min(...boxes.map(box => box.height)),
    smallestText: Math.min(...texts.map(box => box.height)),
    cutText: texts.filter(box => box.left < 0 || box.right > {width}).length,
    overflow: page.scrollingElement.scrollWidth - {width},
    tables: page.querySelectorAll("details table").length,
    heat: heat ? page.defaultView.getComputedStyle(heat).backgroundColor : "",
  }});
}};
</script>"""


def journal_lines(steps, **more):
    return [{"step": step, "loss": 5.0 / step, "documents": 16 * step, "accuracy": 0.1, **more} for step in steps]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo" / "run"
    folder.mkdir(parents=True)
    records = [{"event": "start", "step": 0, "time": "2026-11-26T10:00:00+00:00"}, *journal_lines(range(1, 11))]
    records += [{"event": "validation", "step": 5, "R@1": 0.25, "R@10": 0.5, "language_bias": 0.1}]
    # Killed behind the checkpoint of step 8: 9 and 10 again.
    records += [{"event": "start", "step": 8, "time": "2026-11-26T10:30:00+00:00"}]
    records += [r | {"loss": 1.5} for r in journal_lines(range(9, 13))]
    records += [{"event": "validation", "step": 12, "R@1": 0.75, "R@10": 1.0, "language_bias": 0.05}]
    records += [{"event": "done", "step": 12, "time": "2026-11-26T10:45:00+00:00"}]
    text = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 13, "lo'
    (folder / "journal.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def retrieval_report(run):
    names = ["de", "en", "zh-cn"]
    pairs = {f"{a}-{b}": (i + j) / 10 for i, a in enumerate(names) for j, b in enumerate(names) if a != b}

    def system(factor):
        rows = {name: {"R@1": factor * value, "R@10": 0.9, "queries": 7} for name, value in pairs.items()}
        return {"macro": {"R@1": factor * 0.2, "queries": 42}, "pairs": rows}

    report = {"task": "retrieval", "systems": {"HMDE": system(1.0), "a <b> baseline": system(0.5)}}
    path = run.parent / "report.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    return path


def test_of_steps_that_occur_twice_the_later_line_counts(run):
    validation, training = training_sections(read_journal(run))
    head, *rows = training.table
    assert head[:2] == ["step", "loss"]
    assert [row[0] for row in rows] == list(range(1, 13))
    assert [row[1] for row in rows][7:] == [5.0 / 8, 1.5, 1.5, 1.5, 1.5]
    assert validation.table == [["step", "R@1", "R@10", "language_bias"], [5, 0.25, 0.5, 0.1], [12, 0.75, 1.0, 0.05]]
    assert len(validation.drawn) == 2  # retrieval together, the other measure by itself


def test_long_runs_are_drawn_as_means_of_neighbours():
    records = [{"step": step, "loss": float(step)} for step in range(1, 5 * POINTS + 1)]
    (section,) = training_sections(records)
    assert len(section.table) == POINTS + 1
    assert section.table[1] == [5, 3.0] and section.table[-1] == [5 * POINTS, 5 * POINTS - 2.0]
    assert f"means of {POINTS} runs" in section.text


def test_all_three_files_hold_the_numbers(run, retrieval_report):
    assert find_reports(run) == [retrieval_report]
    write_report(run, [retrieval_report], run / "report")
    written = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    assert written["facts"] == {
        **{"steps": 12, "documents": 192, "loss at the end": 1.5, "R@1 on test documents": 0.2},
        "minutes": 15.0,  # from the second start on: nothing tells when the first part ended
    }
    sections = {section["title"]: section["table"] for section in written["sections"]}
    by_language = {row[0]: row[1:] for row in sections["R@1 by language"][1:]}
    # zh-cn: with de (0 + 2) / 10, with en (1 + 2) / 10, in both directions.
    assert by_language["zh-cn"] == pytest.approx([0.25, 0.125])
    assert list(by_language) == ["zh-cn", "en", "de"]
    pairs = {tuple(row[:2]): row[2] for row in sections["R@1 of every pair: HMDE"][1:]}
    assert pairs["zh-cn", "de"] == 0.2 and len(pairs) == 6
    assert sections["Events"] == [
        ["event", "times", "last at step"],
        ["start", 2, 8],
        ["validation", 2, 12],
        ["done", 1, 12],
    ]
    markdown = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert "| zh-cn | 0.250 | 0.125 |" in markdown and "| a <b> baseline | 0.100 |" in markdown


def test_the_page_needs_nothing_from_elsewhere_and_shows_text_as_text(run, retrieval_report):
    write_report(run, [retrieval_report], run / "report")
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://|src=|@import|url\(|<script", page) == []
    assert "a &lt;b&gt; baseline" in page and "<b> baseline" not in page
    drawings = re.findall(r"<svg.*?</svg>", page)
    assert len(drawings) >= 5
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_a_task_without_a_form_of_its_own_is_shown_as_it_is(run):
    path = run / "report-other.json"
    path.write_text(json.dumps({"task": "other", "scores": {"x": {"f": 0.5, "list": [1, 2]}}}), encoding="utf-8")
    write_report(run, find_reports(run), run / "report")
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert "| scores · x · f | 0.500 |" in text and "| scores · x · list | 1, 2 |" in text


def test_classification_and_mteb_have_their_own_sections(run):
    found = {"accuracy": 0.8, "accuracy_interval": [0.7, 0.9], "macro_f1": 0.75, "documents": 20.0, "kind": "unseen"}
    systems = {
        "HMDE": {"macro": {"unseen": {"accuracy": 0.8}}, "languages": {"de": found, "ja": found | {"accuracy": 0.9}}}
    }
    reports = [
        {"task": "classification", "train_language": "en", "systems": systems},
        {"task": "mteb", "mteb": "2", "tasks": {"T": {"metric": "f1", "score": 0.5, "subsets": {"de": 0.5}}}},
        {"task": "classification", "systems": {}},
    ]
    for number, report in enumerate(reports):
        (run / f"{number}.json").write_text(json.dumps(report), encoding="utf-8")
    sections = write_report(run, find_reports(run), run / "report")
    classification, mteb, empty = sections[:3]
    assert classification.table[1][:5] == ["de", "HMDE", 0.8, 0.7, 0.9] and classification.table[1][-1] == "unseen"
    assert classification.table[-1][:3] == ["mean of unseen", "HMDE", 0.8]
    assert "ja: HMDE 0.900" in classification.drawn[0]
    assert mteb.table[1:] == [["T", "mean", "f1", 0.5], ["T", "de", "f1", 0.5]]
    assert empty.title == "Classification" and not empty.drawn


def test_bias_is_drawn_by_place_language_and_length(run):
    def system(slope):
        place = {
            "cosine_by_place": [0.9, 0.9 + slope, 0.9 + 2 * slope],
            "slope": slope,
            "interval": [-1.0, 1.0],
            "p": 0.2,
        }
        return {
            "position": {
                "languages": {"de": place | {"documents": 8}, "ja": place | {"documents": 4}},
                "foreign": {"de-ja": {"difference": -0.1, "interval": [-0.2, 0.0], "p": 0.5, "documents": 3}},
            },
            "language": {"languages": {"de": {"same_language": 0.25}}, "macro": {"gap": 0.125}},
            "length": {"whole": {"macro": {"R@1": 0.5}}, "first 1 sentences": {"macro": {"R@1": 0.25}}},
        }

    report = {"task": "bias", "systems": {"HMDE": system(-0.1), "untrained": system(0.2)}}
    (run / "bias.json").write_text(json.dumps(report), encoding="utf-8")
    position, language, length = write_report(run, find_reports(run), run / "report")[:3]
    assert (position.title, language.title, length.title) == ("Position bias", "Language bias", "Length")
    assert position.table[1] == ["de", "HMDE", 0.9, 0.8, 0.7, -0.1, -1.0, 1.0, 0.2, 8]
    assert position.table[3] == ["foreign segment de-ja", "HMDE", None, None, None, -0.1, -0.2, 0.0, 0.5, 3]
    assert len(position.drawn) == 3 and "place 3: HMDE 0.700, untrained 1.3" in position.drawn[0]
    assert language.table == [["language", "HMDE", "untrained"], ["de", 0.25, 0.25], ["all: gap", 0.125, 0.125]]
    assert length.table[2] == ["first 1 sentences", 0.25, 0.25]


def test_gaps_and_runs_without_a_step_are_no_problem(tmp_path):
    assert "no finite value" in figures.lines("Loss", "step", [1, 2], {"loss": [None, float("nan")]})
    (tmp_path / "journal.jsonl").write_text('{"event": "start", "step": 0}\n', encoding="utf-8")
    sections = write_report(tmp_path, [], tmp_path / "report")
    assert [section.title for section in sections] == ["Events"]
    (tmp_path / "journal.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": NaN}\n', encoding="utf-8")
    write_report(tmp_path, [], tmp_path / "report")
    table = json.loads((tmp_path / "report" / "report.json").read_text())["sections"][0]["table"]
    assert table == [["step", "loss"], [1, 1.0], [2, None]]


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        write_report(tmp_path, [], tmp_path / "report")
    (tmp_path / "journal.jsonl").touch()
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    for path, message in ((tmp_path / "none.json", "no report"), (tmp_path / "broken.json", "not JSON")):
        with pytest.raises(InputError, match=message):
            write_report(tmp_path, [path], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["de-en", "en-de"], {"de-en": ("de", "en"), "en-de": ("en", "de")}),
        (
            ["zh-cn-ru", "ru-zh-cn", "ru-en", "en-ru", "en-zh-cn", "zh-cn-en"],
            {"zh-cn-ru": ("zh-cn", "ru"), "en-zh-cn": ("en", "zh-cn")},
        ),
    ],
)
def test_pairs_of_codes_with_hyphens_are_split(names, expected):
    assert {name: pair for name, pair in split_pairs(names).items() if name in expected} == expected


def test_the_tool_makes_the_page_of_a_real_run(trained_run, tmp_path):
    command = [PROGRAMS / "python", ROOT / "tools" / "report.py"]
    job = finish(start([*command, trained_run, "--out", tmp_path / "out"], environment()))
    assert job.code == 0 and f"report: {tmp_path}/out/report.html" in job.output
    settings = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| optimizer.learning_rate | 0.01 |" in settings and "## Training" in settings
    refused = finish(start([*command, tmp_path], environment()))
    assert refused.code == 2 and refused.output.startswith("error: ")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [380, 1280])
def test_a_browser_shows_it_at_every_width(width, run, retrieval_report, tmp_path):
    write_report(run, [retrieval_report], run / "report")
    (run / "report" / "view.html").write_text(VIEWER.format(width=width), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/browser"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{run}/report/view.html"]
    job = finish(start(command, environment()))
    assert job.code == 0, job.output
    assert "CONSOLE" not in job.output, job.output
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', job.output)[1])
    assert seen["figures"] >= 5 and seen["tables"] >= 5
    assert seen["narrowest"] > 250 and seen["lowest"] > 40
    assert seen["smallestText"] >= 10 and seen["cutText"] == 0 and seen["overflow"] <= 0, seen
    assert seen["heat"] not in ("", "rgba(0, 0, 0, 0)")
