"""What a trained model must beat: itself untrained, the mean of its own sentence vectors, and words.

The mean of sentence vectors is the paper's segment aggregation, with the model's own sentence encoder. For comparable
documents words are TF-IDF of character n-grams, for topics BM25.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.encode import encode_documents, encode_to_folder, open_vectors
from hmde_dist.evaluation.ranking import Index, System
from hmde_dist.evaluation.retrieval import Scorer, cosine_scorer
from hmde_dist.model.export import untrained_model
from hmde_dist.model.modeling_hmde import HMDEModel

# Scripts that set no spaces between words: pairs of letters stand for words there, as in Lucene's CJK analyser.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# A word keeps its marks, which are no \w, and the invisible joiners inside it.
_MARKS = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)) in ("Mn", "Mc")) + "\u200c\u200d"
_WORD = re.compile(rf"[{_UNSPACED}]+|(?:(?![{_UNSPACED}])[\w{_MARKS}])+")
SENTENCE_MEAN, UNTRAINED, TFIDF = "mean of its sentence vectors", "untrained", "TF-IDF, character 3-4-grams"


def text_of(document: Document) -> str:
    return document.text or "\n".join(document.sentences)


# Documents -> a row for each [N, W]; sparse where they are words.
Encoder = Callable[[list[Document]], np.ndarray]


def untrained(model: HMDEModel) -> HMDEModel:
    """The same architecture before its first step (with pretrained sentence encoder, where it started from one)."""
    return untrained_model(model.config, seed=0).eval().to(model.device)


def encoders(model: HMDEModel, baselines: bool = False) -> dict[str, Encoder]:
    """What makes vectors of documents, by the name in tables; the model comes first."""

    def encoder(of: Callable[[], HMDEModel], output: str) -> Encoder:
        return lambda documents: np.stack(list(encode_documents(of(), documents, output)))

    found = {"HMDE": encoder(lambda: model, "document")}
    if baselines:
        found[SENTENCE_MEAN] = encoder(lambda: model, "sentence-mean")
        found[UNTRAINED] = encoder(lambda: untrained(model), "document")
    return found


def tfidf(documents: list[Document]):
    """TF-IDF weighted character 3- and 4-grams inside words, over all languages together: sparse unit rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True, dtype=np.float32).fit_transform(
        map(text_of, documents)
    )


def tfidf_scorer(documents: list[Document]) -> Scorer:
    matrix = tfidf(documents)
    return lambda queries, candidates: (matrix[queries] @ matrix[candidates].T).toarray()


def group_systems(model: HMDEModel, baselines: bool = False) -> dict[str, Callable[[list[Document]], Scorer]]:
    """What ranks comparable documents, by the name in tables; the model comes first."""
    systems = {
        name: lambda documents, encode=encode: cosine_scorer(encode(documents))
        for name, encode in encoders(model, baselines).items()
    }
    return systems | ({TFIDF: tfidf_scorer} if baselines else {})


def words(text: str) -> list[str]:
    """Words in lower case; two neighbouring letters each where a script sets no spaces."""
    found = []
    for word in _WORD.findall(text.lower()):
        if re.match(rf"[{_UNSPACED}]", word) and len(word) > 1:
            found += [word[i : i + 2] for i in range(len(word) - 1)]
        else:
            found.append(word)
    return found


def bm25(documents: Iterable[Document], folder: Path) -> Index:
    """BM25 (k1 = 1.5, b = 0.75, Lucene's idf) over words without stemming or stop words; nothing is translated."""
    import bm25s
    from scipy import sparse

    vocabulary: dict[str, int] = {}
    ids, tokens = [], []
    for document in documents:
        ids.append(document.id)
        tokens.append(
            np.array([vocabulary.setdefault(w, len(vocabulary)) for w in words(text_of(document))], dtype=np.int32)
        )
    engine = bm25s.BM25()
    engine.index((tokens, vocabulary), show_progress=False, create_empty_token=False)
    # What each word of each document adds to the score, [documents, words].
    matrix = sparse.csc_matrix(
        (engine.scores["data"], engine.scores["indices"], engine.scores["indptr"]), shape=(len(ids), len(vocabulary))
    ).tocsr()

    def scorer(queries: list[Document]) -> Scorer:
        rows = [(n, vocabulary[w]) for n, q in enumerate(queries) for w in words(text_of(q)) if w in vocabulary]
        places = tuple(np.array(rows, dtype=np.int64).reshape(-1, 2).T)
        asked = sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), places), shape=(len(queries), len(vocabulary)))
        return lambda queries, candidates: (asked[queries] @ matrix[candidates].T).toarray()

    return ids, scorer


def vector_system(model: HMDEModel, output: str = "document", query_output: str | None = None) -> System:
    """Cosine of the vectors of queries and documents, which lie in a folder, mapped into memory.

    Args:
        output, query_output: as of `encode_documents`; queries are encoded like documents unless said otherwise.
    """

    def system(documents: Iterable[Document], folder: Path) -> Index:
        encode_to_folder(model, documents, output, folder)
        vectors, facts = open_vectors(folder)

        def scorer(queries: list[Document]) -> Scorer:
            asked = np.stack(list(encode_documents(model, queries, query_output or output)))
            asked /= np.maximum(np.linalg.norm(asked, axis=1, keepdims=True), 1e-12)
            return lambda queries, candidates: asked[queries] @ vectors[candidates].T

        return [fact["id"] for fact in facts], scorer

    return system


def collection_systems(model: HMDEModel, query_output: str = "document", baselines: bool = False) -> dict[str, System]:
    """What is ranked with in a test collection, by the name in tables; the model comes first."""
    systems = {"HMDE": vector_system(model, "document", query_output)}
    if baselines:
        systems[SENTENCE_MEAN] = vector_system(model, "sentence-mean")
        systems[UNTRAINED] = vector_system(untrained(model), "document", query_output)
        systems["BM25"] = bm25
    return systems
