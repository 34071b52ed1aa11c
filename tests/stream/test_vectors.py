import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vector_folders import LANGUAGES, clustered, write_vectors

from hmde_dist.command import InputError
from hmde_dist.stream import vectors as vectors_module
from hmde_dist.stream.vectors import Facts, Vectors, restore, store


@pytest.mark.parametrize(("precision", "error"), [("fp32", 0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_rows_read_in_any_way_are_those_that_were_written(precision, error, tmp_path, monkeypatch):
    rows = clustered(2000, 24)
    folder = write_vectors(tmp_path / "vectors", rows, precision)
    found = Vectors(folder)
    assert len(found) == 2000 and found.width == 24
    assert np.abs(restore(np.load(folder / "vectors-00001.npy"), precision) - rows[700:1400]).max() <= error
    numbers = np.random.default_rng(0).integers(2000, size=300)
    taken = found.take(numbers)
    assert np.abs(taken - rows[numbers]).max() <= error
    monkeypatch.setattr(vectors_module, "BLOCK_BYTES", 4 * 24 * 300)
    blocks = list(found.blocks(150, 1850))
    assert [first for first, _ in blocks] == [150, 450, 700, 1000, 1300, 1400, 1700]
    whole = np.concatenate([block for _, block in blocks])
    np.testing.assert_array_equal(whole, found.take(np.arange(150, 1850)))
    assert len(whole) == 1700


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=20))
def test_bfloat16_rounds_to_the_nearest(values):
    rows = np.array([values], dtype=np.float32)
    found = restore(store(rows, "bf16"), "bf16")
    assert (np.abs(found - rows) <= np.abs(rows) * 2**-8 + 1e-38).all()
    np.testing.assert_array_equal(store(found, "bf16"), store(rows, "bf16"))


def test_facts_are_found_by_number(tmp_path):
    folder = write_vectors(tmp_path / "vectors", clustered(1500, 8))
    facts = Facts(folder, json.loads((folder / "manifest.json").read_text())["languages"])
    assert len(facts) == 1500
    for number in (0, 1, 10, 699, 700, 1499):
        language = LANGUAGES[2 if number % 10 == 0 else number % 2]
        assert facts[number] == {"id": f"d{number}", "lang": language, "title": f"t{number} é"}
        assert facts.language_names[facts.languages[number]] == language


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    folder = write_vectors(tmp_path / "vectors", clustered(1500, 8))
    with open(folder / "vectors-00001.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"vectors-00001.npy: missing or not of"):
        Vectors(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no folder of vectors"):
        Vectors(folder)
