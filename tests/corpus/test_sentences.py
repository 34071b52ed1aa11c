"""Golden files: blocks of one document, `[language] text` with ⏎ for a line break, and its sentences, one a line."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.corpus.sentences import split_sentences

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("arabic", "cjk", "cyrillic", "devanagari", "latin", "other")


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


alphabet = st.sampled_from([*"aBΣж一क서\u0301 12.!?…。！।؟\"»”)「（(«“'-—,:;\n\r\u2028\u00a0\u3000*😀"])
texts = st.text(alphabet | st.characters(exclude_categories=["Cs"]), max_size=80)
languages = st.sampled_from(["", "en", "de", "zh-cn"])


@given(texts, languages)
def test_no_letter_is_lost_moved_or_invented(text, lang):
    kept = [character for sentence in split_sentences(text, lang) for character in sentence if character.isalnum()]
    assert kept == [character for character in text if character.isalnum()]


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


@pytest.mark.parametrize("unit", [".", "!", "?…", ". ", " .", "a.", ".)", ")", "。", "「", ". (", "- "])
def test_no_text_takes_time_quadratic_in_its_length(unit):
    started = time.process_time()
    split_sentences(unit * (20_000 // len(unit)) + "a")
    assert time.process_time() - started < 1
