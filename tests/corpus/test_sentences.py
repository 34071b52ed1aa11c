"""Golden files: blocks of one document, `[language] text` with ⏎ for a line break, and its sentences, one a line."""

import importlib.util
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.dynamic_module_utils import get_imports

from hmde_dist.command import InputError
from hmde_dist.corpus import sentences as module
from hmde_dist.corpus.sentences import (
    MAX_CHARACTERS,
    MAX_PHRASED_CHARACTERS,
    sentence_splitter,
    split_sentences,
    splitter_version,
)

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import bench_sentences  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = """
arabic armenian bengali cyrillic devanagari ethiopic georgian greek gujarati han hangul hebrew kana khmer lao latin
myanmar syllabics tamil thai tibetan
""".split()
needs_icu = pytest.mark.skipif(not importlib.util.find_spec("icu"), reason="PyICU is not installed")
SPLITTERS = ["rules", pytest.param("icu", marks=needs_icu)]


def golden_documents():
    for family in FAMILIES:
        blocks = (GOLDEN / f"sentences-{family}.txt").read_text(encoding="utf-8").strip().split("\n\n")
        for number, block in enumerate(blocks):
            first, *sentences = block.split("\n")
            lang, text = re.fullmatch(r"\[(\S+)\] (.+)", first).groups()
            yield pytest.param(lang, text.replace("⏎", "\n"), sentences, id=f"{family}-{number}-{lang}")


@pytest.mark.parametrize(("lang", "text", "sentences"), golden_documents())
def test_golden(lang, text, sentences):
    assert split_sentences(text, lang) == sentences


def test_every_golden_file_is_tested():
    assert {path.name for path in GOLDEN.glob("sentences-*")} == {f"sentences-{family}.txt" for family in FAMILIES}


@pytest.mark.parametrize("text", ["", " \n\u3000\t", "...", "!!!\n—\n* * *"])
def test_text_without_letters_has_no_sentences(text):
    assert split_sentences(text) == []


@pytest.mark.parametrize("space", [" ", "\u00a0", "\u202f"])
def test_space_before_a_closing_quote_keeps_it_with_its_sentence(space):
    text = f"« Vraiment{space}?{space}» Il rit."
    assert split_sentences(text, "fr") == [f"« Vraiment{space}?{space}»", "Il rit."]


def test_ordinals_end_no_sentence_only_where_written_with_a_dot():
    assert split_sentences("Er kam am 3. Mai.", "de-at") == ["Er kam am 3. Mai."]
    assert split_sentences("It was 3. May came.", "en") == ["It was 3.", "May came."]


@pytest.mark.parametrize("word", ["J", "E\u0301", "Ж", "د", "சி", "எஸ்", "కె"])
def test_an_initial_ends_no_sentence(word):
    assert split_sentences(f"{word}. Smith") == [f"{word}. Smith"]


@pytest.mark.parametrize("word", ["것", "是", "છે", "වේ", "ය", "है"])
def test_a_word_that_looks_like_an_initial_ends_one(word):
    assert split_sentences(f"{word}. Smith") == [f"{word}.", "Smith"]


def test_marks_of_one_language_end_no_sentence_of_another():
    assert len(split_sentences("Για α; Β", "el")) == len(split_sentences("Για α; Β")) == 2
    assert len(split_sentences("Για α; Β", "en")) == 1
    assert len(split_sentences("Այո: Ոչ", "hy")) == len(split_sentences("Այո: Ոչ")) == 2
    assert len(split_sentences("Այո: Ոչ", "ru")) == 1


@pytest.mark.parametrize("phrase", ["เขาไปตลาดทุกวัน", "ລາວໄປຕະຫຼາດ", "གངས་རི་མང་པོ་", "ထမင်းစားသည်", "ខ្ញុំទៅផ្សារ"])
@pytest.mark.parametrize("name", SPLITTERS)
def test_text_without_terminators_is_cut_at_spaces(phrase, name):
    pieces = sentence_splitter(name)(" ".join([phrase] * 100), "th")
    assert " ".join(pieces).split() == [phrase] * 100
    assert all(MAX_PHRASED_CHARACTERS / 2 < len(piece) <= MAX_PHRASED_CHARACTERS for piece in pieces)


@pytest.mark.parametrize(
    ("unit", "end"),
    [
        ("six words and then a clause, ", ","),
        ("字" * 30 + "，字", "，"),
        ("all words and no mark at all ", ""),
        ("x", "x"),
    ],
)
def test_a_long_sentence_is_cut_at_the_best_place(unit, end):
    text = (unit * 3000)[:2900].strip()
    pieces = split_sentences(text)
    assert len(pieces) >= 3
    assert all(MAX_CHARACTERS / 3 < len(piece) <= MAX_CHARACTERS for piece in pieces)
    assert all(piece.endswith(end) for piece in pieces[:-1])
    if " " in text:
        assert " ".join(pieces) == text
    else:
        assert "".join(pieces) == text


def test_a_hard_cut_leaves_a_letter_its_marks():
    pieces = split_sentences("e\u0301" * MAX_CHARACTERS + "x")
    assert all(piece[0] == "e" for piece in pieces[:-1])
    assert "".join(pieces) == "e\u0301" * MAX_CHARACTERS + "x"


