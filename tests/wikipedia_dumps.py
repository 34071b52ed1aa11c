"""Writes tiny Wikipedia dumps into a folder: CirrusSearch content and SQL tables, in the formats of 2026 and before.

Owns the layouts of files and tables, and a sample of three wikis of our own writing. Knows nothing of the readers:
names, CREATE TABLE texts and escapes are those of the dump programs.
"""

import bz2
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

CIRRUS_DATE, SQL_DATE = "20260816", "20261001"
Value = int | float | str | bytes | None

# Columns and keys, one on a line or after "; ".
_TABLES = {
    "page": r"""page_id int(8) unsigned NOT NULL AUTO_INCREMENT; page_namespace int(11) NOT NULL DEFAULT 0
page_title varbinary(255) NOT NULL DEFAULT ''; page_is_redirect tinyint(1) unsigned NOT NULL DEFAULT 0
page_is_new tinyint(1) unsigned NOT NULL DEFAULT 0; page_random double unsigned NOT NULL DEFAULT 0
page_touched binary(14) NOT NULL DEFAULT '\0\0\0\0\0\0\0\0\0\0\0\0\0\0'; page_links_updated varbinary(14) DEFAULT NULL
page_latest int(8) unsigned NOT NULL DEFAULT 0; page_len int(8) unsigned NOT NULL DEFAULT 0
page_content_model varbinary(32) DEFAULT NULL; page_lang varbinary(35) DEFAULT NULL
PRIMARY KEY (`page_id`); UNIQUE KEY `page_name_title` (`page_namespace`,`page_title`)""",
    "page_props": """pp_page int(8) unsigned NOT NULL; pp_propname varbinary(60) NOT NULL DEFAULT ''
pp_value blob NOT NULL; pp_sortkey float DEFAULT NULL; PRIMARY KEY (`pp_page`,`pp_propname`)""",
    "linktarget": """lt_id bigint(20) unsigned NOT NULL AUTO_INCREMENT; lt_namespace int(11) NOT NULL
lt_title varbinary(255) NOT NULL; PRIMARY KEY (`lt_id`); UNIQUE KEY `lt_name` (`lt_namespace`,`lt_title`)""",
    "langlinks": """ll_from int(8) unsigned NOT NULL DEFAULT 0; ll_lang varbinary(35) NOT NULL DEFAULT ''
ll_title varbinary(255) NOT NULL DEFAULT ''; PRIMARY KEY (`ll_from`,`ll_lang`); KEY `ll_lang` (`ll_lang`,`ll_title`)""",
    "wb_items_per_site": """ips_row_id bigint(20) unsigned NOT NULL AUTO_INCREMENT
ips_item_id int(10) unsigned NOT NULL; ips_site_id varbinary(32) NOT NULL; ips_site_page varbinary(310) NOT NULL
PRIMARY KEY (`ips_row_id`); UNIQUE KEY `wb_ips_item_site_page` (`ips_site_id`,`ips_site_page`)""",
    "categorylinks": """cl_from int(8) unsigned NOT NULL DEFAULT 0; cl_to varbinary(255) NOT NULL DEFAULT ''
cl_sortkey varbinary(230) NOT NULL DEFAULT ''
cl_timestamp timestamp NOT NULL DEFAULT current_timestamp() ON UPDATE current_timestamp()
cl_sortkey_prefix varbinary(255) NOT NULL DEFAULT ''; cl_collation varbinary(32) NOT NULL DEFAULT ''
cl_type enum('page','subcat','file') NOT NULL DEFAULT 'page'
cl_collation_id smallint(5) unsigned NOT NULL DEFAULT 0; cl_target_id bigint(20) unsigned DEFAULT NULL
PRIMARY KEY (`cl_from`,`cl_to`); PRIMARY KEY (`cl_from`,`cl_target_id`); KEY `cl_timestamp` (`cl_to`,`cl_timestamp`)""",
}
# What of categorylinks there was not: to 2024, in 2025, in 2026.
_ABSENT = {
    "old": ("cl_collation_id", "cl_target_id"),
    "transitional": ("(`cl_from`,`cl_target_id",),
    "new": ("cl_to", "cl_collation "),
}
_HEAD = """-- MariaDB dump 10.19  Distrib 10.11.14-MariaDB, for debian-linux-gnu (x86_64)
--
-- Host: db1.example; Database: {wiki}'s
-- ------------------------------------------------------

/*!40101 SET NAMES utf8mb4 */;

DROP TABLE IF EXISTS `{table}`;
/*!40101 SET character_set_client = utf8 */;
CREATE TABLE `{table}` (
{body}
) ENGINE=InnoDB AUTO_INCREMENT=7 DEFAULT CHARSET=binary ROW_FORMAT=COMPRESSED;

--
-- Dumping data for table `{table}`
--

/*!40000 ALTER TABLE `{table}` DISABLE KEYS */;
"""
_TAIL = "/*!40000 ALTER TABLE `{table}` ENABLE KEYS */;\n\n-- Dump completed on 2026-10-03  7:09:13\n"
_ESCAPES = {0: rb"\0", 10: rb"\n", 13: rb"\r", 26: rb"\Z", 34: rb"\"", 39: rb"\'", 92: rb"\\"}

