"""Sentence splitting by rules, for any script, without a model.

Owns where a sentence ends. A line break always ends one; inside a line every run of terminators is a candidate that
the rules below accept or refuse from its neighbours only, so the cut at one place never depends on text far away.
Uses only the standard library: the file travels inside exported models.
"""

import re

SPLITTER_VERSION = "rules-1"

_CLOSERS = "\"»”’')\\]」』》〉）】›“"
_OPENERS = "\"«“‘'(\\[「『《〈（【‹„¿¡"
# Terminators that need white space behind them, and the East Asian ones that do not.
_SPACED = ".!?…\u061f\u06d4\u0964\u0965\u0589\u1362\u17d4\u17d5\u166e\u104b\u0f0d"
_UNSPACED = "。！？｡"
# A run is tried from its first mark only, else a long run costs its length squared. French sets a space before "»".
_CANDIDATE = re.compile(
    rf"([{_UNSPACED}]+)[{_CLOSERS}]*\s*|(?<![{_SPACED}])([{_SPACED}]+)((?:[ \u00a0\u202f]»)?[{_CLOSERS}]*)(\s+)"
)
_NEXT = re.compile(rf"[{_OPENERS}\s]*(.)", re.DOTALL)
_LAST_WORD = re.compile(r"[^\s(\[«“„]*$")

# Languages that write ordinals with a dot ("3. Oktober").
_ORDINAL_DOT = frozenset(
    "de da nb nn no fi cs sk hu et lv lt hr sr sl bs pl is fo se lb als bar nds eu tr az tk".split()
)
_ABBREVIATIONS = frozenset(
    """
    mr mrs ms dr prof st sr jr rev gen col capt lt sgt hon gov sen rep pres jan feb mar apr jun jul aug sep sept oct nov
    dec vs etc inc ltd co corp dept univ assn bros no vol pp fig figs ed eds approx ca cf e.g i.e al op u.s u.k u.n a.m
    p.m ph.d est ave blvd rd mt ft
    z.b u.a d.h bzw usw evtl ggf nr bd hrsg jh chr geb bspw sog vgl mio mrd inkl str abs art bzgl max min tel
    m mme mlle mm av bd p.ex env
    sra srta ud uds ee.uu págs núm pág
    г гг в вв см т.е т.к т.д т.п руб тыс млн млрд им ул стр др рис напр
    np tzn itd itp ul inż godz m.in tzw wg
    tzv např resp atd apod čl mil tj popř
    vb yy bkz doç örn
    d.w.z bv bijv enz o.a
    dl d.l esim ks n klo
    sig dott sigg ecc pag
    डॉ प्रो श्री
    """.split()
)


# Abbreviations of numbers that are words as well ("art. 5", "He studied art."): only before a number.
_BEFORE_NUMBER = frozenset("no art".split())


def _is_georgian(letter: str) -> bool:
    """Georgian letters count as lower case in Unicode, but begin sentences."""
    return "\u10d0" <= letter <= "\u10ff"


def _ends_sentence(line: str, match: re.Match, lang: str) -> bool:
    if match.group(1):
        return True
    marks, closer = match.group(2), match.group(3)
    following = _NEXT.match(line, match.end())
    after = following.group(1) if following else ""
    if not after:
        return True
    if set(marks) <= {".", "…"}:
        if after.islower() and not _is_georgian(after):
            return False
        if marks != ".":
            return True
        if after in ",;:)-–":
            return False
        if closer:
            return True
        word = _LAST_WORD.search(line[max(0, match.start() - 24) : match.start()]).group()  # no abbreviation is longer
        if len(word) == 1 and word.isalpha():
            return False
        if word.lower() in _BEFORE_NUMBER and not after.isdigit():
            return True
        if word.lower() in _ABBREVIATIONS:
            return False
        if "." in word.strip(".") and not after.isupper() and not word[-1:].isdigit():
            return False
        return not (lang.split("-")[0] in _ORDINAL_DOT and word.isdigit() and len(word) <= 2)
    return not (closer and (after.islower() or after in "-–—"))


def split_sentences(text: str, lang: str = "") -> list[str]:
    """The sentences of `text`, stripped, in order; pieces without any letter or digit join the sentence before."""
    sentences: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in _CANDIDATE.finditer(line):
            if _ends_sentence(line, match, lang):
                sentences.append(line[start : match.end()])
                start = match.end()
        sentences.append(line[start:])
    kept: list[str] = []
    for sentence in (sentence.strip() for sentence in sentences):
        if any(map(str.isalnum, sentence)):
            kept.append(sentence)
        elif sentence and kept:
            kept[-1] += " " + sentence
    return kept
