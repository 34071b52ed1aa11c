"""Sentence splitting for any script without a model: by rules, or by ICU where PyICU is installed.

Owns where a sentence ends and how long one may get. A line break always ends one; inside a line every run of terminators
is a candidate that the rules accept or refuse from its neighbours only, so a cut never depends on text far away.
Uses only the standard library: the file travels inside exported models.
"""

import functools
import importlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

SPLITTER_VERSION = "rules-2"

# Longest sentence in characters; shorter where phrases, not sentences, are told apart by spaces.
MAX_CHARACTERS = 1000
MAX_PHRASED_CHARACTERS = 300

_CLOSERS = "\"»”’')\\]」』》〉）】›“"
_EAST_CLOSERS = "”’」』》〉）】)\\]"  # German closes with “, Chinese opens
_OPENERS = "\"«“‘'(\\[「『《〈（【‹„¿¡"
# Terminators that need white space behind them: Unicode's Sentence_Terminal of the scripts with Wikipedias, the Greek
# question mark and the Tibetan shad. Indic, Ethiopic and Myanmar full stops are often typed without the space.
_SPACED = (
    ".!?…‼⁇⁈⁉\u037e\u0589\u061e\u061f\u06d4\u0700-\u0702\u07f9\u0964\u0965\u0f0d\u0f0e\u104b\u1362\u1367\u1368\u166e"
    "\u17d4\u17d5\u1803\u1809\u1944\u1945\u1b5a\u1b5b\u1c3b\u1c3c\u1c7e\u1c7f\ua4ff\ua8ce\ua8cf\ua9c8\ua9c9\uabeb"
)
_UNSPACED_BEFORE_LETTER = "\u0964\u0965\u104b\u1362"
_UNSPACED = "。！？｡"
_GREEK = "\u0370-\u037d\u0384-\u03ff\u1f00-\u1fff"
_ARMENIAN = "\u0531-\u0588"
# Starts with one set of characters, which `re` looks for fast. A run is tried from its first mark only, else a long run
# costs its length squared. Greek asks with ";", Armenian is also typed with ":" for its full stop.
_CANDIDATE = re.compile(
    rf"[{_UNSPACED}{_SPACED};:](?:"
    rf"(?<=[{_UNSPACED}])[{_UNSPACED}]*(?P<east>(?:\s?[{_EAST_CLOSERS}]|[\"'])*)\s*"
    rf"|(?<![{_SPACED}].)(?<![;:])[{_SPACED}]*(?P<closer>(?:\s[»”“](?!\S))?[{_CLOSERS}]*)"
    rf"(?:\s+|(?<=[{_UNSPACED_BEFORE_LETTER}])(?=[^\W\d_]))"
    rf"|(?:(?<=[{_GREEK}];)|(?<=[{_GREEK}]»;)|(?<=[{_ARMENIAN}]:)|(?<=[{_ARMENIAN}]»:))(?P<local>[{_CLOSERS}]*)\s+)",
    re.DOTALL,
)
_NEXT = re.compile(rf"[{_OPENERS}\s]*([-–—]*)[{_OPENERS}\s]*(.)", re.DOTALL)
_LAST_WORD = re.compile(r"[^\s(\[«“„\"]*$")
_AFTER_END = re.compile(rf"(?:^|[{_SPACED}{_UNSPACED}:;•*·–—-])(?=[{_CLOSERS}{_OPENERS}\s]*$)")
# Japanese goes on after a quotation with its particle ("「はい。」と言った"); the letters refused begin sentences.
_QUOTED_ON = re.compile("と(?![こてもにり])|って")