# page_id|namespace|title|item|categories|text; Q11442, Q5994 and Q405 are in all three wikis, Q6607 in two.
_SAMPLE = {
    "enwiki": """
12|0|Bicycle|Q11442|Cycling;Land vehicles;Articles with broken links|A bicycle is a vehicle with two wheels, one behind the other. The rider sits on a saddle and turns the pedals with both feet. A chain carries this motion to the rear wheel. Brakes on the rims or on the hubs slow the wheels down. In flat towns many people ride to work every day. Others ride only on Sundays, e.g. along a river.
13|0|Piano|Q5994|Keyboard instruments|A piano is a large instrument with eighty-eight keys. Each key moves a small hammer covered with felt. The hammer strikes the strings and falls back at once. A damper ends the tone when the key is let go. Pedals make the tone longer or softer. Most pianos need a tuner once or twice a year.
14|0|Moon|Q405|Moons|The Moon goes round the Earth once in about four weeks. It shines with the light of the Sun. Its near side always faces us. Dark plains and bright mountains can be seen without a telescope. The tides of the sea follow its course. Twelve people have walked on its dust.
15|0|Pianoforte||Keyboard instruments|
16|14|Keyboard instruments|Q900016|Musical instruments|Instruments that are played by means of keys.
17|0|Push bike|Q11442|Cycling|A push bike is a bicycle without a motor. The word is used in a few countries.
18|0|Harrow Lane||Streets|Harrow Lane is a short street with nine houses. Nobody has linked it to an item.
19|0|Tandem|Q900019|Cycling|
""",
    "dewiki": """
3|0|Fahrrad|Q11442|Radverkehr;Landfahrzeug|Ein Fahrrad ist ein Fahrzeug mit zwei Rädern, die hintereinander stehen. Wer fährt, sitzt auf einem Sattel und tritt in die Pedale. Eine Kette bringt die Bewegung zum Hinterrad. Bremsen an Felge oder Nabe machen das Rad langsamer. In flachen Städten fahren viele Leute damit zur Arbeit. Andere fahren nur am 1. Mai, z. B. am Fluss entlang.
4|0|Klavier|Q5994|Tasteninstrument|Ein Klavier ist ein großes Instrument mit achtundachtzig Tasten. Jede Taste bewegt einen kleinen Hammer mit Filz. Der Hammer schlägt die Saiten an und fällt gleich zurück. Ein Dämpfer beendet den Ton, sobald die Taste frei ist. Pedale machen den Ton länger oder leiser. Die meisten Klaviere werden einmal im Jahr gestimmt.
5|0|Mond|Q405|Mond|Der Mond läuft in etwa vier Wochen um die Erde. Er leuchtet im Licht der Sonne. Seine Vorderseite zeigt immer zu uns. Dunkle Ebenen und helle Berge sieht man ohne Fernrohr. Ebbe und Flut folgen seinem Lauf. Zwölf Menschen sind durch seinen Staub gegangen.
6|0|Gitarre|Q6607|Zupfinstrument|Eine Gitarre hat meistens sechs Saiten. Man zupft sie mit den Fingern oder mit einem Plättchen. Der Hals trägt Bünde aus Metall. Der Körper aus Holz macht den Ton laut. Elektrische Gitarren brauchen dafür einen Verstärker. Viele lernen das Spiel ohne Lehrer.
7|0|Piano||Tasteninstrument|
8|14|Tasteninstrument|Q900016|Musikinstrument|Instrumente, die mit Tasten gespielt werden.
9|0|Kurzer Weg|Q900009|Straße|Der Kurze Weg ist eine Straße mit drei Häusern.
""",
    "jawiki": """
21|0|自転車|Q11442|自転車;乗り物|自転車は、二つの車輪が前後に並ぶ乗り物である。乗る人はサドルに座り、両足でペダルを回す。その動きはチェーンで後ろの車輪に伝わる。ブレーキは車輪を遅くする。平らな町では、多くの人が毎日これで仕事に行く。日曜日に川に沿って走るだけの人もいる。
22|0|ピアノ|Q5994|鍵盤楽器|ピアノは、八十八の鍵盤を持つ大きな楽器である。鍵盤を押すと、フェルトのついた小さなハンマーが動く。ハンマーは弦を打ち、すぐに戻る。指を離すと、ダンパーが音を止める。ペダルは音を長くしたり弱くしたりする。多くのピアノは年に一度調律される。
23|0|月|Q405|月|月は約四週間で地球のまわりを一周する。月は太陽の光で輝く。表側はいつも地球を向いている。暗い平原と明るい山は、望遠鏡がなくても見える。潮の満ち引きは月の動きに従う。十二人がその砂の上を歩いた。
24|0|ギター|Q6607|弦楽器|ギターには普通六本の弦がある。指かピックで弦を弾く。ネックには金属のフレットがある。木の胴が音を大きくする。エレキギターにはアンプが必要である。先生なしで覚える人も多い。
25|0|単車||自転車|
26|14|鍵盤楽器|Q900016|楽器|鍵盤で演奏する楽器。
27|0|坂の下||道路|坂の下は短い道である。項目はまだない。
""",
}
_REDIRECTS = {("enwiki", 15): "Piano", ("dewiki", 7): "Klavier", ("jawiki", 25): "自転車"}
_HIDDEN = "Articles with broken links"
_CATEGORY_WORD = {"enwiki": "Category", "dewiki": "Kategorie", "jawiki": "Category"}
_TOPICS = {"Q5994": ["STEM.STEM*|120", "Culture.Media.Music|998"], "Q405": ["STEM.Space|1000"]}


