"""The loader: packed batches of this rank, in the order of the plan, made in worker processes.

Workers hold no state: batch `step` is a function of plan, rank and world size, so their number may change at any time
and resuming means starting at another step.
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hmde_dist.command import InputError
from hmde_dist.stream.batch import PackedBatch, pack
from hmde_dist.stream.category_negatives import CategoryNegatives
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.mixture import Mixture
from hmde_dist.stream.plan import GlobalBatch
from hmde_dist.stream.reader import GroupReader

PREFETCHED_BATCHES = 4  # of each process, ahead of the one it makes, of remote shards


def packing_settings(index: ShardIndex, sentences: int) -> dict[str, int]:
    """The keyword arguments of `pack` for the documents of a shard set."""
    special = index.manifest["special_ids"]
    return {
        "cls_id": special["cls"],
        "sep_id": special["sep"],
        "pad_id": special["pad"],
        "sentence_tokens": index.manifest["sentence_tokens"],
        "sentences": sentences,
    }


class RankBatches(Dataset):
    """`self[step]`: this rank's part of global batch `step`, packed.

    The 2p documents of p pairs come as [first of each pair..., second of each pair...], and with `hard_negatives` 4p:
    [..., a negative for each first..., for each second...]. `extra` has `group`, the group number of each document.
    """

    def __init__(self, mixture: Mixture, rank: int, world: int, hard_negatives: bool = False):
        self.mixture, self.rank, self.world = mixture, rank, world
        self.readers = [GroupReader(index) for index in mixture.indexes]
        self.remote = any(index.store is not None and index.store.url for index in mixture.indexes)
        self._prefetched = -1  # the last step whose shards this process has asked for
        self.packing = [packing_settings(index, mixture.settings.sentences) for index in mixture.indexes]
        seed = mixture.settings.seed
        self.negatives = [CategoryNegatives(i, seed) for i in mixture.indexes] if hard_negatives else None

    def __getitem__(self, step: int) -> PackedBatch | InputError:
        """The batch of a step; an `InputError` comes as a value, for torch would wrap it in a worker's traceback."""
        try:
            self._prefetch(step)
            return self._batch(step)
        except InputError as error:
            return error

    def _prefetch(self, step: int) -> None:
        """Begin to download what this process's next batches need."""
        if self.remote:
            worker = get_worker_info()
            each = worker.num_workers if worker else 1
            for ahead in range(step + each, step + each * PREFETCHED_BATCHES + 1, each):
                if ahead > self._prefetched:
                    mine, negatives, _ = self.part(ahead)
                    self.readers[mine.source].prefetch(np.concatenate([mine.groups, negatives.ravel()]))
                    self._prefetched = ahead

    def part(self, step: int) -> tuple[GlobalBatch, np.ndarray, np.ndarray]:
        """This rank's pairs of a step, and groups [p, 2] and documents [p, 2] of their explicit negatives, or [0, 2]."""
        batch = self.mixture.batch(step)
        columns = self.mixture.indexes[batch.source].columns
        positions = columns["group_documents"][batch.groups].astype(np.int64)[:, None] + batch.documents
        # What is encoded of a document is cut to a number of sentences, and each sentence has two special tokens.
        sentences = columns["document_sentences"][positions].astype(np.int64)
        kept = np.minimum(sentences, self.mixture.settings.sentences)
        tokens = columns["document_tokens"][positions] * (kept / sentences) + 2 * kept
        mine = batch.of_rank(self.rank, self.world, np.ceil(tokens.sum(axis=1)).astype(np.int64))
        nothing = np.empty((0, 2), dtype=np.int64)
        if not self.negatives:
            return mine, nothing, nothing
        groups, documents, _ = self.negatives[batch.source].draw(mine.groups, mine.documents, batch.epoch)
        return mine, groups, documents

    def _batch(self, step: int) -> PackedBatch:
        mine, negative_groups, negative_documents = self.part(step)
        reader, packing = self.readers[mine.source], self.packing[mine.source]
        samples = [reader[group] for group in mine.groups.tolist()]
        documents = [
            _window(sample.document(document), start, packing["sentences"])
            for side in (0, 1)
            for sample, document, start in zip(
                samples, mine.documents[:, side].tolist(), mine.starts[:, side].tolist(), strict=True
            )
        ]
        documents += [
            reader[group].document(document)
            for group, document in zip(
                negative_groups.T.ravel().tolist(), negative_documents.T.ravel().tolist(), strict=True
            )
        ]
        groups = np.concatenate([np.tile(mine.groups, 2), negative_groups.T.ravel()])
        return pack(documents, **packing, extra={"group": groups})


def _window(document: tuple[np.ndarray, np.ndarray], start: int, sentences: int) -> tuple[np.ndarray, np.ndarray]:
    """`sentences` sentences of a document (its tokens and the lengths of its sentences) from sentence `start` on."""
    if not start:
        return document
    tokens, lengths = document
    return tokens[int(lengths[:start].sum()) :], lengths[start : start + sentences]


def batches(dataset: RankBatches, start: int, stop: int, workers: int, device: torch.device) -> Iterator[PackedBatch]:
    """The packed batches of steps `start` to `stop - 1`, on `device`."""
    loader = DataLoader(
        dataset,
        sampler=range(start, stop),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    # Workers inherit the mask: a signal to the whole process group is for the training process, which answers it at the
    # end of a step; a worker that died of it would take the run along before it could save.
    signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    stream = iter(loader)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    for batch in stream:
        if isinstance(batch, InputError):
            raise batch
        yield batch.to(device)


def _as_is(batch: PackedBatch | InputError) -> PackedBatch | InputError:
    return batch
