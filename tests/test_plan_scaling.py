"""The table of docs/scaling.md is what the tool prints, and says what arithmetic says of one GPU and of eight."""

import runpy
import sys

import pytest
from launch import ROOT


def test_the_table_of_the_docs_is_the_one_that_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan_scaling.py", "--gpu", "H100", "--pairs", "64"])
    runpy.run_path(str(ROOT / "tools" / "plan_scaling.py"))["main"]()
    printed = capsys.readouterr().out
    assert "481,393,408 parameters" in printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 11 and rows[-1].startswith("| 1,024 ")
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page

    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    pairs, _, computing, sending, documents, mfu, share, *_ = cells["8"]
    # 64 pairs of 2 x 32 x 128 tokens, 8 FLOPs a weight and token where the cache encodes twice, at half of 989 TFLOP/s.
    upper = 95_944_704 - 12 * 12 * 768**2
    flops = 8 * (12 * 12 * 768**2 * 64 * 2 * 32 * 128 + upper * 64 * 2 * 33)
    assert float(computing) == pytest.approx(flops / (0.5 * 989e12), abs=0.005)
    sent = 2 * 7 / 8 * 4 * (481_393_408 + 768 * 2 * 64 * 8)
    assert pairs == "512" and float(sending) == pytest.approx(sent / 450e9, abs=0.0005)
    assert float(documents.replace(",", "")) == pytest.approx(1024 / (flops / (0.5 * 989e12) + sent / 450e9), rel=1e-3)
    assert share == "99%" and float(mfu[:-1]) == pytest.approx(50 * 6 / 8, abs=0.6)
