"""The frozen fast path: with a sentence encoder that does not change, every sentence vector is computed once.

Owns computing the vectors (all ranks together, resumable) and what they are named after; `stream.sentence_vectors` owns
how they lie on disk. As in HMDE's own runs, the sentence encoder is in evaluation mode while it is frozen: no dropout.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from hmde_dist.command import InputError, output_file, progress
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.recipe import Recipe
from hmde_dist.stream.batch import pack
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.loader import packing_settings
from hmde_dist.stream.reader import GroupReader
from hmde_dist.stream.sentence_vectors import SentenceVectors, VectorLayout, write_manifest
from hmde_dist.stream.sliding_windows import cut
from hmde_dist.topology import World

TOKENS_PER_CALL = 16_384
SEEN_BY_ALL = ".seen-by-all"  # is there while the ranks ask whether they share the folder
MOST = 1 << 40  # segments, where there is no limit


def sentence_vectors(
    recipe: Recipe, encoder: HMDEModel, indexes: list[ShardIndex], world: World
) -> list[SentenceVectors]:
    """The sentence vectors of every shard set under the encoder's weights, computed where they are not there yet.

    A collective. The encoder comes back as it was, on the device of this rank.

    Raises:
        InputError: the folder beside a shard set cannot be written.
    """
    limit = recipe.data.sentences if recipe.data.window == "first" else None
    encoder.to(world.device)
    weights = _fingerprint(encoder, recipe.engine.precision)
    found = []
    for index in indexes:
        layout = VectorLayout.of(index, encoder.config.hidden_size, limit, encoder.windows)
        facts = {"weights": weights, "index_hash": index.hash, "sentences": limit, "segments": encoder.config.segments}
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        folder = vectors_folder(index) / key
        if not world.agree(not (folder / "manifest.json").is_file()):
            found.append(SentenceVectors(folder, layout))
            continue
        _compute(encoder, index, layout, folder, limit, recipe.engine.precision, world)
        if world.is_first:
            write_manifest(folder, layout, facts)
        world.barrier()
        found.append(SentenceVectors(folder, layout))
    return found


def vectors_folder(index: ShardIndex) -> Path:
    """Beside the shard set (which is never written to), or beside its cache."""
    return index.folder.absolute().with_name(index.folder.absolute().name + ".vectors")


@torch.inference_mode()
def _compute(encoder, index: ShardIndex, layout: VectorLayout, folder: Path, limit: int | None, precision: str, world):
    """Every rank computes the missing blocks whose turn it is; each appears by one rename."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if world.is_first:
            (folder / SEEN_BY_ALL).touch()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); copy the shards to where it can") from None
    missing = [block for block in range(layout.blocks) if not layout.is_whole(folder, block)]
    world.barrier()  # all have looked before the first block appears
    alone = world.agree(not (folder / SEEN_BY_ALL).is_file())
    if world.is_first:
        (folder / SEEN_BY_ALL).unlink()
    if alone:
        raise InputError(
            f"{folder}: not the same folder on all nodes, and each rank computes a part of the sentence vectors: with "
            "model.lower.frozen put the shards, or data.cache, where all nodes see them"
        )
    reader = GroupReader(index)
    was_training = encoder.training
    encoder.eval()
    rows = sum(layout.block_rows(block) for block in missing)
    bar = progress(total=rows, desc="sentence vectors", unit="sentence", disable=not world.is_first)
    with bar:
        for block in missing[world.rank :: world.size]:
            with output_file(layout.block_file(folder, block), "wb") as file:
                for vectors in _block_vectors(encoder, reader, layout, block, limit, precision):
                    file.write(vectors.cpu().view(torch.int16).numpy().tobytes())
                    bar.update(min(len(vectors) * world.size, rows - bar.n))
    encoder.train(was_training)
    world.barrier()


def _block_vectors(encoder: HMDEModel, reader: GroupReader, layout: VectorLayout, block: int, limit, precision: str):
    """Vectors [S, W] (bf16) of the documents of a block, several documents at a time."""
    index = reader.index
    settings = packing_settings(index, limit or MOST)
    first, stop = (int(number) for number in layout.first_document[block : block + 2])
    _, tokens = index.encoded(encoder.windows, limit or MOST, slice(first, stop))
    call = np.cumsum(tokens) // TOKENS_PER_CALL
    starts = index.columns["group_documents"].astype(np.int64)
    groups = np.searchsorted(starts, np.arange(first, stop), side="right") - 1
    for documents in np.split(np.arange(first, stop), np.flatnonzero(np.diff(call)) + 1):
        samples = {group: reader[group] for group in dict.fromkeys(groups[documents - first].tolist())}
        texts = [
            cut(samples[group].document(number - int(starts[group])), encoder.windows)
            for number, group in zip(documents.tolist(), groups[documents - first].tolist(), strict=True)
        ]
        batch = pack(texts, **settings).to(encoder.device)
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield encoder.encode_sentences(batch)[batch.sentence_rows].bfloat16()


def _fingerprint(encoder: HMDEModel, precision: str) -> str:
    """Of everything in the sentence encoder that its vectors depend on."""
    settings = {k: v for k, v in encoder.config.lower.items() if k not in ("transformers_version", "_name_or_path")}
    digest = hashlib.sha256(repr((precision, encoder.config.sentence_pooling, sorted(settings.items()))).encode())
    for name, tensor in sorted(encoder.lower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
