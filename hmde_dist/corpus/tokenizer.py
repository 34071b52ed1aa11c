"""Tokenizers: any Hugging Face one by name or folder, or a Unigram model trained on documents that have none."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hmde_dist.command import InputError, output_folder
from hmde_dist.corpus.documents import Document

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(documents: Iterable[Document], vocabulary: int, out: str | Path) -> PreTrainedTokenizerFast:
    """Train a Unigram tokenizer (Kudo 2018, arXiv 1804.10959) of `vocabulary` pieces and save it under `out`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        unk_token=SPECIAL_TOKENS["unk_token"],
    )
    texts = ("\n".join(document.sentences) or document.text for document in documents)
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        tokenizer.train_from_iterator(lines, trainer)
    except InputError:
        raise
    except Exception as error:  # what tokenizers raises has no narrower type
        raise InputError(f"cannot train a tokenizer with a vocabulary of {vocabulary}: {error}") from error
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
    with output_folder(out) as folder:
        fast.save_pretrained(folder)
    return fast


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerFast:
    """A fast Hugging Face tokenizer by name or folder.

    Raises:
        InputError: there is none, or it has no fast version.
    """
    try:
        # A folder of ours or of any fast tokenizer needs no model configuration, and so no code beside it, to be read.
        local = (Path(name_or_folder) / "tokenizer.json").is_file()
        tokenizer = (PreTrainedTokenizerFast if local else AutoTokenizer).from_pretrained(str(name_or_folder))
    except Exception as error:  # a damaged tokenizer.json raises KeyError, TypeError or a bare Exception
        raise InputError(f"no tokenizer at {name_or_folder}: {(str(error) or repr(error)).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer {name_or_folder} has no fast version; convert it to tokenizer.json first")
    return tokenizer
