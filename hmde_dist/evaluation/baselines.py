"""What a trained model must beat: itself untrained, the mean of its own sentence vectors, and words.

The mean of sentence vectors is the paper's segment aggregation, with the model's own sentence encoder. For comparable
documents words are TF-IDF of character n-grams, for topics BM25.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.documents import Document
from hmde_dist.evaluation.encode import encode_documents
from hmde_dist.evaluation.ranking import Index, System, named
from hmde_dist.evaluation.retrieval import Scorer, cosine_scorer
from hmde_dist.model.export import load_model, untrained_model
from hmde_dist.model.modeling_hmde import HMDEModel

BLOCK = 256  # documents that another model encodes at a time

# Scripts that set no spaces between words: pairs of letters stand for words there, as in Lucene's CJK analyser.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# A word keeps its marks, which are no \w, and the invisible joiners inside it.
_MARKS = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)) in ("Mn", "Mc")) + "\u200c\u200d"
_WORD = re.compile(rf"[{_UNSPACED}]+|(?:(?![{_UNSPACED}])[\w{_MARKS}])+")
SENTENCE_MEAN, UNTRAINED, TFIDF = "mean of its sentence vectors", "untrained", "TF-IDF, character 3-4-grams"


def text_of(document: Document) -> str:
    return document.text or "\n".join(document.sentences)


# Documents -> the vector of each [W], in their order.
Stream = Callable[[Iterable[Document]], Iterable[np.ndarray]]
# Documents -> a row for each [N, W]; sparse where they are words.
Encoder = Callable[[list[Document]], np.ndarray]


def model_stream(model: HMDEModel, output: str = "document") -> Stream:
    return lambda documents: encode_documents(model, documents, output)


def other_stream(folder: Path) -> Stream:
    """Vectors of another model: one of our exports, or any sentence-transformers folder that runs no code of its own
    (LaBSE, a Longformer, ...), which cuts documents as it was told to.

    Raises:
        InputError: neither, or sentence-transformers is not installed.
    """
    if (folder / "modules.json").is_file() and not (folder / "modeling_hmde.py").is_file():
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError(f"{folder} needs sentence-transformers: pip install sentence-transformers") from None
        try:
            other = SentenceTransformer(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]})") from None

        def stream(documents: Iterable[Document]) -> Iterator[np.ndarray]:
            documents = iter(documents)
            with progress(desc=f"encode, {folder.name}", unit="document") as bar:
                while block := list(islice(documents, BLOCK)):
                    yield from other.encode([text_of(document) for document in block], show_progress_bar=False)
                    bar.update(len(block))

        return stream
    return model_stream(load_model(folder))


def untrained(model: HMDEModel) -> HMDEModel:
    """The same architecture before its first step (with pretrained sentence encoder, where it started from one)."""
    return untrained_model(model.config, seed=0).eval().to(model.device)


def streams(model: HMDEModel, baselines: bool = False, others: Sequence[Path] = ()) -> dict[str, Stream]:
    """What makes vectors of documents, by the name in tables; the model comes first."""
    ours = ("HMDE", SENTENCE_MEAN, UNTRAINED, TFIDF, "BM25")
    found = {"HMDE": model_stream(model)}
    found |= {name: other_stream(folder) for name, folder in named(others, ours).items()}
    if baselines:
        found |= {SENTENCE_MEAN: model_stream(model, "sentence-mean"), UNTRAINED: model_stream(untrained(model))}
    return found


def encoders(model: HMDEModel, baselines: bool = False, others: Sequence[Path] = ()) -> dict[str, Encoder]:
    """`streams` that give all vectors at once."""
    return {
        name: lambda documents, stream=stream: np.stack(list(stream(documents)))
        for name, stream in streams(model, baselines, others).items()
    }


def tfidf(documents: list[Document]):
    """TF-IDF weighted character 3- and 4-grams inside words, over all languages together: sparse unit rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True, dtype=np.float32).fit_transform(
        map(text_of, documents)
    )


def tfidf_scorer(documents: list[Document]) -> Scorer:
    matrix = tfidf(documents)
    return lambda queries, candidates: (matrix[queries] @ matrix[candidates].T).toarray()


def group_systems(
    model: HMDEModel, baselines: bool = False, others: Sequence[Path] = ()
) -> dict[str, Callable[[list[Document]], Scorer]]:
    """What ranks comparable documents, by the name in tables; the model comes first."""
    systems = {
        name: lambda documents, encode=encode: cosine_scorer(encode(documents))
        for name, encode in encoders(model, baselines, others).items()
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


def vector_system(stream: Stream, queries_stream: Stream) -> System:
    """Cosine of the vectors of queries and documents; those of documents lie in a file that is mapped into memory."""

    def system(documents: Iterable[Document], folder: Path) -> Index:
        ids: list[str] = []

        def noted() -> Iterator[Document]:
            for document in documents:
                ids.append(document.id)
                yield document

        width = 0
        with open(folder / "vectors", "wb") as file:
            for vector in stream(noted()):
                width = len(vector)
                file.write(_unit(vector).astype("<f4").tobytes())
        vectors = np.memmap(folder / "vectors", dtype="<f4", mode="r", shape=(len(ids), width))

        def scorer(queries: list[Document]) -> Scorer:
            asked = _unit(np.stack(list(queries_stream(queries)))).astype(np.float32)
            return lambda queries, candidates: asked[queries] @ vectors[candidates].T

        return ids, scorer

    return system


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def collection_systems(
    model: HMDEModel, queries: str = "document", baselines: bool = False, others: Sequence[Path] = ()
) -> dict[str, System]:
    """What is ranked with in a test collection, by the name in tables; the model comes first.

    Args:
        queries: as `output` of `encode_documents`: what the model's own vectors of queries are.
    """
    asking = {"HMDE": model_stream(model, queries)} if queries != "document" else {}
    systems = {
        name: vector_system(stream, asking.get(name, stream))
        for name, stream in streams(model, baselines, others).items()
    }
    return systems | ({"BM25": bm25} if baselines else {})
