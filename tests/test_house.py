"""The rules of the house that a machine can check."""

import ast
import importlib.metadata
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hmde_dist"
ROOMS = ["corpus", "stream", "model", "objectives", "engine", "evaluation"]
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


def test_no_module_bears_the_name_of_a_library():
    """`deepspeed hmde_dist/train.py` puts hmde_dist/ first on the path."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()} - {
        "__init__",
        "__pycache__",
    }
    assert names & taken == set()


def test_data_goes_one_way():
    against = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        if room not in ROOMS:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "hmde_dist" and len(parts) > 1:
                allowed = ["command", "recipe", "topology", *ROOMS[: ROOMS.index(room) + 1]]
                if parts[1] not in allowed:
                    against.append(f"{path.relative_to(ROOT)} imports {name}")
    assert against == []


@pytest.mark.parametrize("tool", [*TOOLS, PACKAGE / "train.py"], ids=lambda path: path.name)
def test_every_command_has_a_help_with_an_example(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(tool), "--help"])
    monkeypatch.syspath_prepend(tool.parent)  # as python does, and runpy does not
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(tool), run_name="__main__")
    assert exit_.value.code == 0
    assert "example:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_and_paths_in_the_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    named = re.findall(r"`((?:hmde_dist|tools|recipes|slurm|tests|docs)/[\w./'-]+)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []
