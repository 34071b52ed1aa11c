"""What a trained model must beat: itself untrained, the mean of its own sentence vectors, and TF-IDF."""

from collections.abc import Callable

import numpy as np

from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.encode import encode_documents
from hmde_dist.evaluation.retrieval import Scorer, cosine_scorer
from hmde_dist.model.export import untrained_model
from hmde_dist.model.modeling_hmde import HMDEModel


def model_scorer(model: HMDEModel, documents: list[Document], output: str = "document") -> Scorer:
    return cosine_scorer(np.stack(list(encode_documents(model, documents, output))))


def untrained_scorer(model: HMDEModel, documents: list[Document]) -> Scorer:
    """The same architecture before its first step (with pretrained sentence encoder, where it started from one)."""
    fresh = untrained_model(model.config, seed=0).eval().to(model.device)
    return model_scorer(fresh, documents)


def tfidf_scorer(documents: list[Document]) -> Scorer:
    """Cosine of TF-IDF weighted character 3- and 4-grams inside words, over all languages together."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [document.text or "\n".join(document.sentences) for document in documents]
    matrix = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True, dtype=np.float32).fit_transform(
        texts
    )
    return lambda queries, candidates: (matrix[queries] @ matrix[candidates].T).toarray()


def baselines(model: HMDEModel) -> dict[str, Callable[[list[Document]], Scorer]]:
    """Scorers by the name they have in tables."""
    return {
        "mean of its sentence vectors": lambda documents: model_scorer(model, documents, "sentence-mean"),
        "untrained": lambda documents: untrained_scorer(model, documents),
        "TF-IDF, character 3-4-grams": tfidf_scorer,
    }
