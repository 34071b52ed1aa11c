"""The LibreOffice extraction on a few pages of our own writing; the download only up to its first refusal."""

import shutil
from pathlib import Path

import pytest

from hmde_dist.command import InputError
from hmde_dist.corpus import libreoffice

PACKAGES = Path(__file__).parents[1] / "data" / "libreoffice"


@pytest.fixture(scope="module")
def extracted():
    documents, report = libreoffice.read_documents(PACKAGES, ("en", "de", "ja"), workers=1)
    return {(document.lang, document.id): document for document in documents}, report


def test_a_page_becomes_a_document(extracted):
    document = extracted[0]["en", "lo:swriter/guide/letter"]
    assert document.title == "Writing a letter"
    assert document.categories == ("writer", "writer/guide")
    assert document.text.splitlines() == [
        "Writing a letter",
        "A letter begins with an empty page, and the page begins with the name of the person who will read it.",
        "Press Ctrl+K to save your letter before lunch.",
        "Letters have margins and ink.",
        "Windows prints blue envelopes.",
        "Unix prints green envelopes.",
        "Fold the paper",
        "first in halves",
        "then in quarters",
    ]


def test_wrapped_lines_join_without_space_between_cjk_only(extracted):
    lines = extracted[0]["ja", "lo:swriter/guide/letter"].text.splitlines()
    assert lines[1] == "手紙は白い紙から始まります。紙の上には、読む人の名前を書きます。 Writer でも同じです。"
    assert lines[2] == "昼食の前に Ctrl+K を押してください。"


def test_report_counts_what_each_filter_took(extracted):
    documents, report = extracted
    nothing = dict.fromkeys(libreoffice.FILTERS, 0)
    assert report == {
        "en": nothing | {"pages": 3, "kept": 2, "short": 1},
        "de": nothing | {"pages": 4, "kept": 1, "short": 1, "untranslated": 1, "duplicate": 1},
        "ja": nothing | {"pages": 3, "kept": 1, "short": 1, "wrong_script": 1},
    }
    assert list(documents) == [
        ("en", "lo:scalc/01/totals"),
        ("en", "lo:swriter/guide/letter"),
        ("de", "lo:swriter/guide/letter"),
        ("ja", "lo:swriter/guide/letter"),
    ]


def test_english_is_read_for_the_filter_but_returned_only_on_request():
    documents, report = libreoffice.read_documents(PACKAGES, ("de",), workers=1)
    assert {document.lang for document in documents} == set(report) == {"de"}
    assert report["de"]["untranslated"] == 1


def test_two_processes_give_the_same(extracted):
    documents, report = libreoffice.read_documents(PACKAGES, ("en", "de", "ja"), workers=2)
    assert documents == list(extracted[0].values())
    assert report == extracted[1]


def test_one_folder_a_package(tmp_path, extracted):
    for language in ("en-US", "de"):
        shutil.copytree(
            PACKAGES / libreoffice.HELP / language, tmp_path / f"help-{language}" / libreoffice.HELP / language
        )
    documents, _ = libreoffice.read_documents(tmp_path, ("de",), workers=1)
    assert documents == [extracted[0]["de", "lo:swriter/guide/letter"]]


@pytest.mark.parametrize("missing", ["fr", "pt-br"])
def test_missing_language_is_named(missing):
    with pytest.raises(InputError, match=f'no LibreOffice help in "{missing}"'):
        libreoffice.read_documents(PACKAGES, ("de", missing))


def test_english_must_be_there(tmp_path):
    shutil.copytree(PACKAGES / libreoffice.HELP / "de", tmp_path / libreoffice.HELP / "de")
    with pytest.raises(InputError, match="libreoffice-help-en-us"):
        libreoffice.read_documents(tmp_path, ("de",))


@pytest.mark.parametrize(
    "page", [b"", b" \n", b"<!-- only a comment -->", b"<html><head><title>T</title></head></html>"]
)
def test_page_without_text(page):
    document = libreoffice.extract(page, "page", "en")
    assert (document.id, document.text, document.categories) == ("lo:page", "", ("index", "index/index"))


def test_damaged_bytes_cost_one_character_not_the_page():
    page = b"<body><p>before \xff after</p><p>gr\xc3\xbcn</p></body>"
    assert libreoffice.extract(page, "shared/a/b/page", "de").text == "before \ufffd after\ngrün"
    assert libreoffice.extract(page, "shared/a/b/page", "de").categories == ("shared", "shared/a/b")


def test_fetch_without_apt_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not libreoffice.available()
    with pytest.raises(InputError) as refused:
        libreoffice.fetch(("de",), tmp_path / "packages")
    assert "--packages DIR" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "packages").exists()


def stub(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_fetch_falls_back_to_private_lists_and_unpacks(tmp_path, monkeypatch):
    """With the system's lists the stub fails; with private ones it "downloads" an empty file."""
    stub(tmp_path, "apt-get", 'case "$*" in *lists=*download*) for p; do :; done; : > "${p}_4%3a7-1_all.deb";; '
         "*lists=*update) ;; *) echo E: no lists >&2; exit 100;; esac")  # fmt: skip
    stub(tmp_path, "dpkg", 'echo "$1 $2" >> "$3/unpacked"')
    monkeypatch.setenv("PATH", str(tmp_path))
    versions = libreoffice.fetch(("pt-br", "en"), tmp_path / "packages")
    assert versions == ["libreoffice-help-en-us 4:7-1", "libreoffice-help-pt-br 4:7-1"]
    assert (tmp_path / "packages" / "unpacked").read_text().count("-x ") == 2


def test_failed_download_gives_the_cause_and_leaves_nothing(tmp_path, monkeypatch):
    """Without a network the download only says that it knows no such package: the update before it says why."""
    update = "echo 'E: Failed to fetch: no route' >&2; echo 'E: Some index files failed to download.' >&2"
    download = "echo 'W: noise' >&2; echo 'E: Unable to locate package' >&2"
    stub(tmp_path, "apt-get", f'case "$*" in *update) {update};; *) {download};; esac; exit 100')
    stub(tmp_path, "dpkg", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="cannot download libreoffice-help-en-us: E: Failed to fetch: no route; give"):
        libreoffice.fetch(("de",), tmp_path / "packages")
    assert not (tmp_path / "packages").exists()


def test_language_codes_are_checked(tmp_path):
    with pytest.raises(InputError, match="pt_BR"):
        libreoffice.fetch(("pt_BR",), tmp_path)
