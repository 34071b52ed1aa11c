import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hmde_dist.command import InputError
from hmde_dist.corpus import readers
from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.readers import read_documents

RECORDS = [
    {"id": "a", "lang": "en", "title": "A", "text": "A text.\nTwo lines.", "categories": ["c", "d"], "url": "http://x"},
    {"id": "a", "lang": "zh-cn", "text": "漢字。", "title": None, "sentences": None, "categories": []},
    {"id": "b", "lang": "en", "sentences": ["One.", "Two."], "text": None},
]
DOCUMENTS = [
    Document("a", "en", "A", "A text.\nTwo lines.", (), ("c", "d")),
    Document("a", "zh-cn", text="漢字。"),
    Document("b", "en", sentences=("One.", "Two.")),
]


def write_lines(path, records):
    content = "\n".join(json.dumps(record) for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def table(records):
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: [record.get(name) for record in records] for name in names})


def write_arrow(path, rows, batch=2):
    with pa.ipc.new_stream(path, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=batch)


def write_datasets_folder(folder, rows, files=1):
    """What `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        first, last = (rows.num_rows * n // files for n in (number, number + 1))
        write_arrow(str(folder / name), rows.slice(first, last - first))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def write(path, records):
    """`records` in the kind of file or folder that the name of `path` says."""
    rows = table(records)
    if path.name.endswith(".parquet"):
        pq.write_table(rows, path)
    elif path.name == "hub":
        (path / "data").mkdir(parents=True)
        (path / "README.md").write_text("---")
        for number in range(2):
            pq.write_table(rows.slice(2 * number, 2), path / "data" / f"train-0000{number}-of-00002.parquet")
    elif path.name == "dataset":
        write_datasets_folder(path, rows, files=2)
    elif path.name == "dataset_dict":
        write_datasets_folder(path / "train", rows.slice(0, 2))
        write_datasets_folder(path / "test", rows.slice(2))
        (path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    else:
        write_lines(path, records)
    return path


TABLES = ("a.parquet", "hub", "dataset", "dataset_dict")
KINDS = ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", *TABLES)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_documents(name, tmp_path):
    assert list(read_documents([write(tmp_path / name, RECORDS)])) == DOCUMENTS


def test_paths_are_read_in_the_order_given(tmp_path):
    paths = [write(tmp_path / name, [RECORDS[0] | {"id": name}]) for name in ("b.parquet", "dataset", "a.jsonl")]
    assert [d.id for d in read_documents([paths[0], str(paths[1]), paths[2]])] == ["b.parquet", "dataset", "a.jsonl"]


@pytest.mark.parametrize("name", KINDS)
def test_fields_may_have_other_names(name, tmp_path):
    records = [
        {"docid": 7, "language": "en", "body": "A text.", "text": "summary", "categories": "no list"},
        {"docid": 8, "language": None, "body": "Ein Text.", "text": None, "categories": None},
        {"docid": 9, "language": "", "body": "Noch einer.", "text": None, "categories": None},
    ]
    fields = {"id": "docid", "lang": "language", "text": "body", "categories": ""}
    expected = [Document("7", "en", text="A text."), Document("8", "de", text="Ein Text.")]
    expected.append(Document("9", "de", text="Noch einer."))
    assert list(read_documents([write(tmp_path / name, records)], fields, "de")) == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_record_is_named(name, tmp_path):
    path = write(tmp_path / name, [*RECORDS[:1], RECORDS[0] | {"lang": "EN"}])
    file = {"hub": "data/train-00000-of-00002.parquet", "dataset": "data-00001-of-00002.arrow"}
    file["dataset_dict"] = "train/data-00000-of-00001.arrow"
    place = f": row {1 if name == 'dataset' else 2}" if name in TABLES else ":2"
    where = str(path / file[name] if name in file else path) + place
    with pytest.raises(InputError, match=f'^{re.escape(where)}: "lang" is "EN"'):
        list(read_documents([path]))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("id", {}, 'no column "id", only .*; say which one with --field id=COLUMN'),
        ("lang", {}, 'no column "lang", only .*; say which one with --field lang=COLUMN or --lang'),
        ("text", {}, 'no column "text", only .*; say which one with --field text=COLUMN'),
        ("title", {"fields": {"title": "headline"}}, 'no column "headline", only .* --field title=COLUMN'),
        ("title", {}, None),
        ("lang", {"lang": "en"}, None),
    ],
)
def test_missing_columns_are_named(name, missing, options, message, tmp_path):
    records = [
        {key: record[key] for key in ("id", "lang", "title", "text", "url") if key != missing and key in record}
        for record in RECORDS[:1] * 3
    ]
    path = write(tmp_path / name, records)
    if message is None:
        assert len(list(read_documents([path], **options))) == 3
    else:
        with pytest.raises(InputError, match=message):
            list(read_documents([path], **options))


def test_only_the_columns_of_documents_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", RECORDS)
    asked = []
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *a, columns: asked.append(columns) or whole(*a, columns=columns)
    )
    assert list(read_documents([path])) == DOCUMENTS
    assert asked == [["categories", "id", "lang", "sentences", "text", "title"]]


def test_types_that_other_writers_use(tmp_path):
    rows = pa.table(
        {
            "id": pa.array([1, 2], pa.int32()),
            "lang": pa.array(["en", "de"]).dictionary_encode(),
            "sentences": pa.array([["One."], ["Eins.", "Zwei."]], pa.large_list(pa.large_string())),
        }
    )
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=1, compression="zstd")
    write_datasets_folder(tmp_path / "dataset", rows)
    for name in ("a.parquet", "dataset"):
        assert list(read_documents([tmp_path / name])) == [
            Document("1", "en", sentences=("One.",)),
            Document("2", "de", sentences=("Eins.", "Zwei.")),
        ]


@pytest.mark.parametrize("name", TABLES)
def test_large_batches_become_rows_piece_by_piece(name, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROWS", 2)
    records = [{"id": number, "lang": "en", "text": "x"} for number in range(4)]
    assert [d.id for d in read_documents([write(tmp_path / name, records)])] == ["0", "1", "2", "3"]


MANY = [{"id": f"{number * 7919 % 10007}", "lang": "en", "text": f"Text {number}."} for number in range(3000)]


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:-1],
        lambda packed: b"not gzip" + packed,
        lambda packed: flipped(packed, 2),
        lambda packed: flipped(packed, 20),
        lambda packed: flipped(packed, len(packed) - 6),
    ],
    ids=["half", "last byte", "no gzip", "header", "deflate block", "checksum"],
)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.trec.gz"])
def test_damaged_gzip_is_named(name, damage, tmp_path):
    path = tmp_path / name
    write_lines(path, MANY)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: damaged gzip file after \d+ lines"):
        list(read_documents([path], lang="en"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: flipped(data, len(data) - 3),
        lambda data: b"not it" + data,
    ],
    ids=["empty", "half", "last byte", "end", "start"],
)
@pytest.mark.parametrize("name", ["a.parquet", "dataset"])
def test_damaged_table_is_named(name, damage, tmp_path):
    path = write(tmp_path / name, MANY)
    file = path / "data-00001-of-00002.arrow" if name == "dataset" else path
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=rf"^{re.escape(str(file))}: damaged file after \d+ rows \("):
        list(read_documents([path]))


def test_damaged_pages_and_offsets_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(MANY), path, compression="none", write_page_checksum=True)
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2))
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: damaged file after \d+ rows"):
        list(read_documents([path]))
    rows = table(MANY)
    write_datasets_folder(tmp_path / "dataset", rows)
    file = tmp_path / "dataset" / "data-00000-of-00001.arrow"
    data = file.read_bytes()
    offsets = rows["text"].chunk(0).buffers()[1].to_pybytes()[:12]
    file.write_bytes(data.replace(offsets, b"\0\0\0\0\xff\xff\xff\x7f" + offsets[8:], 1))
    with pytest.raises(InputError, match=rf"^{re.escape(str(file))}: damaged file after \d+ rows"):
        list(read_documents([tmp_path / "dataset"]))


def test_arrow_file_cut_between_batches_is_named(tmp_path):
    """Arrow itself reads it without a word."""
    write_datasets_folder(tmp_path / "dataset", table(MANY[:4]))
    file = tmp_path / "dataset" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[: -len(readers.END_OF_STREAM)])
    assert pa.ipc.open_stream(file.read_bytes()).read_all().num_rows == 4
    with pytest.raises(InputError, match=r"damaged file after 4 rows .the end of the stream is missing"):
        list(read_documents([tmp_path / "dataset"]))


def test_incomplete_datasets_folder_is_named(tmp_path):
    write_datasets_folder(tmp_path / "whole", table(RECORDS), files=2)
    (tmp_path / "whole" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00002.arrow: missing, though state.json names it"):
        list(read_documents([tmp_path / "whole"]))
    for name, content in (("state.json", "{}"), ("state.json", "{"), ("dataset_dict.json", "[]")):
        (tmp_path / "whole" / name).write_text(content)
        with pytest.raises(InputError, match=f"{name}: missing or damaged"):
            list(read_documents([tmp_path / "whole"]))
    (tmp_path / "whole" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match=r"train/state.json: missing or damaged"):
        list(read_documents([tmp_path / "whole"]))


def test_blank_lines_and_a_missing_last_line_break_are_no_error(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record).encode() for record in RECORDS]
    path.write_bytes(b"\n \r\n" + lines[0] + b"\r\n\n" + lines[1] + b"\n" + lines[2])
    assert list(read_documents([path])) == DOCUMENTS


def test_only_line_feeds_end_a_line(tmp_path):
    text = "a\u2028b\u0085c\x0b"
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORDS[0] | {"text": text}, ensure_ascii=False), encoding="utf-8")
    assert [document.text for document in read_documents([tmp_path / "a.jsonl"])] == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "dataset", "a.trec"])
def test_path_without_documents_is_named(name, tmp_path):
    if name in TABLES:
        write(tmp_path / name, RECORDS)
        empty = table(RECORDS).slice(0, 0)
        if name == "dataset":
            for file in (tmp_path / name).glob("*.arrow"):
                write_arrow(str(file), empty)
        else:
            pq.write_table(empty, tmp_path / name)
    else:
        write_lines(tmp_path / name, [])
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / name))}: holds no documents"):
        list(read_documents([tmp_path / name], lang="en"))


def test_missing_and_unknown_paths_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("id,text")
    for path, message in (
        (tmp_path / "nowhere.jsonl", "no such file of documents"),
        (tmp_path, "neither a folder of Hugging Face datasets .* nor one with parquet"),
        (tmp_path / "a.csv", r"not a kind of file that is read; its name must end in one of \.jsonl, .*\.sgm\.gz$"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}"):
            list(read_documents([path]))
    with pytest.raises(InputError, match=r"--field body: a document has no .body., only id, lang, title, text"):
        list(read_documents([tmp_path / "a.jsonl"], {"body": "text"}))


TREC = """<?xml version="1.0"?>
<DOC>
<DOCNO> LA010194-0001 </DOCNO>
<DOCID> 1 </DOCID>
<HEADLINE>
<P>
Caf&eacute; owners &amp; guests:
a &lt;new&gt; caf\u00e9
</P>
</HEADLINE>
<TEXT>
<P>
The first paragraph is
wrapped. It has <B>bold</B>
words, 1 < 2.
</P>
<P>Second &#8211; it ends here.</P><!-- not <P> this -->
</TEXT>
<GRAPHIC><P>Photo</P></GRAPHIC>
<TEXT>
A second text element.