def sample_pages(wiki: str) -> list[dict]:
    """The documents of one wiki of the sample: "enwiki", "dewiki" (string ids and a type) or "jawiki"."""
    pages = []
    for line in _SAMPLE[wiki].strip().split("\n"):
        number, namespace, title, item, categories, text = line.split("|")
        page = {
            "wiki": wiki, "page_id": int(number), "namespace": int(namespace), "title": title, "text": text,
            "namespace_text": _CATEGORY_WORD[wiki] if namespace == "14" else "", "language": wiki[:2],
            "timestamp": "2026-06-13T02:15:01Z", "version": 1099136770 + int(number), "content_model": "wikitext",
            "page_type": "primary", "category": categories.split(";"), "template": ["Template:Infobox"], "heading": [],
            "opening_text": text[:40], "source_text": f"'''{title}''' {{{{Infobox}}}}\n{text}", "incoming_links": 20,
            "redirect": [{"namespace": 0, "title": title.upper()}], "external_link": ["https://example.com/1"],
            "weighted_tags": [f"classification.prediction.articletopic/{topic}" for topic in _TOPICS.get(item, [])],
        }  # fmt: skip
        page |= {"wikibase_item": item} if item else {}
        if target := _REDIRECTS.get((wiki, int(number))):
            page |= {"page_type": "redirect", "redirect_target": {"namespace": 0, "title": target}}
            del page["text"]
        pages.append(page | ({"_id": number, "_type": "page"} if wiki == "dewiki" else {}))
    return pages


