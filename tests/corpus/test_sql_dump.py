"""The SQL reader on dumps as mysqldump and mariadb-dump write them, whole and damaged, at any chunk size."""

import bz2
import gzip
import tracemalloc

import pytest
import wikipedia_dumps as dumps
from hypothesis import given
from hypothesis import strategies as st

from hmde_dist.command import InputError
from hmde_dist.corpus import sql_dump
from hmde_dist.corpus.sql_dump import Damage, read_chunks, read_rows

LAYOUTS = ["lines", "one_line"]
PROPS = ("pp_page", "pp_propname", "pp_value", "pp_sortkey")
# Half of all bytes are those that a tokenizer may trip over.
TRICKY = st.lists(st.sampled_from([b"'", b"\\", b"),(", b";\n", b"\0", b"NULL", b"-- ", b"INSERT"]), max_size=6)
STRINGS = st.one_of(TRICKY.map(b"".join), st.binary(max_size=12))
ROWS = st.lists(
    st.tuples(st.integers(-9, 10**12), STRINGS, st.none() | STRINGS, st.none() | st.floats(0, 1e9)), max_size=9
)


@pytest.fixture
def read(tmp_path):
    """`read(text, columns, ...)`: the rows of a dump of page_props with this text, and the problems."""

    def rows(text, columns=PROPS, table="page_props", name="x.sql", chunk=1 << 16):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        problems = []
        return list(read_rows(path, table, columns, problems, chunk)), problems

    return rows


def as_read(rows):
    return [tuple(str(v).encode() if isinstance(v, int | float) else v for v in row) for row in rows]


def text_of(rows, layout="lines", **options):
    return dumps.sql_text(
        "xxwiki", "page_props", [dict(zip(PROPS, row, strict=True)) for row in rows], layout, **options
    )


@given(rows=ROWS, layout=st.sampled_from(LAYOUTS), chunk=st.integers(1, 200), per_insert=st.integers(1, 4))
def test_random_rows_come_back(tmp_path_factory, rows, layout, chunk, per_insert):
    path = tmp_path_factory.getbasetemp() / "random.sql"
    path.write_bytes(text_of(rows, layout, per_insert=per_insert))
    problems = []
    assert list(read_rows(path, "page_props", PROPS, problems, chunk)) == as_read(rows)
    assert problems == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x.sql", "x.sql.gz"])
def test_every_boundary_between_chunks(read, layout, name):
    rows = [(1, b"wikibase_item", b"Q1490", None), (2, b"title", b"<i>Ain't (x),(y)\\</i>\n\r\x1a\"\0\xff", 1.5e-05)]
    for chunk in (*range(1, 70), 1 << 16):
        assert read(text_of(rows, layout), name=name, chunk=chunk) == (as_read(rows), [])


