"""Full fine-tuning for classification: the encoder and a linear head are trained together, by DeepSpeed.

The protocol is that of the paper's public code: dropout 0.1 and one linear layer on the document vector, AdamW without
weight decay, linear warm-up and decay, the weights of the epoch with the lowest validation loss in the language of
training, an end after seven epochs without a better one. Runs on one or more ranks; a rank takes an equal share of every
batch, in micro-batches that DeepSpeed accumulates.
"""

import contextlib
import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hmde_dist.command import InputError, progress
from hmde_dist.corpus.documents import Document
from hmde_dist.corpus.sentences import split_sentences
from hmde_dist.engine.schedule import learning_rate
from hmde_dist.evaluation.classification import Fit
from hmde_dist.evaluation.labelled import Rows
from hmde_dist.model.export import load_model
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.objectives.gather import gather
from hmde_dist.recipe import OptimizerSection
from hmde_dist.topology import World

MICRO_DOCUMENTS = 16
PATIENCE = 7  # epochs


@dataclass(frozen=True)
class Settings:
    """The defaults are the paper's code's."""

    learning_rate: float = 5e-5
    batch_documents: int = 128  # of all ranks
    steps: int = 10_000  # at most
    warmup_steps: int = 500


class Classifier(nn.Module):
    """An encoder with a linear head on its document vectors."""

    def __init__(self, encoder: HMDEModel, labels: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(encoder.config.hidden_size, labels))

    def forward(self, batch) -> torch.Tensor:
        """Logits [D, L], fp32."""
        return self.head(self.encoder(batch).documents.float())


def fine_tuned(folder: Path, documents: list[Document], many: bool, settings: Settings, world: World) -> Fit:
    """A `Fit` that trains the exported model in `folder` anew for every seed. A collective.

    Raises:
        InputError: the ranks do not divide the batch.
    """
    if settings.batch_documents % world.size:
        raise InputError(
            f"--batch-documents {settings.batch_documents} is not divisible by {world.size} ranks: use a multiple"
        )
    pieces = load_model(folder).segments(list(d.sentences) or split_sentences(d.text, d.lang) for d in documents)

    def fit(rows: Rows, targets: np.ndarray, seed: int) -> np.ndarray:
        if len(rows.train) < settings.batch_documents:
            raise InputError(
                f"{len(rows.train)} training documents are fewer than a batch: lower --batch-documents "
                f"{settings.batch_documents}"
            )
        if not len(rows.validation):
            raise InputError("no validation documents in the language of training: --fine-tune needs them to stop")
        torch.manual_seed(seed)
        module = Classifier(load_model(folder).to(world.device), targets.shape[1])
        engine = _start(module, settings, world)
        run = _Run(engine, pieces, torch.from_numpy(targets), many, world)
        run.train(rows, settings, seed)
        logits = run.logits(rows.test)
        if many:
            return (logits > 0).numpy()
        return F.one_hot(logits.argmax(dim=1), targets.shape[1]).bool().numpy()

    return fit


def _start(module: Classifier, settings: Settings, world: World):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as engine.deepspeed_engine does, and for its reason
    import deepspeed

    share = settings.batch_documents // world.size
    micro = math.gcd(share, MICRO_DOCUMENTS)
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


class _Run:
    """One training: an engine and the tokenised documents it reads."""

    def __init__(self, engine, pieces: list[list[np.ndarray]], targets: torch.Tensor, many: bool, world: World):
        self.engine, self.pieces, self.targets, self.many, self.world = engine, pieces, targets, many, world

    def loss(self, logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Mean over documents: of the cross-entropy, or of the sum over labels of the binary one."""
        wanted = self.targets[rows].to(logits.device)
        if self.many:
            return F.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="sum") / len(rows)
        return F.cross_entropy(logits, wanted.int().argmax(dim=1))

    def pack(self, rows: np.ndarray):
        return self.engine.module.encoder.pack([self.pieces[row] for row in rows])

    @torch.no_grad()
    def logits(self, rows: np.ndarray) -> torch.Tensor:
        """Logits [len(rows), L] on every rank. A collective: ranks take turns, all as many rows (some twice)."""
        share = -(-len(rows) // self.world.size)
        mine = (np.arange(share) * self.world.size + self.world.rank) % len(rows)
        # Neighbours in length share a call.
        mine = mine[np.argsort([len(self.pieces[rows[number]]) for number in mine], kind="stable")]
        self.engine.eval()
        found = [
            self.engine(self.pack(rows[mine[first : first + MICRO_DOCUMENTS]]))
            for first in range(0, share, MICRO_DOCUMENTS)
        ]
        self.engine.train()
        logits = torch.empty(len(rows), found[0].shape[1])
        logits[gather(torch.from_numpy(mine).to(self.world.device)).cpu()] = gather(torch.cat(found)).cpu()
        return logits

    def train(self, rows: Rows, settings: Settings, seed: int) -> None:
        """Train to the end of the steps or of patience; leaves the best weights in the engine. A collective."""
        epoch_steps = len(rows.train) // settings.batch_documents
        schedule = OptimizerSection(
            learning_rate=settings.learning_rate, warmup_steps=min(settings.warmup_steps, settings.steps // 10)
        )
        best, best_loss, waited = None, math.inf, 0
        bar = progress(
            total=settings.steps, desc=f"fine-tune, seed {seed}", unit="step", disable=not self.world.is_first
        )
        with bar:
            for step, batch in enumerate(self._batches(rows.train, settings, seed)):
                for group in self.engine.optimizer.param_groups:
                    group["lr"] = learning_rate(schedule, step, settings.steps)
                for part in np.split(batch, self.engine.gradient_accumulation_steps()):
                    self.engine.backward(self.loss(self.engine(self.pack(part)), part))
                    self.engine.step()
                bar.update()
                last = step + 1 == settings.steps
                if (step + 1) % epoch_steps and not last:
                    continue
                validation = float(self.loss(self.logits(rows.validation), rows.validation))
                validation = self.world.total(validation) / self.world.size  # to the last bit the same on all ranks
                bar.set_postfix(validation=f"{validation:.4f}")
                if validation < best_loss:
                    best, best_loss, waited = copy.deepcopy(self.engine.module.state_dict()), validation, 0
                else:
                    waited += 1
                if last or waited == PATIENCE:
                    break
        if best is None:
            raise FloatingPointError("the validation loss is not finite; lower --learning-rate")
        self.engine.module.load_state_dict(best)

    def _batches(self, train: np.ndarray, settings: Settings, seed: int) -> Iterator[np.ndarray]:
        """This rank's share of every batch; each epoch in an order of its own, its incomplete last batch left out."""
        step = 0
        while step < settings.steps:
            order = np.random.default_rng([seed, step]).permutation(train)
            for first in range(0, len(order) - settings.batch_documents + 1, settings.batch_documents):
                if step == settings.steps:
                    return
                seeds = np.random.SeedSequence([seed, step, self.world.rank]).generate_state(1, np.uint64)
                torch.manual_seed(int(seeds[0]))
                yield order[first : first + settings.batch_documents][self.world.rank :: self.world.size]
                step += 1