def sample_rows(wiki: str, table: str) -> list[dict[str, Value]]:
    """The rows of a table that belong to `sample_pages`; of "wikidatawiki" there is wb_items_per_site only."""
    pages = [page for name in _SAMPLE for page in sample_pages(name) if wiki in (name, "wikidatawiki")]
    linked = [page for page in pages if "wikibase_item" in page]
    targets = {c: 700 + n for n, c in enumerate(sorted({c for page in pages for c in page["category"]}))}
    rows: list[tuple[Value, ...]] = []
    if table == "wb_items_per_site":
        # Wikidata has one page a wiki of an item, whatever the wikis say.
        sites = {(int(page["wikibase_item"][1:]), page["wiki"]): _full_title(page) for page in reversed(linked)}
        rows = [(55 + n, *site, title) for n, (site, title) in enumerate(sorted(sites.items()))]
    elif table == "page":
        pages += [{"page_id": 99, "namespace": 14, "title": _HIDDEN, "version": 1}] if wiki == "enwiki" else []
        for page in pages:
            start = (page["page_id"], page["namespace"], _key(page["title"]), int("redirect_target" in page))
            rows.append((*start, 0, 0.25, "20260930010203", None, page["version"], 400, "wikitext", None))
    elif table == "page_props":
        rows = [(page["page_id"], "wikibase_item", page["wikibase_item"], None) for page in linked]
        rows += [(pages[0]["page_id"], "displaytitle", r"<i>It's (x),(y)\</i>", None)]
        rows += [(99, "hiddencat", "", None)] if wiki == "enwiki" else []
    elif table == "langlinks":
        others = [page for name in _SAMPLE if name != wiki for page in reversed(sample_pages(name))]
        for page in linked:
            same = [other for other in others if other.get("wikibase_item") == page["wikibase_item"]]
            links = {other["language"]: _full_title(other) for other in same}
            rows += [(page["page_id"], lang, title) for lang, title in sorted(links.items())]
    elif table == "linktarget":
        rows = [(number, 14, _key(title)) for title, number in targets.items()] + [(690, 0, "O'Brien")]
    elif table == "categorylinks":
        key, when = b"\x8a'\\\xff),(", "2025-01-01 00:00:00"  # the key is no UTF-8
        for page in pages:
            start, kind = page["page_id"], "subcat" if page["namespace"] == 14 else "page"
            rows += [(start, _key(c), key, when, "", "uppercase", kind, 1, targets[c]) for c in page["category"]]
    return [dict(zip(_columns(_lines(table)), row, strict=True)) for row in rows]


def _lines(table: str) -> list[str]:
    return _TABLES[table].replace("; ", "\n").split("\n")


def _columns(lines: Iterable[str]) -> list[str]:
    return [line.split()[0] for line in lines if line[0].islower()]


def _key(title: str) -> str:
    return title.replace(" ", "_")


def _full_title(page: Mapping) -> str:
    return f"{page['namespace_text']}:{page['title']}".lstrip(":")