alphabet = st.sampled_from(
    [*"aBΣж一くサ서กกກ།་။Աբ։ေΩ\u0301\u200b 12.!?…。！।؟\"»”)「（(«“'-—,:;\n\r\u2028\u00a0\u3000*😀"]
)
texts = st.text(alphabet | st.characters(exclude_categories=["Cs"]), max_size=80)
languages = st.sampled_from(["", "en", "de", "el", "hy", "th", "zh-cn"])
long_texts = st.builds(
    lambda units: "".join(unit * times for unit, times in units),
    st.lists(st.tuples(st.text(alphabet, min_size=1, max_size=12), st.integers(1, 400)), max_size=5),
)


def visible(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", SPLITTERS)
@given(text=texts | long_texts, lang=languages)
@example(text="...\nHello. ***\n\n!", lang="en")
@example(text="a" + " " * 3000 + "b", lang="en")
def test_nothing_is_lost_moved_or_invented(name, text, lang):
    expected = visible(text) if any(map(str.isalnum, text)) else ""
    assert visible("".join(sentence_splitter(name)(text, lang))) == expected


@pytest.mark.parametrize("name", SPLITTERS)
@given(text=long_texts, lang=languages)
def test_no_sentence_is_longer_than_the_limit(name, text, lang):
    for sentence in sentence_splitter(name)(text, lang):
        assert sentence == sentence.strip() != ""
        assert len(sentence) <= MAX_CHARACTERS
        assert len(sentence.splitlines()) == 1


@given(texts, languages)
def test_sentences_are_stripped_lines_with_a_letter(text, lang):
    for sentence in split_sentences(text, lang):
        assert sentence == sentence.strip()
        assert len(sentence.splitlines()) == 1
        assert any(map(str.isalnum, sentence))


@given(st.lists(texts.map(lambda text: "a" + text), max_size=4), languages)
def test_lines_are_split_on_their_own(lines, lang):
    apart = [sentence for line in lines for sentence in split_sentences(line, lang)]
    assert split_sentences("\n".join(lines), lang) == apart


@given(texts, texts, languages)
def test_text_far_away_moves_no_cut(before, after, lang):
    middle = "So it was over at last. Nobody said a word about it. "
    alone = split_sentences(middle, lang)
    around = split_sentences(f"{before} x! {middle}X{after}", lang)
    assert any(around[place : place + 2] == alone for place in range(len(around)))


ADVERSARIAL = """
. ! ?… .␣ ␣. a. .) ) 。 「 .␣( -␣ .⏎ ⏎ a⏎ " .'␣ ; ω; Ա: »: 。␣” 。“ ก 1.␣ །␣ ।a 。」と a␣ a,␣ ␣ é
""".split()


@pytest.mark.parametrize("unit", ADVERSARIAL)
@pytest.mark.parametrize("name", SPLITTERS)
def test_no_text_takes_time_quadratic_in_its_length(unit, name):
    unit = unit.replace("␣", " ").replace("⏎", "\n")
    started = time.process_time()
    sentence_splitter(name)(unit * (60_000 // len(unit)) + "a")
    assert time.process_time() - started < 2


def test_the_file_needs_only_the_standard_library():
    """As `transformers` sees it, when it loads an exported model."""
    assert set(get_imports(module.__file__)) <= sys.stdlib_module_names


def test_splitters_are_chosen_by_name(monkeypatch):
    assert sentence_splitter() is sentence_splitter("rules") is split_sentences
    assert splitter_version() == "rules-2"
    with pytest.raises(ValueError, match='no sentence splitter "punkt": it is "rules" or "icu"'):
        sentence_splitter("punkt")
    monkeypatch.setitem(sys.modules, "icu", None)
    with pytest.raises(ValueError, match="needs PyICU: install libicu-dev"):
        sentence_splitter("icu")


@needs_icu
def test_icu_splits_by_the_locale():
    split = sentence_splitter("icu")
    assert re.fullmatch(r"icu-\d+(\.\d+)+\+rules-2", splitter_version("icu"))
    assert split("It rained. 😀 She left.\n\n***\nNo one came", "en") == [
        "It rained.",
        "😀 She left. ***",
        "No one came",
    ]
    assert split("今天下雨。你带伞了吗？") == ["今天下雨。", "你带伞了吗？"]
    assert len(split("Έρχεσαι; Ναι.", "el")) == 2
    assert len(split("I came; He left.", "en")) == 1


def test_the_score_counts_boundaries_inside_lines():
    gold = ["One two.", "Three!", "Four?", "Five."]
    assert bench_sentences.score(gold, "en", 2, split_sentences) == (1, 1, 1)
    assert bench_sentences.score(gold, "en", 4, lambda text, lang: [text]) == (0, 0, 0)
    half = bench_sentences.score(gold, "en", 4, lambda text, lang: ["One", "two. Three!", "Four? Five."])
    assert half == pytest.approx((1 / 2, 1 / 3, 2 / 5))


def test_gold_without_final_mark_is_left_out(tmp_path):
    (tmp_path / "en.txt").write_text("A title\nOne (two.)\n\nThree; four;\n“Five!” \n", encoding="utf-8")
    (tmp_path / "el.txt").write_text("Πού;\nΝαι\n", encoding="utf-8")
    assert bench_sentences.read_gold(tmp_path) == {"el": ["Πού;"], "en": ["One (two.)", "“Five!”"]}
    with pytest.raises(InputError, match="holds no"):
        bench_sentences.read_gold(tmp_path / "none")
