import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from hmde_dist.command import InputError
from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.text import SentenceTokenizer
from hmde_dist.corpus.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("the ab人です12"), max_size=60)


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    """A tokenizer of three words, `the` = 7, with the special tokens asked for."""
    vocabulary = {name: number for number, name in enumerate(["[PAD]", "[UNK]", "<s>", "</s>", "x", "y", "z", "the"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@given(st.lists(st.lists(TEXTS, max_size=4), max_size=4), st.integers(1, 9))
def test_pieces_lose_nothing_and_keep_to_the_budget(tokenizer, documents, budget):
    encoded = SentenceTokenizer(tokenizer, budget).encode(documents)
    assert len(encoded) == len(documents)
    for sentences, pieces in zip(documents, encoded, strict=True):
        expected = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
        assert [int(token) for piece in pieces for token in piece] == [token for ids in expected for token in ids]
        assert [len(piece) for piece in pieces] == [
            min(budget, len(ids) - start) for ids in expected for start in range(0, len(ids), budget)
        ]
        assert all(piece.dtype == np.uint32 for piece in pieces)


def test_documents_without_sentences_or_tokens_have_no_pieces(tokenizer):
    assert SentenceTokenizer(tokenizer, 8).encode([]) == []
    assert SentenceTokenizer(tokenizer, 8).encode([[], ["", ""]]) == [[], []]
    assert [len(pieces) for pieces in SentenceTokenizer(tokenizer, 8).encode([[], ["", "bee"], []])] == [0, 1, 0]


def test_generators_of_sentences_are_read_once(tokenizer):
    encoder = SentenceTokenizer(tokenizer, 8)
    from_generator = encoder.encode((sentence for sentence in ["a bee", "two"]) for _ in range(2))
    assert [[p.tolist() for p in d] for d in from_generator] == [
        [p.tolist() for p in d] for d in encoder.encode([["a bee", "two"]] * 2)
    ]


def test_special_tokens_written_in_a_text_stay_text(tokenizer):
    """A page about BERT, or HTML with <s>, must not put separators inside a sentence."""
    text = "Write [CLS] before, [SEP] behind and [MASK] or [PAD] between."
    ((piece,),) = SentenceTokenizer(tokenizer, 500).encode([[text]])
    special = {
        tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[f"{name}_token"]) for name in ("pad", "cls", "sep", "mask")
    }
    assert not special & set(piece.tolist())


def test_long_sentences_give_no_warning(caplog):
    special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    logging.enable_propagation()
    try:
        SentenceTokenizer(word_tokenizer(model_max_length=8, **special), 4).encode([["the " * 100]])
    finally:
        logging.disable_propagation()
    assert not caplog.records


def test_bos_and_eos_stand_in_for_cls_and_sep():
    encoder = SentenceTokenizer(word_tokenizer(pad_token="[PAD]", bos_token="<s>", eos_token="</s>"), 4)
    assert (encoder.cls_id, encoder.sep_id, encoder.pad_id) == (2, 3, 0)
    assert [piece.tolist() for piece in encoder.encode([["the x the y z"]])[0]] == [[7, 4, 7, 5], [6]]


@pytest.mark.parametrize("missing", ["pad_token", "bos_token", "eos_token"])
def test_tokenizer_without_a_needed_token_is_refused(missing):
    special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    del special[missing]
    with pytest.raises(ValueError, match="needs a cls"):
        SentenceTokenizer(word_tokenizer(**special), 4)


def test_trained_tokenizer_keeps_to_its_size_with_special_tokens_first(tokenizer):
    assert len(SPECIAL_TOKENS) < len(tokenizer) <= 2000
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values())) == [0, 1, 2, 3, 4]
    assert {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS} == SPECIAL_TOKENS


def test_trained_tokenizer_knows_every_letter_of_its_documents(tokenizer, documents_folder):
    for document in read_documents([documents_folder / "train.jsonl.gz"]):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids, (document.id, document.lang)


def test_trained_tokenizer_folds_case_and_width(tokenizer):
    assert tokenizer.tokenize("HONEY bee ２０") == tokenizer.tokenize("honey bee 20")


def test_trained_tokenizer_joins_no_digits(tmp_path):
    documents = [Document("a", "en", text=f"In {year} bees, in {year} ants.\n" * 20) for year in range(1990, 2025)]
    vocabulary = train_tokenizer(documents, 60, tmp_path / "out").get_vocab()
    assert "4" in vocabulary
    assert not [piece for piece in vocabulary if sum(map(str.isdigit, piece)) > 1]


def test_saved_tokenizer_is_the_trained_one(tmp_path):
    documents = [Document("a", "en", text="bees and ants and bees\n\nants"), Document("b", "en", sentences=("wasps",))]
    trained = train_tokenizer(documents, 40, tmp_path / "out")
    loaded = load_tokenizer(tmp_path / "out")
    assert loaded.get_vocab() == trained.get_vocab()
    for text in ("bees and wasps", "Unseen?"):
        assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert "w" in "".join(trained.get_vocab()), "sentences count as text"


def test_vocabulary_smaller_than_the_alphabet_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="vocabulary"):
        train_tokenizer([Document("a", "zh", text="蜜蜂是一种生活在大型群体中的社会性昆虫")], 6, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_existing_tokenizer_is_not_overwritten(tmp_path):
    (tmp_path / "kept").touch()
    with pytest.raises(InputError, match="not empty"):
        train_tokenizer([Document("a", "en", text="bees and ants")], 40, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_missing_tokenizer_is_named(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere", "no-such/tokenizer"):
        with pytest.raises(InputError) as refused:
            load_tokenizer(place)
        assert str(refused.value).startswith(f"no tokenizer at {place}: ")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", json.dumps({"version": "1.0", "added_tokens": []})])
def test_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=f"no tokenizer at {tmp_path}: "):
        load_tokenizer(tmp_path)


def test_code_beside_a_tokenizer_does_not_run(tokenizer_folder, tmp_path):
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["m.T", "m.T"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load_tokenizer(tmp_path)("bee")["input_ids"]
    assert not (tmp_path / "ran").exists()