_LOCAL = {";": frozenset(["", "el", "grc", "pnt"]), ":": frozenset(["", "hy", "hyw"])}
# Languages that write ordinals with a dot ("3. Oktober").
_ORDINAL_DOT = frozenset("de da nb nn no fi cs sk hu et lv hr sr sl bs pl is fo se lb als bar nds eu tr az tk".split())
_ABBREVIATIONS = frozenset(
    """
    mr mrs ms dr prof st sr jr rev gen col capt lt sgt hon gov sen rep pres jan feb mar apr jun jul aug sep sept oct nov
    dec vs etc inc ltd co corp dept univ assn bros no vol pp fig figs ed eds approx ca cf e.g i.e al op u.s u.k u.n a.m
    p.m ph.d est ave blvd rd mt ft
    z.b u.a d.h bzw usw evtl ggf nr bd hrsg jh chr geb bspw sog vgl mio mrd inkl str abs art bzgl max min tel
    m mme mlle mm av bd p.ex env
    sra srta ud uds ee.uu págs núm pág
    г гг в вв см т.е т.к т.д т.п руб тыс млн млрд им ул стр др рис напр
    np tzn itd itp ul inż godz m.in tzw wg ok tys
    tzv např resp atd apod čl mil tj popř
    vb yy bkz doç örn
    d.w.z bv bijv enz o.a
    dl d.l esim ks n klo
    sig dott sigg ecc pag
    डॉ प्रो श्री मि
    """.split()
)
# Abbreviations of numbers that are words as well ("art. 5", "He studied art."): only before a number.
_BEFORE_NUMBER = frozenset("no art ok ஜன பிப் மார் ஏப் ஆக செப் அக் நவ டிச".split())
# Abbreviations of other languages that are words in these.
_WORDS = {
    "da": {"min", "op"},
    "de": {"jan", "max"},
    "es": {"mar", "mil"},
    "fi": {"sen"},
    "fr": {"est", "sept"},
    "hu": {"est"},
    "nb": {"min"},
    "nl": {"op", "vol"},
    "nn": {"min"},
    "no": {"min"},
    "pt": {"mar", "mil", "vol"},
    "sv": {"min", "sen"},
}

# Scripts that set spaces between phrases: Thai, Lao, Tibetan, Myanmar, Khmer and the Tai ones.
_PHRASED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf]")
_CLAUSE = re.compile(rf"(?:[;:,،؛՝·][{_CLOSERS}]*(?=\s)|[，、；：][{_CLOSERS}]*)")
_SPACES = re.compile(r"\s*")
# Also the zero-width space, the Tibetan syllable dot and the Ethiopic word space.
_SPACE = re.compile("[\\s\u200b\u0f0b\u1361]")


def _continues(letter: str) -> bool:
    """Whether a sentence cannot begin so. Georgian letters count as lower case in Unicode, but begin sentences."""
    return letter.islower() and not "\u10d0" <= letter <= "\u10ff"


def _is_initial(word: str) -> bool:
    """A letter with its marks, where names are shortened so. Elsewhere that is a word: "것", "છે", "වේ"."""
    first = word[:1]
    if not first.isalpha() or first >= "\u2e80" or "\u0d80" <= first <= "\u0dff":
        return False
    letters = sum(map(str.isalnum, word))
    if "\u0b80" <= first < "\u0d80":  # Tamil, Telugu, Kannada, Malayalam, which spell S as "எஸ்"
        return letters == 1 or (letters == 2 and first in "\u0b8e\u0c0e\u0c8e\u0d0e")
    return len(word) == 1 or (letters == 1 and first < "\u0590")


def _word_before(line: str, place: int) -> str:
    return _LAST_WORD.search(line[max(0, place - 24) : place]).group().lstrip("'‘")  # no abbreviation is longer


def _begins_sentence(line: str, place: int) -> bool:
    """Whether nothing but an end, and no abbreviation, comes before `place`."""
    first = max(0, place - 8)
    end = _AFTER_END.search(line[first:place])
    if not end or end.group() != ".":
        return bool(end)
    word = _word_before(line, first + end.start())
    return not (_is_initial(word) or "." in word or word.lower() in _ABBREVIATIONS or word.lower() in _BEFORE_NUMBER)


def _full_stop_ends(line: str, match: re.Match, lang: str, after: str) -> bool:
    """Whether a single dot without a closing mark, before what may begin a sentence, is a full stop."""
    start = match.start()
    if "\u0531" <= line[start - 1 : start] <= "\u0588":  # Armenian pauses with it
        return False
    word = _word_before(line, start)
    if _is_initial(word):
        return False
    if word.isdigit() and len(word) <= 3:
        # A number that stands alone numbers what follows it.
        return not (_begins_sentence(line, start - len(word)) or (lang in _ORDINAL_DOT and len(word) <= 2))
    word = word.lower()
    if word in _BEFORE_NUMBER:
        return not after.isdigit()
    if word in _ABBREVIATIONS:
        return word in _WORDS.get(lang, ())
    return not ("." in word.strip(".") and not after.isupper() and not word[-1].isdigit())


def _ends_sentence(line: str, match: re.Match, lang: str) -> bool:
    if (closer := match["east"]) is not None:
        return not (("」" in closer or "』" in closer) and _QUOTED_ON.match(line, match.end()))
    following = _NEXT.match(line, match.end())
    if not following:
        return True
    dash, after = following.groups()
    if dash and _continues(after):
        return False
    if match["local"] is not None:
        return lang in _LOCAL[line[match.start()]] and not _continues(after)
    closer = match["closer"]
    marks = line[match.start() : match.start("closer")]
    if set(marks) <= {".", "…"}:
        if _continues(after):
            return False
        if marks != ".":
            return True
        if not dash and after in ",;:)":
            return False
        return bool(closer) or _full_stop_ends(line, match, lang, after)
    return not (closer and (dash or _continues(after)))


