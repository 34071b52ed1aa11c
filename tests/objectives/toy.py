"""What the tests of objectives share: a small encoder, pairs of made-up documents, and the comparison of ranks with one process.

A document is a function of its pair and side alone, whoever encodes it. Pairs 0, 2, 3 and 5 have versions of equally many
sentences; pair 5 of one each.
"""

import importlib
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from forks import Forks
from torch import Tensor
from transformers import AutoConfig

from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.objectives.gather import Ranks
from hmde_dist.objectives.objective import Loss, Objective
from hmde_dist.stream.batch import DocumentFacts, PackedBatch, pack

SENTENCES = ((4, 2, 7, 12, 5, 1), (4, 3, 7, 12, 3, 1))  # of the first and of the second document of each pair
VOCABULARY = 100
TEACHER_WIDTH = 12
UNTAUGHT = (2, 4)  # pairs that the teacher knows nothing of


def model(**changes) -> HMDEModel:
    """An untrained encoder whose documents differ, without dropout."""
    torch.manual_seed(0)
    lower = AutoConfig.for_model(
        "bert",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    settings = {"hidden_size": 32, "upper_heads": 2, "upper_intermediate": 32, "max_sentences": 20}
    settings |= {"languages": ["aa", "bb"], "mask_token_id": 3}
    return HMDEModel(HMDEConfig(lower=lower.to_dict(), upper_dropout=0.0, **settings | changes)).eval()


def document(seed: int, sentences: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and lengths of a document's sentences; the first ids are special."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, sentences)
    return random.integers(5, VOCABULARY, lengths.sum()).astype(np.uint32), lengths


def facts_of(numbers, groups, languages, sentences) -> DocumentFacts:
    """Of documents that are encoded whole, in step 3."""
    sentences = np.asarray(sentences)
    return DocumentFacts(numbers, groups, languages, sentences, np.zeros_like(sentences), 3)


def batch_of(counts, numbers=None) -> PackedBatch:
    """Documents of these numbers of sentences, every one of a group of its own."""
    numbers = np.arange(len(counts)) if numbers is None else np.asarray(numbers)
    documents = [document(number, count) for number, count in zip(numbers.tolist(), counts, strict=True)]
    batch = pack(documents, cls_id=1, sep_id=2, sentences=20)
    return replace(batch, facts=facts_of(numbers, numbers + 100, numbers % 2, counts))


def batch_of_pairs(pairs, places=None, of: int | None = None, sentences=SENTENCES) -> PackedBatch:
    """A chunk of these pairs: all first documents, then all second ones.

    Args:
        places: of the pairs among the `of` pairs of the rank; none = they are all of them.
        sentences: of the first and of the second document of every pair.
    """
    pairs = np.asarray(pairs)
    places = np.arange(len(pairs)) if places is None else np.asarray(places)
    of = len(pairs) if of is None else of
    documents = [document(1000 * side + pair, sentences[side][pair]) for side in (0, 1) for pair in pairs.tolist()]
    batch = pack(documents, cls_id=1, sep_id=2, sentences=20)
    sides = np.repeat([0, 1], len(pairs))
    facts = facts_of(np.concatenate([places, of + places]), np.tile(pairs, 2) + 100, sides, batch.sentence_counts)
    teacher = [np.random.default_rng(7 + pair).normal(size=TEACHER_WIDTH) for pair in pairs.tolist()] * 2
    teacher = np.stack(teacher).astype(np.float32)
    teacher[np.isin(np.tile(pairs, 2), UNTAUGHT)] = np.nan
    return replace(batch, facts=replace(facts, teacher=teacher))


def swapped(batch: PackedBatch) -> PackedBatch:
    """The same pairs, their second documents in the place of the first ones."""
    numbers = batch.facts.numbers
    return replace(batch, facts=replace(batch.facts, numbers=(numbers + len(numbers) // 2) % len(numbers)))


def assert_nothing_aligned_is_no_loss(encoder: HMDEModel, objective: Objective) -> None:
    """A loss of 0 that has a gradient, and it is 0."""
    found = loss_of(encoder, objective, [batch_of_pairs([1, 4])])
    found.loss.backward()
    assert found.loss == 0 and found.watched["aligned"] == 0
    assert all(p.grad is None or not p.grad.any() for p in (*encoder.parameters(), *objective.parameters()))


def objective_of(name: str, encoder: HMDEModel, **settings) -> Objective:
    """An objective with its fresh weights, which depend on nothing else."""
    module = importlib.import_module(f"hmde_dist.objectives.{name}")
    torch.manual_seed(5)
    return module.Objective(module.Settings(name=name, **settings), encoder)


def loss_of(encoder: HMDEModel, objective: Objective, chunks: list[PackedBatch], ranks: Ranks | None = None) -> Loss:
    """As training computes it: rows of each chunk, then the loss over all of them."""
    rows = [objective.rows(encoder, chunk, encoder(chunk)) for chunk in chunks]
    whole = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    return objective.loss(whole, objective.constants(), ranks or Ranks(alone=True))


def train(encoder: HMDEModel, objectives: list[Objective], chunk: PackedBatch, steps: int = 60) -> list[list[Loss]]:
    """Train on one batch; what each step found of each objective."""
    parameters = [p for module in (encoder.train(), *objectives) for p in module.parameters()]
    optimizer = torch.optim.Adam({id(p): p for p in parameters}.values(), 3e-3)
    history = []
    for _ in range(steps):
        found = [loss_of(encoder, objective, [chunk]) for objective in objectives]
        optimizer.zero_grad()
        sum(one.loss for one in found).backward()
        optimizer.step()
        history.append(found)
    encoder.eval()
    return history


def mean_cosine(vectors: Tensor) -> float:
    """Of different vectors; 1 where they have collapsed."""
    units = torch.nn.functional.normalize(vectors.detach(), dim=1)
    return float((units @ units.T).fill_diagonal_(0).sum() / (len(units) * (len(units) - 1)))


def gradients(name: str, settings: dict, pairs: list[int], ranks: Ranks | None) -> list[Tensor]:
    """The loss of pairs, two a chunk, its accuracy, and the gradients of all parameters."""
    encoder = model()
    objective = objective_of(name, encoder, **settings)
    places = range(len(pairs))
    chunks = [batch_of_pairs(pairs[i : i + 2], places[i : i + 2], len(pairs)) for i in places[::2]]
    found = loss_of(encoder, objective, chunks, ranks)
    found.loss.backward()
    parameters = {id(p): p for p in (*encoder.parameters(), *objective.parameters())}
    return [found.loss.detach(), found.accuracy.detach()] + [
        torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()
    ]


def compare_ranks(name: str, *variants: dict) -> None:
    """Run by every rank: values and gradients of ragged ranks, some without any row, beside those of one process."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    for settings in variants:
        # Sentences of every kind; on the first rank nothing to mask; nothing aligned there; nothing aligned at all.
        for shares in (([1, 2], [0, 3, 4, 5]), ([5], [0, 2]), ([1, 4], [2]), ([1], [4])):
            mine = gradients(name, settings, shares[rank], Ranks())
            for tensor in mine:
                dist.all_reduce(tensor)
                tensor /= world
            whole = gradients(name, settings, [*shares[0], *shares[1]], Ranks(alone=True))
            for found, expected in zip(mine, whole, strict=True):
                try:
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
                except AssertionError as error:
                    raise AssertionError(f"{settings}, {shares}") from error
    dist.destroy_process_group()


def assert_ranks_are_one_process(forks: Forks, name: str, *variants: dict) -> None:
    """Two ranks of gloo with ragged parts have the loss and the gradients of one process, for each of the settings."""
    ended = forks.run(2, f"import toy\ntoy.compare_ranks({name!r}, *{list(variants or [{}])!r})")
    assert ended.codes == [0, 0], ended.output