def test_columns_are_found_by_name_and_given_in_the_order_asked_for(read):
    text = text_of([(7, b"p", b"v", None)])
    assert read(text, ("pp_value", "pp_page"))[0] == [(b"v", b"7")]
    assert read(text, ("pp_page", "absent?", "pp_page", "pp_sortkey?"))[0] == [(b"7", None, b"7", None)]
    assert read(text, ("pp_propname",))[0] == [(b"p",)]
    assert read(text, ("absent?",))[0] == [(None,)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schema", ["old", "transitional", "new"])
def test_categorylinks_of_every_year(tmp_path, layout, schema):
    sample = dumps.sample_rows("jawiki", "categorylinks")
    path = dumps.write_sql(tmp_path, "jawiki", "categorylinks", sample, layout, schema)
    problems = []
    read = list(read_rows(path, "categorylinks", ("cl_target_id?", "cl_from", "cl_to?", "cl_sortkey"), problems))
    assert [(row[1], row[3]) for row in read] == [(b"%d" % row["cl_from"], row["cl_sortkey"]) for row in sample]
    titles = [None if schema == "new" else row["cl_to"].encode() for row in sample]
    targets = [None if schema == "old" else b"%d" % row["cl_target_id"] for row in sample]
    assert [(row[0], row[2]) for row in read] == list(zip(targets, titles, strict=True))
    assert problems == []


@pytest.mark.parametrize("table", ["page", "page_props", "linktarget", "langlinks", "wb_items_per_site"])
def test_the_other_tables(tmp_path, table):
    sample = dumps.sample_rows("wikidatawiki" if table.startswith("wb") else "enwiki", table)
    path = dumps.write_sql(tmp_path, "enwiki", table, sample)
    expected = [tuple(v.encode() if isinstance(v, str) else v for v in row.values()) for row in sample]
    assert list(read_rows(path, table, tuple(sample[0]), [])) == as_read(expected)


def test_only_the_table_asked_for(read):
    target = dumps.sql_text(
        "xxwiki", "linktarget", [{"lt_id": 1, "lt_namespace": 0, "lt_title": "INSERT INTO `page_props` VALUES (1);"}]
    )
    text = target + text_of([(7, b"p", b"v", None)]) + target
    for chunk in (11, 1 << 16):
        assert read(text, chunk=chunk) == ([(b"7", b"p", b"v", None)], [])


def test_other_forms_that_dump_programs_write(read):
    text = text_of([]) + b"REPLACE INTO `page_props` (`pp_value`, `pp_page`) VALUES\r\n('a',1),\r\n('b',-2.5e3);\r\n"
    assert read(text, ("pp_page", "pp_value")) == ([(b"1", b"a"), (b"-2.5e3", b"b")], [])
    assert read(text_of([])) == ([], [])


def test_a_missing_column_or_table_is_an_input_error(read):
    with pytest.raises(
        InputError, match=r"x\.sql: table `page_props` has no column pp_item; it has pp_page, pp_propname"
    ):
        read(text_of([(1, b"", b"", None)]), ("pp_page", "pp_item"))
    with pytest.raises(InputError, match=r"x\.sql: holds no CREATE TABLE for `page`"):
        read(text_of([(1, b"", b"", None)]), (), table="page")
    with pytest.raises(InputError, match=r"x\.sql: holds no CREATE TABLE"):
        read(b"INSERT INTO `page_props` VALUES (1,'a','b',NULL);\n")


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.sql\.gz: cannot be read \(No such file"):
        list(read_rows(tmp_path / "none.sql.gz", "page", ("page_id",), []))


@pytest.mark.parametrize("name", ["x.sql", "x.sql.gz"])
def test_truncated_anywhere(tmp_path, name):
    rows = [(n, b"prop", b"it's %d" % n, None) for n in range(40)]
    whole = text_of(rows)
    stored = gzip.compress(whole, mtime=0) if name.endswith("gz") else whole
    begin, end = whole.index(b"INSERT") if name == "x.sql" else 0, whole.rindex(b";", 0, -60)
    kept = set()
    for cut in range(begin, end if name == "x.sql" else len(stored), 7):
        path, problems = tmp_path / name, []
        path.write_bytes(stored[:cut])
        read = list(read_rows(path, "page_props", PROPS, problems, chunk=64))
        assert read == as_read(rows)[: len(read)]
        assert len(problems) <= 1
        if problems:
            assert f"{path}: damaged at byte " in problems[0]
            assert f"after {len(read)} rows" in problems[0]
        else:  # cut between two statements of a plain file
            assert name == "x.sql"
            assert len(read) % 5 == 0
        kept.add(len(read))
    assert len(kept) > (10 if name == "x.sql" else 2)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (b"(1,'a','b',NULL),(2,'c','d')", "no row of 4 values"),
        (b"(1,'a','b',NULL),(2,'c','d',NULL,5)", "no row of 4 values"),
        (b"(1,'a','b',NULL)garbage", "no row of 4 values"),
        (b"(1,'a','b',NULL),(2,'c','d", "ends within an INSERT"),
    ],
)
def test_rows_that_do_not_fit(read, rows, reason):
    for chunk in (1, 5, 1 << 16):
        start = text_of([]) + b"INSERT INTO `page_props` VALUES "
        read_, problems = read(start + rows + b";\n", chunk=chunk)
        assert read_ == [(b"1", b"a", b"b", None)]
        assert len(problems) == 1
        assert reason in problems[0]
        assert f"damaged at byte {len(start) + 16} " in problems[0]


