"""Shards of random tokens, to measure models of real size where neither documents nor a tokenizer of that size are at hand.

Lengths are log-normal around assumed medians; nothing else about the documents is like language. Not for training.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hmde_dist.corpus.shard_build import build_shards
from hmde_dist.corpus.tokenizer import SPECIAL_TOKENS

VOCABULARY = 501_153  # LaBSE's
SENTENCE_TOKENS = 126
SENTENCES, TOKENS = 18, 24  # medians: of a document, of a sentence
DEVIATION = 0.6  # of the logarithm of both
MOST_SENTENCES = 200
CATEGORY = 8  # groups


def synthetic_shards(groups: int, folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """A shard set (MDS) of `groups` pairs of documents under `folder`, the same for the same numbers."""
    special = list(SPECIAL_TOKENS.values())
    words = [*special, *(f"w{number}" for number in range(vocabulary - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    random = np.random.default_rng(0)

    def lengths(median: int, most: int, count: int) -> list[int]:
        return np.clip(np.exp(random.normal(np.log(median), DEVIATION, count)).round(), 1, most).astype(int).tolist()

    documents = folder / "documents.jsonl"
    with open(documents, "w", encoding="utf-8") as file:
        for group in range(groups):
            for language, count in zip(("de", "en"), lengths(SENTENCES, MOST_SENTENCES, 2), strict=True):
                sentences = [
                    " ".join(words[number] for number in random.integers(len(special), vocabulary, size))
                    for size in lengths(TOKENS, SENTENCE_TOKENS, count)
                ]
                document = {"id": f"g{group}", "lang": language, "sentences": sentences}
                file.write(json.dumps(document | {"categories": [f"c{group // CATEGORY}"]}) + "\n")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
    build_shards([documents], fast, SENTENCE_TOKENS, folder / "shards", "mds")
    return folder / "shards"
