"""The loader: packed batches of this rank, in the order of the plan, made in worker processes.

Workers hold no state: batch `step` is a function of plan, rank and world size, so their number may change at any time
and resuming means starting at another step.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hmde_dist.command import InputError
from hmde_dist.corpus.shards import Group
from hmde_dist.stream.batch import DocumentFacts, PackedBatch, pack, pack_vectors
from hmde_dist.stream.category_negatives import CategoryNegatives
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.mixture import Mixture
from hmde_dist.stream.plan import GlobalBatch
from hmde_dist.stream.reader import GroupReader
from hmde_dist.stream.sentence_vectors import SentenceVectors
from hmde_dist.stream.sliding_windows import cut
from hmde_dist.stream.teacher import Teacher

PREFETCHED_BATCHES = 4  # of each process, ahead of the one it makes, of remote shards


def packing_settings(index: ShardIndex, sentences: int) -> dict[str, int]:
    """The keyword arguments of `pack` for the documents of a shard set."""
    special = index.manifest["special_ids"]
    return {"cls_id": special["cls"], "sep_id": special["sep"], "sentences": sentences}


@dataclass(frozen=True)
class RankBatch:
    """What one rank encodes in a step: its documents, in one or more chunks.

    The 2p documents of p pairs are numbered [first of each pair..., second of each pair...], and with explicit hard
    negatives 4p: [..., a negative for each first..., for each second...].
    """

    chunks: list[PackedBatch]
    imbalance: float  # the most tokens of any rank over the mean, minus 1
    source: int = 0  # of the mixture

    @property
    def documents(self) -> int:
        return sum(len(chunk.sentence_counts) for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def slots(self) -> int:
        return sum(chunk.slots for chunk in self.chunks)

    def to(self, device: torch.device) -> "RankBatch":
        return replace(self, chunks=[chunk.to(device) for chunk in self.chunks])

    def pin_memory(self) -> "RankBatch":
        return replace(self, chunks=[chunk.pin_memory() for chunk in self.chunks])


class RankBatches(Dataset):
    """`self[step]`: this rank's part of global batch `step`.

    Args:
        hard_negatives: with explicit negatives, see `stream.category_negatives`.
        chunk_tokens: tokens of a chunk, about; none = one chunk. All ranks have the same number of chunks.
        vectors: of each source, the sentence vectors to read in place of tokens.
        teacher: whose document vectors are looked up beside.
    """

    def __init__(
        self,
        mixture: Mixture,
        rank: int,
        world: int,
        hard_negatives: bool = False,
        chunk_tokens: int | None = None,
        vectors: Sequence[SentenceVectors] = (),
        teacher: Teacher | None = None,
    ):
        self.vectors, self.teacher = vectors, teacher
        self.mixture, self.rank, self.world, self.chunk_tokens = mixture, rank, world, chunk_tokens
        self.readers = [GroupReader(index) for index in mixture.indexes]
        self.packing = [packing_settings(index, mixture.settings.sentences) for index in mixture.indexes]
        seed = mixture.settings.seed
        # Numbers of languages that mean the same in every source.
        names = sorted({name for index in mixture.indexes for name in index.languages})
        self.languages = [np.array([names.index(n) for n in index.languages], np.int64) for index in mixture.indexes]
        self.negatives = [CategoryNegatives(i, seed) for i in mixture.indexes] if hard_negatives else None
        self.remote = any(index.is_remote for index in mixture.indexes)
        self._prefetched = -1  # the last step whose shards this process has asked for

    @property
    def _reads_samples(self) -> bool:
        return not self.vectors or self.teacher is not None

    def __getitem__(self, step: int) -> RankBatch | InputError:
        """The batch of a step; an `InputError` comes as a value, for torch would wrap it in a worker's traceback."""
        try:
            self._prefetch(step)
            return self._batch(step)
        except InputError as error:
            return error

    def _prefetch(self, step: int) -> None:
        """Begin to download what this process's next batches need."""
        if self.remote and self._reads_samples:
            worker = get_worker_info()
            each = worker.num_workers if worker else 1
            for ahead in range(step + each, step + each * PREFETCHED_BATCHES + 1, each):
                if ahead > self._prefetched:
                    mine, negatives, _, _ = self.part(ahead)
                    self.readers[mine.source].prefetch(np.concatenate([mine.groups, negatives.ravel()]))
                    self._prefetched = ahead

    def part(self, step: int) -> tuple[GlobalBatch, np.ndarray, np.ndarray, int]:
        """This rank's pairs of a step, groups [p, 2] and documents [p, 2] of their explicit negatives (or [0, 2]), and
        the number of chunks.
        """
        batch = self.mixture.batch(step)
        tokens = np.ceil(self._tokens(batch.source, batch.groups[:, None], batch.documents).sum(axis=1))
        tokens = tokens.astype(np.int64)
        mine = batch.of_rank(self.rank, self.world, tokens)
        chunks = 1
        if self.chunk_tokens is not None:
            # The mean, which all ranks know, and not the load of this one, so that all agree.
            sides = 4 if self.negatives else 2
            wanted = -(-int(tokens.sum()) * (sides // 2) // (self.world * self.chunk_tokens))
            chunks = min(wanted, len(mine.groups))
        nothing = np.empty((0, 2), dtype=np.int64)
        if not self.negatives:
            return mine, nothing, nothing, chunks
        groups, documents, _ = self.negatives[batch.source].draw(mine.groups, mine.documents, batch.epoch)
        return mine, groups, documents, chunks

    def _tokens(self, source: int, groups: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Tokens that are encoded of each document, about: exact for those that are encoded whole."""
        index, settings = self.mixture.indexes[source], self.mixture.settings
        numbers = index.columns["group_documents"][groups].astype(np.int64) + documents
        return index.encoded(settings.windows, settings.sentences, numbers)[1]

    def _batch(self, step: int) -> RankBatch:
        mine, negative_groups, negative_documents, chunks = self.part(step)
        negative_starts = self.mixture.starts(
            mine.source, negative_groups, negative_documents, mine.epoch, "negative window"
        )
        groups = np.concatenate([np.tile(mine.groups, 2), negative_groups.T.ravel()]).astype(np.int64)
        documents = np.concatenate([mine.documents.T.ravel(), negative_documents.T.ravel()])
        starts = np.concatenate([mine.starts.T.ravel(), negative_starts.T.ravel()])
        samples = {}
        if self._reads_samples:
            samples = {group: self.readers[mine.source][group] for group in dict.fromkeys(groups.tolist())}
        pack_documents = self._pack_vectors if self.vectors else partial(self._pack_tokens, samples)
        places, packed = pack_documents(mine.source, groups, documents, starts, chunks)
        index, windows = self.mixture.indexes[mine.source], self.mixture.settings.windows
        columns = index.columns
        first = columns["group_documents"][groups].astype(np.int64)
        languages = self.languages[mine.source][columns["document_language"][first + documents]]
        sentences = index.segments(windows, first + documents)
        sides = 4 if self.negatives else 2
        facts = [
            DocumentFacts(place, groups[place], languages[place], sentences[place], starts[place], step, sides)
            for place in places
        ]
        if self.teacher:
            read = [samples[group] for group in groups.tolist()]
            names = [sample.languages[number] for sample, number in zip(read, documents.tolist(), strict=True)]
            teacher = self.teacher.vectors([sample.id for sample in read], names)
            facts = [replace(fact, teacher=teacher[place]) for fact, place in zip(facts, places, strict=True)]
        chunks = [replace(chunk, facts=fact) for chunk, fact in zip(packed, facts, strict=True)]
        return RankBatch(chunks, mine.imbalance, mine.source)

    def _pack_tokens(self, samples: dict[int, Group], source: int, groups, documents, starts, chunks: int):
        packing, windows = self.packing[source], self.mixture.settings.windows
        read = [
            _run(cut(samples[group].document(document), windows), start, packing["sentences"])
            for group, document, start in zip(groups.tolist(), documents.tolist(), starts.tolist(), strict=True)
        ]
        tokens = [
            int(lengths[: packing["sentences"]].sum()) + 2 * min(len(lengths), packing["sentences"])
            for _, lengths in read
        ]
        places = self._chunk(np.array(tokens), chunks)
        return places, [pack([read[place] for place in chunk.tolist()], **packing) for chunk in places]

    def _pack_vectors(self, source: int, groups, documents, starts, chunks: int):
        numbers = self.mixture.indexes[source].columns["group_documents"][groups].astype(np.int64) + documents
        most = self.mixture.settings.sentences
        read = [
            self.vectors[source].document(number, start, most)
            for number, start in zip(numbers.tolist(), starts.tolist(), strict=True)
        ]
        tokens = self._tokens(source, groups, documents)
        places = self._chunk(tokens, chunks)
        return places, [pack_vectors([read[p] for p in chunk.tolist()], int(tokens[chunk].sum())) for chunk in places]

    def _chunk(self, tokens: np.ndarray, chunks: int) -> list[np.ndarray]:
        """The places of the documents of each chunk, about the same number of tokens in each and none empty.

        A pair, with its explicit negatives, lies in one chunk: an objective may look at both documents while it encodes.
        """
        if chunks == 1:
            return [np.arange(len(tokens))]
        places = np.arange(len(tokens)).reshape(4 if self.negatives else 2, -1)
        # Alike lengths side by side, dealt round: chunks are balanced.
        order = np.argsort(-tokens[places].sum(axis=0), kind="stable")
        return [np.sort(places[:, order[number::chunks]].ravel()) for number in range(chunks)]


def _run(document: tuple[np.ndarray, np.ndarray], start: int, segments: int) -> tuple[np.ndarray, np.ndarray]:
    """`segments` segments of a document (its tokens and the lengths of its segments) from segment `start` on."""
    if not start:
        return document
    tokens, lengths = document
    return tokens[int(lengths[:start].sum()) :], lengths[start : start + segments]


def batches(dataset: RankBatches, steps: Iterable[int], workers: int, device: torch.device) -> Iterator[RankBatch]:
    """The batches of `steps`, in this order, on `device`. To be closed by whoever may not exhaust it."""
    loader = DataLoader(
        dataset,
        sampler=steps,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
    )
    # Workers inherit the mask: a signal to the whole process group is for the training process, which answers it at the
    # end of a step; a worker that died of it would take the run along before it could save.
    signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    stream = iter(loader)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        for batch in stream:
            if isinstance(batch, InputError):
                raise batch
            yield batch.to(device)
    finally:
        # Its end ends the workers. multiprocessing would, at exit, send them a SIGTERM, which they do not answer, and
        # wait for ever.
        del stream


def _as_is(batch: RankBatch | InputError) -> RankBatch | InputError:
    return batch
