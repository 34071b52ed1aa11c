"""The loader: packed batches of this rank, in the order of the plan, made in worker processes.

Workers hold no state: batch `step` is a function of plan, rank and world size, so their number may change at any time
and resuming means starting at another step.
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hmde_dist.command import InputError
from hmde_dist.stream.batch import PackedBatch, pack
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.plan import Plan
from hmde_dist.stream.reader import GroupReader


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

    The 2p documents of p pairs come as [first of each pair..., second of each pair...], with `group` [2p], the group
    number of each, in `extra`.
    """

    def __init__(self, plan: Plan, sentences: int, rank: int, world: int):
        self.plan, self.rank, self.world = plan, rank, world
        self.reader = GroupReader(plan.index)
        self.settings = packing_settings(plan.index, sentences)

    def __getitem__(self, step: int) -> PackedBatch | InputError:
        """The batch of a step; an `InputError` comes as a value, for torch would wrap it in a worker's traceback."""
        try:
            return self._batch(step)
        except InputError as error:
            return error

    def _batch(self, step: int) -> PackedBatch:
        batch = self.plan.batch(step)
        columns = self.plan.index.columns
        positions = columns["group_documents"][batch.groups].astype(np.int64)[:, None] + batch.documents
        # What is encoded of a document is cut to a number of sentences, and each sentence has two special tokens.
        sentences = columns["document_sentences"][positions].astype(np.int64)
        kept = np.minimum(sentences, self.settings["sentences"])
        tokens = columns["document_tokens"][positions] * (kept / sentences) + 2 * kept
        mine = batch.of_rank(self.rank, self.world, np.ceil(tokens.sum(axis=1)).astype(np.int64))
        samples = [self.reader[int(group)] for group in mine.groups]
        documents = [
            sample.document(int(mine.documents[row, side])) for side in (0, 1) for row, sample in enumerate(samples)
        ]
        return pack(documents, **self.settings, extra={"group": np.tile(mine.groups, 2)})


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
