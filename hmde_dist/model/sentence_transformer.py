"""The exported model inside `SentenceTransformer`: texts in, document vectors out.

Only exported models use this file; it is the one that needs the sentence-transformers package.
"""

import torch
from sentence_transformers.base.modules import InputModule
from transformers import AutoModel


class HMDEModule(InputModule):
    """Splits, tokenises and encodes whole documents with an `HMDEModel`."""

    def __init__(self, model):
        super().__init__()
        self.auto_model = model
        self.tokenizer = model.sentence_tokenizer().tokenizer

    @property
    def max_seq_length(self) -> int:
        """Most content tokens of a document."""
        return self.auto_model.most_tokens

    def get_embedding_dimension(self) -> int:
        return self.auto_model.config.hidden_size

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_) -> dict:
        """Token ids of every segment of every text, one ragged value per text."""
        return {"documents": self.auto_model.tokenise([(prompt or "") + text for text in inputs])}

    def forward(self, features: dict, **_) -> dict[str, torch.Tensor]:
        output = self.auto_model(self.auto_model.pack(features["documents"]))
        return {**features, "sentence_embedding": output.documents}

    def save(self, output_path: str, *_, **__) -> None:
        self.auto_model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *_, **__) -> "HMDEModule":
        return cls(AutoModel.from_pretrained(model_name_or_path, trust_remote_code=True))
