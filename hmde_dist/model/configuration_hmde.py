"""The configuration of a hierarchical multilingual document encoder, as a Hugging Face config.

The file travels inside exported models.
"""

from transformers import PretrainedConfig


class HMDEConfig(PretrainedConfig):
    """What `HMDEModel` needs to be built and to read a document.

    Args:
        lower: the configuration of the sentence encoder, any Hugging Face encoder's `to_dict()`.
        hidden_size: width of sentence and document vectors, the sentence encoder's.
        lower_source: name or folder of the pretrained weights the sentence encoder started from; "" = from scratch.
        sentence_pooling: sentence vector = "cls" (first token's state) or "mean" (of all its tokens' states).
        upper_layers, upper_heads, upper_intermediate, upper_dropout: the document encoder; its width is the lower's.
            0 layers: the document vector is pooled from the sentence vectors themselves.
        upper_positions: "learned" or "rotary" positions of sentences.
        document_pooling: document vector = "dcls" (the state of [DCLS]), "mean" or "max" (of [DCLS] and all sentences; of
            the sentence vectors if there are no layers).
        segments: {"window": tokens, "stride": tokens} = a document is cut into such windows over its token stream, which
            take the place of its sentences (`stream.sliding_windows`); None = sentences.
        max_sentences: sentences of a document that are encoded, or windows.
        sentence_tokens: token budget of a sentence, without special tokens; longer ones are cut in pieces.
        scale: the scale of the cosine the model was trained with (the inverse temperature).
        languages: of the documents it was trained on; None = not recorded.
        mask_token_id: of the tokenizer; None = it has no mask.
    """

    model_type = "hmde"

    def __init__(
        self,
        lower: dict | None = None,
        hidden_size: int = 768,
        lower_source: str = "",
        sentence_pooling: str = "cls",
        upper_layers: int = 2,
        upper_heads: int = 8,
        upper_intermediate: int = 2048,
        upper_dropout: float = 0.1,
        upper_positions: str = "learned",
        document_pooling: str = "dcls",
        segments: dict[str, int] | None = None,
        max_sentences: int = 32,
        sentence_tokens: int = 126,
        scale: float = 20.0,
        languages: list[str] | None = None,
        mask_token_id: int | None = None,
        **kwargs,
    ):
        self.lower = lower or {}
        self.hidden_size = hidden_size
        self.lower_source = lower_source
        self.sentence_pooling = sentence_pooling
        self.upper_layers = upper_layers
        self.upper_heads = upper_heads
        self.upper_intermediate = upper_intermediate
        self.upper_dropout = upper_dropout
        self.upper_positions = upper_positions
        self.document_pooling = document_pooling
        self.segments = segments
        self.max_sentences = max_sentences
        self.sentence_tokens = sentence_tokens
        self.scale = scale
        self.languages = languages
        self.mask_token_id = mask_token_id
        super().__init__(**kwargs)