After a blank line.
</TEXT>
</DOC>
<doc id="2">
<docno>SDA.940101.0001</docno><TI>Titel</TI><LD>Vorspann.</LD>
<TX lang="de">Text.</TX>
</doc><DOC><DOCNO>PHOTO</DOCNO><GRAPHIC>No text</GRAPHIC></DOC>
"""
TREC_DOCUMENTS = [
    Document(
        "LA010194-0001",
        "en",
        "Café owners & guests: a <new> café",
        "The first paragraph is wrapped. It has bold words, 1 < 2.\nSecond – it ends here.\nA second text element.\n"
        "After a blank line.",
    ),
    Document("SDA.940101.0001", "en", "Titel", "Vorspann.\nText."),
]


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1"])
@pytest.mark.parametrize("name", ["a.trec", "a.trectext", "a.sgml", "a.sgm", "a.sgml.gz", "a.trec.gz"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_trec_text(name, encoding, line_end, tmp_path, capsys):
    data = TREC.replace("\n", line_end).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(read_documents([tmp_path / name], lang="en")) == TREC_DOCUMENTS
    assert f"{tmp_path / name}: left out 1 of 3 documents, which have no <TEXT>" in capsys.readouterr().err


def test_each_trec_document_has_its_own_encoding(tmp_path):
    one = "<DOC><DOCNO>{}</DOCNO><TEXT>é</TEXT></DOC>\n"
    (tmp_path / "a.trec").write_bytes(one.format(1).encode() + one.format(2).encode("latin-1"))
    assert [d.text for d in read_documents([tmp_path / "a.trec"], lang="fr")] == ["é", "é"]


def test_title_is_the_first_name_that_is_there(tmp_path):
    document = "<DOC><DOCNO>1</DOCNO><TI>ti</TI><HEAD> </HEAD><HEADLINE>headline</HEADLINE><TEXT>x</TEXT></DOC>"
    (tmp_path / "a.trec").write_text(document)
    assert [d.title for d in read_documents([tmp_path / "a.trec"], lang="en")] == ["headline"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<DOC><DOCNO>1</DOCNO><TEXT>x</TEXT></DOC>\n<DOC><TEXT>x</TEXT></DOC>", "document 2: has no <DOCNO>"),
        ("<DOC>\n<DOCNO>1</DOCNO>\n<DOC>", "document 1: no </DOC> before line 3"),
        ("<DOC><DOCNO>1</DOCNO><TEXT>x</TEXT></DOC><DOC><TEXT>", "document 2: the file ends before its </DOC>"),
        ("<DOC><DOCNO>1</DOCNO><TEXT><P> </P></TEXT></DOC>", "holds no documents"),
    ],
)
def test_wrong_trec_text_is_named(content, message, tmp_path):
    (tmp_path / "a.trec").write_text(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'a.trec') + ': ' + message)}"):
        list(read_documents([tmp_path / "a.trec"], lang="en"))


def test_trec_text_needs_its_language(tmp_path):
    (tmp_path / "a.trec").write_text(TREC)
    with pytest.raises(InputError, match="TREC text does not say its language; name it with --lang"):
        list(read_documents([tmp_path / "a.trec"]))
    with pytest.raises(InputError, match=r'a\.trec: document 1 \(LA010194-0001\): "lang" is "EN"'):
        list(read_documents([tmp_path / "a.trec"], lang="EN"))


@pytest.mark.parametrize("name", ["a.parquet", "dataset"])
def test_memory_does_not_grow_with_the_file(name, tmp_path):
    """64 MiB of text in one row group, one batch: far less of it is in Arrow's memory at one time."""
    text = "x" * (8 << 10)
    rows = pa.table({"id": range(8192), "lang": ["en"] * 8192, "text": [text] * 8192})
    if name == "dataset":
        write_datasets_folder(tmp_path / name, rows)
    else:
        pq.write_table(rows, tmp_path / name, use_dictionary=False, compression="none")
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_documents([tmp_path / name]):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 24 << 20