def test_an_insert_in_another_form_is_no_silence(read):
    rows, problems = read(text_of([]) + b"insert into page_props values (1,'a','b',NULL);\n")
    assert rows == []
    assert "a form that no dump program writes" in problems[0]


def test_a_string_without_end_is_given_up(read, monkeypatch):
    monkeypatch.setattr(sql_dump, "LONGEST", 1 << 17)
    rows, problems = read(text_of([(1, b"a", b"b", None)]) + b"INSERT INTO `page_props` VALUES (2,'" + b"x" * (1 << 20))
    assert len(rows) == 1
    assert "no end of a row or statement" in problems[0]


def test_memory_is_constant(tmp_path):
    path = tmp_path / "big.sql.gz"
    path.write_bytes(gzip.compress(text_of([(n, b"prop", b"v" * 200, None) for n in range(10_000)], per_insert=5000)))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path, "page_props", PROPS, [], chunk=1 << 14)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 19


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), ("", bytes)])
@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_chunks_of_several_streams(tmp_path, suffix, pack, size):
    path = tmp_path / f"data{suffix}"
    content = [b"one " * 500, b"two", b"\n" * 3000]
    path.write_bytes(b"".join(map(pack, content)) + (b"\0" * 100 if suffix else b""))
    chunks = list(read_chunks(path, size))
    assert b"".join(chunks) == b"".join(content)
    assert max(map(len, chunks)) <= size


def test_a_high_ratio_stays_in_small_chunks(tmp_path):
    path = tmp_path / "zeros.bz2"
    path.write_bytes(bz2.compress(bytes(1 << 22)))
    assert {len(chunk) for chunk in read_chunks(path, 1 << 12)} == {1 << 12}


@pytest.mark.parametrize("suffix", [".bz2", ".gz"])
def test_damaged_streams(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    good = (bz2.compress if suffix == ".bz2" else gzip.compress)(b"text " * 100)

    def read(stored):
        path.write_bytes(stored)
        found = []
        with pytest.raises(Damage) as error:
            found.extend(read_chunks(path))
        assert error.value.offset == sum(map(len, found))
        return b"".join(found), error.value.reason

    assert read(good[:-1]) == (b"text " * 100, "cut short: the compressed data have no end")
    # A second stream that is damaged is no padding: the standard library would end without a word.
    found, reason = read(good + (b"BZh9" if suffix == ".bz2" else b"\x1f") + b"garbage")
    assert reason.startswith("corrupt (")
    assert found == (b"" if suffix == ".bz2" else b"text " * 100)
    found, reason = read(good[:-6] + bytes([good[-6] ^ 255]) + good[-5:])
    assert (found, reason[:9]) == (b"", "corrupt (")


def test_bz2_gives_nothing_whose_checksum_is_wrong(tmp_path):
    path = tmp_path / "data.bz2"
    content = b"".join(b"%d is a line of its own\n" % n for n in range(150_000))
    stored = bytearray(bz2.compress(content))
    stored[len(stored) * 9 // 10] ^= 4
    path.write_bytes(stored)
    found = []
    with pytest.raises(Damage, match="corrupt"):
        found.extend(read_chunks(path))
    assert len(found) > 1
    assert content.startswith(b"".join(found))


@pytest.mark.parametrize("content", [b"", bytes(5000)])
def test_an_empty_file_is_damaged(tmp_path, content):
    path = tmp_path / "data.gz"
    path.write_bytes(content)
    with pytest.raises(Damage, match="empty at byte 0"):
        list(read_chunks(path))
