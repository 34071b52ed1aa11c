"""From sentences to token ids: the one place that decides what the encoder sees of a document.

A sentence longer than the budget is cut into pieces of at most the budget, never shortened silently.
Shards and exported models run this same code, so a document has the same tokens in training and in use.
"""

from collections.abc import Iterable, Sequence

import numpy as np


class SentenceTokenizer:
    """Documents to ragged token ids with a Hugging Face fast tokenizer, without special tokens.

    Args:
        tokenizer: a `transformers` tokenizer with `cls`/`bos`, `sep`/`eos` and `pad` tokens.
        sentence_tokens: most content tokens of one sentence (`[CLS]` and `[SEP]` come on top).
    """

    def __init__(self, tokenizer, sentence_tokens: int):
        self.tokenizer = tokenizer
        self.sentence_tokens = sentence_tokens
        self.cls_id = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        self.sep_id = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self.pad_id = tokenizer.pad_token_id
        if None in (self.cls_id, self.sep_id, self.pad_id):
            raise ValueError("the tokenizer needs a cls (or bos), a sep (or eos) and a pad token")

    def encode(self, documents: Iterable[Sequence[str]]) -> list[list[np.ndarray]]:
        """Token ids (uint32) of every sentence of every document, long sentences cut into pieces.

        Args:
            documents: sentences of each document.
        """
        documents = [list(sentences) for sentences in documents]
        flat = [sentence for sentences in documents for sentence in sentences]
        if not flat:
            return [[] for _ in documents]
        # `verbose=False`: a long sentence is cut below, so the tokenizer's length warning would mislead.
        # `split_special_tokens`: "[SEP]" or "<s>" written in a text stays text.
        ids = self.tokenizer(
            flat, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        rows = iter(ids)
        encoded = []
        for sentences in documents:
            pieces = []
            for tokens in (np.asarray(next(rows), dtype=np.uint32) for _ in sentences):
                pieces += [tokens[i : i + self.sentence_tokens] for i in range(0, len(tokens), self.sentence_tokens)]
            encoded.append(pieces)
        return encoded
