"""LibreOffice help as comparable documents: from Debian packages to `Document`s that share their id across languages.

Owns the download without installation, the extraction of text from the help's HTML and the filters that keep pages
that are short, untranslated, in the wrong script or repeated out of a corpus.
Refuses a language that is missing and a download that fails, naming the way out; never installs and never guesses.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import unquote

from lxml import etree, html

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.documents import LANGUAGE_CODE, Document

LANGUAGES = ("en", "de", "fr", "es", "it", "pt-br", "ru", "ja", "zh-cn", "ko")
HELP = Path("usr/share/libreoffice/help")
MIN_TOKENS = 25
UNTRANSLATED_SHARE = 0.4
LATIN_SHARE = 0.7
FILTERS = ("short", "untranslated", "wrong_script", "duplicate")
WAY_OUT = "give unpacked packages with --packages DIR, or documents of your own: make demo DOCUMENTS=path.jsonl.gz"

_NON_LATIN = frozenset(("dz", "el", "hi", "ja", "km", "ko", "ru", "zh"))
_MODULES = {"sdatabase": "base"} | {"s" + m: m for m in ("writer", "calc", "impress", "draw", "math", "chart", "basic")}

# Scripts without spaces between words: CJK ideographs and kana, with their punctuation and full-width forms; no Hangul.
_CJK = "\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f"
_WRAPPED_CJK = re.compile(rf"(?<=[{_CJK}])\s*\n\s*(?=[{_CJK}])")
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f\u1780-\u17ff"
_TOKEN = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")
_LETTER = re.compile(r"[^\W\d_]")
_LATIN = re.compile(r"[^\W\d_\u0250-\U0010ffff]")

_BLOCKS = ("h1", "h2", "h3", "h4", "h5", "h6", "p", "li")
_PARSER = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
_NOT_TEXT = etree.XPath(
    './/script | .//style | .//pre | .//*[contains(@class, "howtoget") or contains(@class, "relatedtopics")'
    ' or @class="bascode" or @class="pycode" or @class="embedded"]'
)
_SWITCHES = etree.XPath('.//span[@class="switch" or @class="switchinline"]')


def available() -> bool:
    """Whether this machine has the package client that `fetch` needs."""
    return all(map(shutil.which, ("apt-get", "dpkg")))


def fetch(languages: Sequence[str], folder: Path) -> list[str]:
    """Download and unpack, not install, the help packages of `languages` and of English into `folder`.

    Returns "package version" of each.

    Raises:
        InputError: no apt-get or dpkg, a language code of the wrong form, or a failed download.
    """
    packages = [f"libreoffice-help-{'en-us' if lang == 'en' else lang}" for lang in _with_english(languages)]
    if not available():
        raise InputError(f"apt-get and dpkg are needed to download the LibreOffice help and not found: {WAY_OUT}")
    with tempfile.TemporaryDirectory(prefix="libreoffice-help-") as scratch:
        debs = _download(packages, Path(scratch))
        folder.mkdir(parents=True, exist_ok=True)
        for deb in progress(debs, desc="unpack", unit="package"):
            if problem := _run(["dpkg", "-x", str(deb), str(folder)]):
                raise InputError(f"cannot unpack {deb.name} into {folder}: {problem}")
    return [" ".join(unquote(deb.stem).split("_")[:2]) for deb in debs]


def _with_english(languages: Iterable[str]) -> list[str]:
    """`languages` once each, after English: without it no untranslated page would be noticed."""
    for lang in languages:
        if not LANGUAGE_CODE.fullmatch(lang):
            raise InputError(f'"{lang}" is no language code; use lower-case codes such as "en", "pt-br", "zh-cn"')
    return list(dict.fromkeys(("en", *languages)))


def _download(packages: Sequence[str], scratch: Path) -> list[Path]:
    """The .deb files, in order: with the system's package lists, or with new private ones where those fail."""
    debs = scratch / "debs"
    for name in ("debs", "lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    # `root` keeps apt from changing to a user who may not write to this folder; without root it changes nothing.
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2"]
    private, found = [], []
    for package in progress(packages, desc="download", unit="package"):
        problem = _run([*command, "download", package], debs)
        if problem and not private:
            private = ["-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
            command += private
            no_update = _run([*command, "-o", "APT::Update::Error-Mode=any", "update"])
            problem = _run([*command, "download", package], debs)
            problem = problem and (no_update or problem)
        if problem:
            raise InputError(f"cannot download {package}: {problem}; {WAY_OUT}")
        found += debs.glob(f"{package}_*.deb")
    return found


def _run(command: Sequence[str], folder: Path | None = None) -> str:
    """Run a command; "" when it ends well, else the last line of its stderr that says why not."""
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    # apt closes with general advice; the line before it names the cause.
    useful = [line for line in lines if not re.search("Some index files|Unable to fetch some|unsandboxed", line)]
    causes = [line for line in useful if line.startswith("E:")] or useful or lines
    return causes[-1] if causes else f"{command[0]} ended with code {done.returncode}"


def read_documents(folder: Path, languages: Sequence[str], workers: int = 2) -> tuple[list[Document], dict]:
    """The documents of `languages` under `folder` (unpacked packages, or one folder a package), and a report.

    Documents come in the order of `languages`, then of their paths. English pages are always read, to find the
    untranslated ones. The report has, per language, the number of `pages`, of those `kept`, and of those each of
    `FILTERS` took out, in this order.

    Raises:
        InputError: a language has no pages under `folder`, or a page cannot be read.
    """
    needed = _with_english(languages)
    tasks = [task for lang in needed for task in _pages(folder, lang)]
    extracted: dict[str, list[Document]] = {lang: [] for lang in needed}
    with ProcessPoolExecutor(workers) if workers > 1 else contextlib.nullcontext() as pool:
        documents = pool.map(_read_page, tasks, chunksize=64) if pool else map(_read_page, tasks)
        for document in progress(documents, total=len(tasks), desc="extract", unit="page"):
            extracted[document.lang].append(document)
    english = {document.id: frozenset(_long_lines(document.text)) for document in extracted["en"]}
    kept, report = [], {}
    for lang in dict.fromkeys(languages):
        chosen, report[lang] = _filter(extracted[lang], english if lang != "en" else {})
        kept += chosen
    return kept, report


def _pages(folder: Path, lang: str) -> list[tuple[str, Path, Path]]:
    """The pages of a language in order, each as (language, its `text` folder, path)."""
    wanted = "en-us" if lang == "en" else lang
    for base in (folder / HELP, *sorted(path / HELP for path in folder.glob("*"))):
        for found in sorted(base.glob("*/text")):
            if found.parent.name.lower() == wanted and (paths := sorted(found.rglob("*.html"))):
                return [(lang, found, path) for path in paths]
    raise InputError(
        f'{folder}: no LibreOffice help in "{lang}" ({HELP}/LANGUAGE/text, here or one folder deeper); '
        f"unpack it there: dpkg -x libreoffice-help-{wanted}_VERSION_all.deb {folder}"
    )


def _read_page(task: tuple[str, Path, Path]) -> Document:
    lang, root, path = task
    try:
        return extract(path.read_bytes(), path.relative_to(root).with_suffix("").as_posix(), lang)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def extract(page: bytes, name: str, lang: str) -> Document:
    """One help page as a document; `name` is its path below `text/` without `.html`. The text may be empty."""
    module, *folders = name.split("/")[:-1] or ["index"]
    module = _MODULES.get(module, module)
    title, text = "", ""
    with contextlib.suppress(etree.ParserError):  # a page without any element has no text
        tree = html.document_fromstring(page, parser=_PARSER)
        title = _one_line(tree.findtext(".//title") or "")
        text = "\n".join(_lines(tree, module.upper()))
    return Document(f"lo:{name}", lang, title, text, categories=(module, "/".join([module, *(folders or ["index"])])))


def _lines(tree: html.HtmlElement, module: str) -> Iterator[str]:
    """The text of the part that a reader sees, without menus, code and lists of links; one block a line."""
    area = tree.get_element_by_id("DisplayArea", tree)
    for element in _NOT_TEXT(area):
        element.drop_tree()
    for switch in _SWITCHES(area):
        _settle(switch, module)
    for element in area.iter(*_BLOCKS):
        if re.search(r"\w", line := _one_line(_own_text(element))):
            yield line


def _settle(switch: html.HtmlElement, module: str) -> None:
    """Take alternatives out of a switch, whose children are the cases: `class` MAC, WRITER, ..., none for the default.

    A browser shows the case of its system and module. Cases inside a line would run into each other ("CommandCtrl+F"),
    so one with text stays: the page's own module, else the default, else the first. Whole paragraphs stay, but for MAC.
    """
    cases = [(case.get("class", "default"), case) for case in switch]
    shown = [name for name, case in cases if name != "MAC" and case.text_content().strip()]
    if switch.get("class") == "switchinline":
        shown = next(([name] for name in (module, "default") if name in shown), shown[:1])
    for name, case in cases:
        if name not in shown:
            case.drop_tree()


def _own_text(element: html.HtmlElement) -> str:
    """The text of an element without that of the paragraphs and lists inside it, which are lines of their own."""
    parts = [element.text or ""]
    for child in element:
        parts.append(" " if child.tag == "br" or child.tag in _BLOCKS else _own_text(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _one_line(text: str) -> str:
    return " ".join(_WRAPPED_CJK.sub("", text).split())


def _filter(documents: Sequence[Document], english: dict[str, frozenset[str]]) -> tuple[list[Document], dict[str, int]]:
    """The documents of one language that pass every filter, and the counts."""
    seen: set[bytes] = set()
    fates = [_fault(document, english.get(document.id, frozenset()), seen) or "kept" for document in documents]
    kept = [document for document, fate in zip(documents, fates, strict=True) if fate == "kept"]
    return kept, {"pages": len(fates)} | {fate: fates.count(fate) for fate in ("kept", *FILTERS)}


def _fault(document: Document, english: frozenset[str], seen: set[bytes]) -> str:
    """The first filter that the document does not pass, or "": then its text joins `seen`."""
    text = document.text
    if len(_TOKEN.findall(text)) < MIN_TOKENS:
        return "short"
    long = _long_lines(text) if english else []
    if sum(line in english for line in long) > UNTRANSLATED_SHARE * len(long):
        return "untranslated"
    latin = len(_LATIN.findall(text)) if document.lang.split("-")[0] in _NON_LATIN else 0
    if latin > LATIN_SHARE * len(_LETTER.findall(text)):
        return "wrong_script"
    digest = hashlib.md5(re.sub(r"\W+", " ", text).strip().lower().encode(), usedforsecurity=False).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return ""


def _long_lines(text: str) -> list[str]:
    """The lines that are long enough to be no name, value or command that all languages share."""
    return [s for s in text.splitlines() if len(s) >= 25 or (len(s) >= 8 and len(_TOKEN.findall(s)) >= 8)]
