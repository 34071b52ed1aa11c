"""The hierarchical encoder as one Hugging Face model: trained, saved, loaded and used through this class.

Lower transformer: a Hugging Face encoder, run on all sentences as one stream without padding. Upper transformer: `DocumentEncoder`.
The vector of a document depends on nothing else in the batch.

The file travels inside exported models; transformers copies only the files that this one imports itself, so it imports
every file of the bundle.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.corpus.text import SentenceTokenizer
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.document_encoder import DocumentEncoder, SegmentPooling
from hmde_dist.model.packed_attention import encode_stream, encoder_layers, padded_width, pool, unpad
from hmde_dist.stream.batch import PackedBatch, Segments, pack
from hmde_dist.stream.sliding_windows import SlidingWindows


@dataclass
class HMDEOutput(ModelOutput):
    """Vectors of a packed batch, in the order of its documents and of their sentences."""

    documents: torch.Tensor | None = None  # [D, W]
    sentences: torch.Tensor | None = None  # [S, W] before the document encoder
    contextual: torch.Tensor | None = None  # [S, W] the sentences' states behind it


class HMDEModel(PreTrainedModel):
    """Sentence encoder below, document encoder above."""

    config_class = HMDEConfig
    base_model_prefix = "hmde"

    def __init__(self, config: HMDEConfig):
        super().__init__(config)
        settings = {key: value for key, value in config.lower.items() if key != "model_type"}
        lower_config = AutoConfig.for_model(config.lower["model_type"], **settings)
        # Pooler and the like would hold parameters without a gradient.
        pooler = {"add_pooling_layer": False} if "add_pooling_layer" in _constructor_arguments(lower_config) else {}
        self.lower = AutoModel.from_config(lower_config, **pooler)
        self.stream = unpad(self.lower)
        self.windows = SlidingWindows(**config.segments) if config.segments else None
        if config.upper_layers:
            self.upper = DocumentEncoder(
                width=config.hidden_size,
                layers=config.upper_layers,
                heads=config.upper_heads,
                intermediate=config.upper_intermediate,
                dropout=config.upper_dropout,
                positions=config.upper_positions,
                pooling=config.document_pooling,
                max_sentences=config.max_sentences,
            )
        else:
            self.upper = SegmentPooling(config.document_pooling)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.lower.get("initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, DocumentEncoder):
            nn.init.normal_(module.dcls, std=std)

    def checkpoint_activations(self) -> None:
        """While training, keep only the input of each layer and compute the rest again in the backward pass."""
        settings = {"use_reentrant": False, "context_fn": self.stream.contexts}
        self.lower.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        self.upper.checkpointing = True

    def compile_layers(self) -> None:
        """Compile each layer of both encoders, for any number of tokens."""
        for layer in (*encoder_layers(self.lower), *self.upper.layers):
            layer.compile(dynamic=True)

    def slots(self, batch: PackedBatch) -> int:
        """Tokens that are computed of a batch, padding included."""
        if self.lower.config.model_type != "longformer" or batch.vectors is not None:
            return batch.slots
        return (len(batch.lower.starts) - 1) * padded_width(self.lower, batch.lower)

    def encode_sentences(self, batch: PackedBatch) -> torch.Tensor:
        """Sentence vectors [N, W] in the order of the stream."""
        if batch.vectors is not None:
            return batch.vectors.float()
        return self.encode_tokens(batch.ids, batch.positions, batch.lower)

    def encode_tokens(self, ids: torch.Tensor, positions: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Sentence vectors [N, W] of a stream of tokens, see `PackedBatch`."""
        states_TW = encode_stream(self.lower, self.stream, ids, positions, segments)
        return pool(states_TW, segments, "first" if self.config.sentence_pooling == "cls" else "mean")

    def forward(self, batch: PackedBatch) -> HMDEOutput:
        rows_NW = self.encode_sentences(batch)
        documents_DW, states_UW = self.upper(
            rows_NW, batch.upper_rows, batch.upper_positions, batch.document_rows, batch.upper
        )
        places_N = torch.empty(len(rows_NW) + 1, dtype=torch.long, device=rows_NW.device)
        places_N[batch.upper_rows] = torch.arange(len(states_UW), device=rows_NW.device)
        return HMDEOutput(
            documents=documents_DW,
            sentences=rows_NW[batch.sentence_rows],
            contextual=states_UW[places_N[batch.sentence_rows]],
        )

    def sentence_tokenizer(self) -> SentenceTokenizer:
        """The tokenizer of the folder this model was loaded from, with the sentence length it was trained with."""
        if not hasattr(self, "_sentence_tokenizer"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.config.name_or_path)
            self._sentence_tokenizer = SentenceTokenizer(tokenizer, self.config.sentence_tokens)
        return self._sentence_tokenizer

    @property
    def most_tokens(self) -> int:
        """Content tokens of the longest document that is read whole."""
        most = self.config.max_sentences
        return self.windows.reach(most) if self.windows else most * self.config.sentence_tokens

    def segments(self, documents: Iterable[Sequence[str]]) -> list[list[np.ndarray]]:
        """Token ids of every segment of documents of sentences: the sentences, long ones cut in pieces, or windows."""
        encoded = self.sentence_tokenizer().encode(documents)
        if self.windows is None:
            return encoded
        nothing = np.empty(0, np.uint32)
        cut = (self.windows.cut(np.concatenate([*pieces, nothing])) for pieces in encoded)
        return [np.split(ids, np.cumsum(lengths))[:-1] for ids, lengths in cut]

    def tokenise(self, texts: list[str], lang: str = "") -> list[list[np.ndarray]]:
        """Token ids of every segment of every text; `lang` sharpens splitting at abbreviations and ordinals."""
        return self.segments(split_sentences(text, lang) for text in texts)

    def pack(self, documents: list[list[np.ndarray]]) -> PackedBatch:
        """The batch of documents of segments, on the model's device."""
        flat = [
            (np.concatenate([*pieces, np.empty(0, np.uint32)]), np.array([len(p) for p in pieces], dtype=np.int64))
            for pieces in documents
        ]
        encoder = self.sentence_tokenizer()
        return pack(
            flat,
            cls_id=encoder.cls_id,
            sep_id=encoder.sep_id,
            sentences=self.config.max_sentences,
        ).to(self.device)

    @torch.inference_mode()
    def encode(self, texts: str | list[str], lang: str = "", batch_size: int = 32) -> np.ndarray:
        """Vectors [len(texts), W] (fp32) of whole documents: split into sentences, tokenise, encode.

        A single string gives a single vector [W]; a text without any word is the document of no sentences.
        """
        if isinstance(texts, str):
            return self.encode([texts], lang, batch_size)[0]
        was_training = self.training
        self.eval()
        vectors = np.empty((len(texts), self.config.hidden_size), dtype=np.float32)
        # Documents of similar length share a batch.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = self.pack(self.tokenise([texts[i] for i in chosen], lang))
            vectors[chosen] = self(batch).documents.float().cpu().numpy()
        self.train(was_training)
        return vectors


def _constructor_arguments(lower_config) -> tuple[str, ...]:
    return tuple(inspect.signature(AutoModel._model_mapping[type(lower_config)].__init__).parameters)