def write_sample(folder: Path, layout: str = "lines", schema: str = "new") -> None:
    """Write everything of the three wikis, and Wikidata's sitelinks."""
    for wiki in _SAMPLE:
        write_cirrus(folder, wiki, sample_pages(wiki))
        for table in ("page", "page_props", "linktarget", "langlinks", "categorylinks"):
            write_sql(folder, wiki, table, sample_rows(wiki, table), layout, schema)
    write_sql(folder, "wikidatawiki", "wb_items_per_site", sample_rows("wikidatawiki", "wb_items_per_site"), layout)


def write_cirrus(
    folder: Path, wiki: str, pages: Sequence[Mapping], parts: int = 2, date: str = CIRRUS_DATE
) -> list[Path]:
    """Write the content index of a wiki in `parts` files, and `_SUCCESS`; returns the files."""
    base = folder / date / f"index_name={wiki}_content"
    base.mkdir(parents=True, exist_ok=True)
    paths = [base / f"{wiki}_content-{date}-{part:05d}.json.bz2" for part in range(parts)]
    for part, path in enumerate(paths):
        path.write_bytes(bz2.compress(cirrus_lines(pages[part::parts])))
    (base / "_SUCCESS").touch()
    return paths


def cirrus_lines(pages: Iterable[Mapping]) -> bytes:
    """Two lines a page: the action, with its `_type` and `_id` (default: the `page_id`), and the document without."""
    records = []
    for page in pages:
        action = {key: page[key] for key in ("_type", "_id") if key in page} or {"_id": page["page_id"]}
        records += [{"index": action}, {key: value for key, value in page.items() if key not in ("_type", "_id")}]
    return b"".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for line in records)


def write_sql(folder: Path, wiki: str, table: str, rows: Iterable[Mapping[str, Value]], layout: str = "lines", schema: str = "new", date: str = SQL_DATE) -> Path:  # fmt: skip
    """Write `<wiki>/<date>/<wiki>-<date>-<table>.sql.gz`; returns it. The other arguments are those of `sql_text`."""
    path = folder / wiki / date / f"{wiki}-{date}-{table}.sql.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(sql_text(wiki, table, rows, layout, schema), mtime=0))
    return path


def sql_text(
    wiki: str, table: str, rows: Iterable[Mapping], layout: str = "lines", schema: str = "new", per_insert: int = 5
) -> bytes:
    """A table's dump, of values by column: one a row lacks is NULL, one the table lacks is left out.

    `layout` is "lines" (mariadb-dump of 2026, one tuple a line) or "one_line" (mysqldump, an INSERT a line), `schema`
    that of categorylinks: "old" (to 2024), "transitional" (2025) or "new" (2026).
    """
    absent = _ABSENT[schema] if table == "categorylinks" else ()
    lines = [line for line in _lines(table) if not any(part in line for part in absent)]
    names = _columns(lines)
    body = ",\n".join("  " + (f"`{line.replace(' ', '` ', 1)}" if line[0].islower() else line) for line in lines)
    head = "/*M!999999\\- enable the sandbox mode */ \n" if layout == "lines" else ""
    out = [(head + _HEAD.format(wiki=wiki, table=table, body=body)).encode()]
    opening, between = (b"\n", b",\n") if layout == "lines" else (b" ", b",")
    tuples = [b"(" + b",".join(sql_value(row.get(name)) for name in names) + b")" for row in rows]
    for first in range(0, len(tuples), per_insert):
        values = between.join(tuples[first : first + per_insert])
        out.append(b"INSERT INTO `%b` VALUES%b%b;\n" % (table.encode(), opening, values))
    return b"".join([*out, _TAIL.format(table=table).encode()])


def sql_value(value: Value) -> bytes:
    """A value as the dump programs write it."""
    if value is None:
        return b"NULL"
    if isinstance(value, int | float):
        return str(value).encode()
    value = value.encode() if isinstance(value, str) else value
    return b"'" + b"".join(_ESCAPES.get(byte) or bytes([byte]) for byte in value) + b"'"
