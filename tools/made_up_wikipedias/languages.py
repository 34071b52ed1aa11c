"""How each made-up language looks: syllables, punctuation, forms of titles, abbreviations.

Owns what differs between the languages; `words` makes vocabularies and texts of it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """How a made-up language looks.

    Attributes:
        weight: chances of an item to be in this language.
        syllables: beginnings, middles and ends.
        marks: full stop, question mark, comma, and what is between sentences.
        words: shortest and longest sentence, in words.
        names: of a hundred words, those with a capital.
        titles: forms of a title; the last three are a list's, a disambiguation's and a hidden category's.
        extras: abbreviations and numbers within a sentence.
    """

    weight: int
    syllables: tuple[list[str], list[str], list[str]]
    marks: tuple[str, str, str, str]
    words: tuple[int, int]
    names: int
    titles: tuple[str, ...]
    category: str
    extras: list[str]


_LATIN_ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pl pr r s sh st t th tr v w".split()
_STOPS = (".", "?", ",", " ")
NUMBERS = "1848 1914 1967 1989 2004 2021 7 12 48 300 2,5 98,6 10000".split()
LANGUAGES = {
    "en": Language(
        6, (_LATIN_ONSETS, "a e i o u ea ou ai".split(), ["", "", *"n r s t l m nd st ck ng".split()]), _STOPS, (5, 31), 9,
        ("%s %s", "%s %s", "%s of %s", "%s O'%s", "%s %s (film)", "List of %s %s", "%s %s (disambiguation)", "Articles with %s %s"),
        "Category", ["e.g.", "i.e.", "Dr. Smith", "St. Louis", "c. 1850", "J. R. Hart", "approx.", "3.5", "U.S."],
    ),
    "de": Language(
        3, ([*_LATIN_ONSETS, "sch", "z", "pf"], "a e i o u ä ö ü ei ie au".split(), ["", "", *"n r s t ß nd cht ng lt en".split()]), _STOPS, (5, 27), 30,
        ("%s %s", "%s-%s", "%s (%s)", "%s von %s", "%s %s (Film)", "Liste der %s %s", "%s %s (Begriffsklärung)", "Wikipedia:%s %s"),
        "Kategorie", ["z. B.", "d. h.", "Dr. Meier", "3. Oktober", "ca. 40", "u. a.", "Nr. 5", "usw."],
    ),
    "fr": Language(
        3, (_LATIN_ONSETS, "a e i o u é è ê ou oi eau".split(), ["", "", *"n r s t l que x nt le".split()]), _STOPS, (6, 31), 8,
        ("%s %s", "%s-%s", "L'%s %s", "%s d'%s", "%s %s (film)", "Liste des %s %s", "%s %s (homonymie)", "Article avec %s %s"),
        "Catégorie", ["p. ex.", "M. Martin", "av. J.-C.", "« oui »", "no 3", "env. 20", "etc."],
    ),
    "ru": Language(
        2, ("б в г д ж з к л м н п р с т ф х ц ч ш ст пр кр".split(), "а е и о у ы ю я".split(), ["", "", *"н р с т й л м ть ск".split()]), _STOPS, (5, 25), 8,
        ("%s %s", "%s-%s", "%s, %s", "%s и %s", "%s %s (фильм)", "Список %s %s", "%s %s (значения)", "Википедия:%s %s"),
        "Категория", ["т. е.", "т. д.", "в 1972 г.", "им. Ленина", "ул. Мира", "5 млн", "см."],
    ),
    "ja": Language(
        2, (list("のはをにがでとしてたるいなれさも"), [chr(0x4E00 + 13 * i) for i in range(1500)], list("アイウカキクコサシスタテトナニバブマミムラリルレロン")), ("。", "？", "、", ""), (8, 34), 0,
        ("%s・%s", "%s・%s", "%s・%s駅", "%s=%s", "%s・%s (映画)", "%s・%sの一覧", "%s・%s (曖昧さ回避)", "%s・%sを含む記事"),
        "Category", ["1987年", "3月", "約40", "No.5", "「東」", "(西)", "JR"],
    ),
    "hi": Language(
        1, (list("कखगघचजटडतदनपबभमयरलवशसह"), ["", *"ा ि ी ु ू े ै ो ौ".split()], ["", "", "", "न", "र", "ल", "ं", "त"]), ("।", "?", ",", " "), (5, 27), 0,
        ("%s %s", "%s %s", "%s का %s", "%s-%s", "%s %s (फ़िल्म)", "%s %s की सूची", "%s %s (बहुविकल्पी)", "%s %s वाले लेख"),
        "श्रेणी", ["डॉ. वर्मा", "1947", "लगभग 40", "ई.", "२५", "श्री राम"],
    ),
}  # fmt: skip