def _rule_pieces(line: str, lang: str) -> Iterator[str]:
    lang = lang.split("-")[0]
    start = 0
    for match in _CANDIDATE.finditer(line):
        if _ends_sentence(line, match, lang):
            yield line[start : match.end()]
            start = match.end()
    yield line[start:]


def _join(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces, stripped; one without any letter or digit joins the one before, at the start the one after."""
    joined: list[str] = []
    spoken = False
    for piece in map(str.strip, pieces):
        has_letter = any(map(str.isalnum, piece))
        if has_letter and spoken:
            yield " ".join(joined)
            joined = []
        if piece:
            joined.append(piece)
            spoken = spoken or has_letter
    if spoken:
        yield " ".join(joined)


def _bounded(sentence: str) -> Iterator[str]:
    """The sentence, or what it is cut into: after clauses, else at spaces, else anywhere."""
    limit = MAX_CHARACTERS
    if len(sentence) > MAX_PHRASED_CHARACTERS and len(_PHRASED.findall(sentence)) * 2 > len(sentence):
        limit = MAX_PHRASED_CHARACTERS
    start = 0
    while (left := len(sentence) - start) > limit:
        aim = start + -(-left // -(-left // limit))  # pieces of about one length
        place = _last_place(sentence, start, aim, start + limit)
        yield sentence[start:place].rstrip()
        start = _SPACES.match(sentence, place).end()
    yield sentence[start:]


def _last_place(sentence: str, start: int, aim: int, end: int) -> int:
    """Where to cut the piece that begins at `start`, near `aim` and not after `end`."""
    places = [match.end() for match in _CLAUSE.finditer(sentence, (start + aim) // 2, aim)]
    places = places or [match.end() for match in _SPACE.finditer(sentence, start, aim)]
    places = places or [match.end() for match in _SPACE.finditer(sentence, aim, end)][:1]
    if places:
        return places[-1]
    place = end
    while place > start + 1 and unicodedata.category(sentence[place])[0] == "M":  # a letter keeps its marks
        place -= 1
    return place if place > start + 1 else end


def _load_icu():
    try:
        # By name: `transformers` refuses a model one of whose files has an `import` of what is not installed.
        return importlib.import_module("icu")
    except ImportError:
        raise ValueError(
            'the sentence splitter "icu" needs PyICU: install libicu-dev, pkg-config and g++, then pip install PyICU'
        ) from None


@functools.cache
def _icu_sentences(lang: str):
    icu = _load_icu()
    return icu.BreakIterator.createSentenceInstance(icu.Locale(lang))


def _icu_pieces(line: str, lang: str) -> Iterator[str]:
    boundaries = _icu_sentences(lang)
    boundaries.setText(line)
    units = line.encode("utf-16-le", "surrogatepass")  # ICU counts these
    start = 0
    for end in boundaries:
        yield units[2 * start : 2 * end].decode("utf-16-le", "surrogatepass")
        start = end


def _split(text: str, lang: str = "", pieces: Callable[[str, str], Iterable[str]] = _rule_pieces) -> list[str]:
    joined = _join(piece for line in text.splitlines() for piece in pieces(line, lang))
    return [bounded for sentence in joined for bounded in _bounded(sentence)]


def split_sentences(text: str, lang: str = "") -> list[str]:
    """The sentences of `text` by the rules, in order; of a text with a letter or digit only white space is lost.

    None is longer than `MAX_CHARACTERS` (`MAX_PHRASED_CHARACTERS` in scripts that set spaces between phrases).
    """
    return _split(text, lang)


def sentence_splitter(name: str = "rules") -> Callable[..., list[str]]:
    """The function that splits as `split_sentences` does, with the same limits: by "rules", or by "icu" (one thread).

    Raises:
        ValueError: there is no such splitter, or "icu" without PyICU.
    """
    splitter_version(name)
    return split_sentences if name == "rules" else functools.partial(_split, pieces=_icu_pieces)


def splitter_version(name: str = "rules") -> str:
    """What to record with texts split so: another version may split otherwise.

    Raises:
        ValueError: there is no such splitter, or "icu" without PyICU.
    """
    if name == "rules":
        return SPLITTER_VERSION
    if name != "icu":
        raise ValueError(f'no sentence splitter "{name}": it is "rules" or "icu"')
    # The joins and the limits of this file apply to it too.
    return f"icu-{_load_icu().ICU_VERSION}+{SPLITTER_VERSION}"
