"""Train a hierarchical document encoder: the entry and the loop.

    deepspeed hmde_dist/train.py recipes/demo.yaml                                # one node
    torchrun --nproc_per_node 2 hmde_dist/train.py recipes/demo.yaml run.steps=100
    srun python hmde_dist/train.py recipes/demo.yaml                              # inside a Slurm allocation

Exit codes: 0 done, 2 bad input or configuration, 75 stopped on request and resumable, 1 anything else.
"""

import atexit
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

# `deepspeed hmde_dist/train.py` puts the package's own folder first on the path: its modules must not be importable bare.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent.resolve()]

try:
    from hmde_dist.command import DONE, STOPPED, InputError, RunError, argument_parser, positive, run_command
except ModuleNotFoundError:
    sys.exit(
        "error: hmde_dist is not installed in this Python: run `pip install -e .` in the checkout (or `make install`)"
    )

import numpy as np

from hmde_dist import preflight, topology
from hmde_dist.benchmark import peak_bytes
from hmde_dist.corpus.tokenizer import load_tokenizer
from hmde_dist.engine import checkpoint
from hmde_dist.engine.deepspeed_engine import TrainedModule, set_learning_rate, start_engine
from hmde_dist.engine.frozen import sentence_vectors
from hmde_dist.engine.gradient_cache import forward_backward
from hmde_dist.engine.guard import APPLY, ROLL_BACK, STOP, Guard
from hmde_dist.engine.hang_watch import HangWatch
from hmde_dist.engine.journal import Journal
from hmde_dist.engine.meter import Meter, model_flops
from hmde_dist.engine.saver import Saver
from hmde_dist.engine.self_test import self_test
from hmde_dist.engine.stopping import Stopping
from hmde_dist.engine.stragglers import Stragglers
from hmde_dist.engine.training_state import discard_gradients, gradient_norm
from hmde_dist.evaluation.validation import best_so_far, validate
from hmde_dist.model.configuration_hmde import HMDEConfig
from hmde_dist.model.export import build_model, save_description, save_model
from hmde_dist.model.merge import mean
from hmde_dist.model.model_card import model_card, save_data_facts
from hmde_dist.model.modeling_hmde import HMDEModel
from hmde_dist.objectives.objective import Loss
from hmde_dist.recipe import Recipe, dump_recipe, load_recipe
from hmde_dist.stream.loader import RankBatch, RankBatches, batches

UNFROZEN = -1  # what `train` returns where the sentence encoder begins to be trained


def main() -> int:
    parser = argument_parser(
        __doc__, "deepspeed --num_gpus 2 hmde_dist/train.py recipes/demo.yaml run.steps=500 engine.zero_stage=2"
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--plan", action="store_true", help="print what the run would do, without training")
    parser.add_argument("--world", type=positive, default=1, metavar="N", help="ranks that --plan reckons with")
    parser.add_argument(
        "--gpu", default="H100", metavar="NAME", help="GPU that --plan reckons with: A100, H100 (default), H200 or B200"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe")
    parser.add_argument("--local_rank", help="set by the deepspeed launcher; not used")
    args = parser.parse_intermixed_args()
    recipe = load_recipe(args.recipe, args.overrides)
    if args.print_config:
        print(dump_recipe(recipe), end="")
        return DONE
    if args.plan:
        preflight.print_plan(recipe, args.world, args.gpu)
        return DONE
    world = topology.join(recipe.engine.timeout_minutes)
    stopping = Stopping(recipe.run, world)
    try:
        while (code := train(recipe, world, stopping)) == UNFROZEN:
            pass  # the same run goes on from its checkpoint, with all weights trained
        return code
    finally:
        topology.leave()


def train(recipe: Recipe, world: topology.World, stopping: Stopping) -> int:
    # ---- what is asked -------------------------------------------------------------------------------------------
    run, data, hard = recipe.run, recipe.data, recipe.data.hard_negatives == "paper"
    preflight.check_world(recipe, world.size)
    mixture = preflight.open_mixture(recipe)
    index = mixture.indexes[0]
    validation = preflight.open_shards(recipe, data.validation) if data.validation else None
    if validation:
        preflight.check_validation(validation, index)
    preflight.check_writable(run.folder)
    teacher = preflight.open_teacher(recipe, mixture)

    # ---- model, engine, state ------------------------------------------------------------------------------------
    watch = HangWatch(run.folder / "hang", run.hang_minutes, world)
    guard, checkpoints = Guard(recipe.guard), run.folder / "checkpoints"
    identity = checkpoint.identity_of(recipe, mixture.indexes, teacher)
    found = checkpoint.find(checkpoints, recipe, identity, world)
    encoder = build_model(recipe.model, index, data.sentences, recipe.scale, run.seed, mixture.settings.windows)
    encoder.config.languages = sorted({language for one in mixture.indexes for language in one.languages})
    frozen = recipe.model.lower.frozen_at(found["state"]["step"] if found else 0)
    vectors = sentence_vectors(recipe, encoder, mixture.indexes, world) if frozen else ()
    engine = start_engine(recipe, encoder, world, frozen)
    restored = checkpoint.load(engine, checkpoints, found, world) if found else None
    # `step` counts updates that were applied, `batch` is the position in the plan: skipped batches set them apart.
    state = restored or {
        "step": 0,
        "batch": 0,
        "documents": 0,
        "tokens": 0,
        "validated": 0,
        "best": {"step": 0},
        "guard": guard.state_dict(),
    }
    guard.load_state_dict(state["guard"])
    tested = self_test(engine, recipe, world) if recipe.engine.self_test else {}
    journal = Journal(recipe, world, state["step"])
    journal.event("self_test", **tested)
    if world.is_first:
        save_description(encoder, index, run.folder / "model")
        save_data_facts(mixture.indexes, run.folder / "model")
    meter, stragglers = Meter(world.device), Stragglers(engine.module, world)
    saver = Saver(engine, run, identity, world, journal.event, watch.beat)
    saver.newest = restored and state["step"]
    part = RankBatches(mixture, world.rank, world.size, hard, recipe.engine.chunk_tokens, vectors, teacher)

    def open_stream() -> Iterator[RankBatch]:
        return batches(part, guard.batches(state["batch"]), data.workers, world.device)

    def roll_back() -> dict:
        """The state of the last checkpoint from before the trouble, loaded; the guard passes over what led to it."""
        found = checkpoint.find(checkpoints, recipe, identity, world, before=guard.first_suspect)
        if found is None or recipe.model.lower.frozen_at(found["state"]["step"]) != frozen:
            give_up(f"no checkpoint is from before batch {guard.first_suspect}, to roll back to")
        earlier = checkpoint.load(engine, checkpoints, found, world)
        if world.is_first:
            checkpoint.remove_after(checkpoints, earlier["step"])
        guard.roll_back(earlier["guard"])
        saver.newest = earlier["step"]
        journal.rewind(earlier["step"])
        return earlier

    def give_up(problem: str) -> None:
        """Every rank ends here; the last checkpoint is as it was."""
        report = run.folder / "post-mortem.json"
        if world.is_first:
            guard.post_mortem(report, mixture, {"problem": problem, "step": state["step"], "batch": state["batch"] - 1})
        journal.event("gave_up", step=state["step"], problem=problem)
        world.barrier()  # the launcher ends all ranks with the first that ends
        raise RunError(f"step {state['step'] + 1}: {problem}; {report} names the documents")

    def interrupted() -> bool:
        """Whether to stop, asked between the calls of validation."""
        watch.beat(f"in the validation of step {state['step']}")
        return stopping.requested()

    def validation_due() -> bool:
        step, every = state["step"], run.validate_every
        return bool(validation and step > state["validated"] and (step == run.steps or (every and step % every == 0)))

    def validate_now() -> None:
        with meter.aside():
            found = validate(engine, validation, data.sentences, world, interrupted, encoder.windows)
        if found is None:
            return
        step = state["validated"] = state["step"]
        state["best"] = best_so_far(state["best"], run.best_metric, step, found.scores)
        journal.validation(step, found.scores)
        if step == run.steps:
            journal.projector(step, found.vectors, ("id", "language", "category"), found.labels)

    # ---- the loop ------------------------------------------------------------------------------------------------
    stream = open_stream()
    atexit.register(lambda: stream.close())  # however this ends, its workers do, too
    watch.start()
    engine.train()
    if validation_due():
        validate_now()  # the run was stopped in the middle of it
    while state["step"] < run.steps:
        number = guard.next_batch(state["batch"])
        watch.beat(f"in batch {number}")
        waiting_since = time.perf_counter()
        batch = next_batch(stream, world)
        waited = time.perf_counter() - waiting_since

        own_loss, parts = forward_backward(
            engine,
            batch,
            engine.module.total_loss,
            # Dropout depends on (seed, batch, rank, chunk) alone, so random state needs no saving.
            seed=partial(dropout_seed, run.seed, number, world.rank),
        )
        grad_norm = gradient_norm(engine)
        loss, tokens = world.totals([float(own_loss), batch.tokens])
        loss = loss / world.size
        state["batch"] = number + 1
        verdict, reason = guard.judge(number, loss, grad_norm, batch.source)
        applied = verdict == APPLY
        if applied:
            rate = set_learning_rate(engine, recipe, state["step"])
            engine.step()
            for one in parts:
                if one.commit:
                    one.commit()
            state["step"] += 1
            state["documents"] += batch.documents * world.size
            state["tokens"] += int(tokens)
            meter.count(batch, model_flops(encoder, batch), sum(encoder.slots(chunk) for chunk in batch.chunks))
        else:
            discard_gradients(engine)
            journal.skipped(state["step"], guard.skipped[-1])
            if verdict == STOP:
                give_up(reason)
            if verdict == ROLL_BACK:
                stream.close()
                saver.finish()
                state = roll_back()
                stream = open_stream()
        meter.waiting(waited)
        stragglers.count(waited)

        step = state["step"]
        if applied and (step % run.log_every == 0 or step == run.steps):
            record = {name: state[name] for name in ("step", "batch", "documents", "tokens")}
            record |= {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
            record |= watch_objectives(engine.module, parts, world)
            record["peak_gib"] = peak_gib(world)
            journal.step(record | meter.read(world.total))
            journal.ranks(step, stragglers.read())
        if applied and validation_due():
            validate_now()
        saver.advance()
        stopped, last = stopping.requested(), step == run.steps
        unfreezing = frozen and not last and not recipe.model.lower.frozen_at(step)
        due = (run.checkpoint_every and step % run.checkpoint_every == 0) or step == state["best"]["step"]
        if unfreezing:
            guard.start_afresh()
        if stopped or last or unfreezing or (applied and due):
            with meter.aside():
                saver.begin(state | {"guard": guard.state_dict(), "stream": mixture.state(state["batch"])})
                if (stopped or last or unfreezing) and not saver.finish():
                    raise RunError(f"the checkpoint of step {step} could not be written; the one before it is complete")
        if stopped and (not last or validation_due()):
            journal.event("stopped", step=step, reason=stopping.reason)
            journal.close()
            return STOPPED
        if unfreezing:
            break
    watch.stop()
    stream.close()
    if state["step"] < run.steps:
        journal.event("unfrozen", step=state["step"])
        journal.close()
        engine.destroy()
        return UNFROZEN

    # ---- the result ----------------------------------------------------------------------------------------------
    if world.is_first:
        # A run that was made longer has the export of its shorter self.
        shutil.rmtree(run.folder / "export", ignore_errors=True)
        export_run(run.folder, run.folder / "export")
    # The others wait here for the first rank, too.
    journal.event("done", step=state["step"], peak_gib=peak_gib(world))
    journal.close()
    return DONE


def peak_gib(world: topology.World) -> float:
    """The most that a rank has held so far: its process, or its GPU. A collective."""
    return round(world.maximum(peak_bytes(world.device.type)) / 2**30, 3)


def watch_objectives(module: TrainedModule, parts: list[Loss], world: topology.World) -> dict:
    """What the first objective says of itself, and beside it the loss and accuracy of each where there are several."""
    facts = {"accuracy": parts[0].accuracy} | parts[0].watched
    if len(parts) > 1:
        for name, part in zip(module.names, parts, strict=True):
            facts |= {f"{name}_loss": part.loss, f"{name}_accuracy": part.accuracy}
            facts |= {f"{name}_{key}": value for key, value in part.watched.items()}
    totals = world.totals([float(value.detach()) for value in facts.values()])
    means = {key: total / world.size for key, total in zip(facts, totals, strict=True)}
    return means | {"negatives_per_anchor": parts[0].negatives}


def next_batch(stream: Iterator[RankBatch], world: topology.World) -> RankBatch:
    """The next batch; where one rank cannot read its own, all ranks raise what that rank has to say."""
    batch, problem = None, ""
    try:
        batch = next(stream)
    except InputError as error:
        problem = str(error)
    if world.agree(bool(problem)):
        raise InputError(world.messages(problem)[0])
    return batch


def export_run(run: Path, out: Path, best: bool = False, last: int = 1) -> Path:
    """Export a checkpoint of the run folder `run` as a self-contained model folder `out`.

    Args:
        best: not the newest checkpoint but the one with the best validation.
        last: the mean of the weights of so many newest checkpoints.
    """
    recipe = load_recipe(run / "config.yaml")
    weights, state = checkpoint.load_weights(run)
    merged = ""
    if best:
        step = state["best"]["step"]
        if not step:
            raise InputError(
                f"{run}: no validation has chosen a best checkpoint; train with run.best_metric, such as R@1"
            )
        weights, state = checkpoint.load_weights(run, step)
    elif last > 1:
        steps = [step for step in checkpoint.steps_in(run / "checkpoints") if step <= state["step"]][-last:]
        if len(steps) < last:
            raise InputError(
                f"{run}: {len(steps)} complete checkpoints, {last} wanted; run.keep_checkpoints keeps more"
            )
        weights = mean(checkpoint.load_weights(run, step)[0] for step in steps)
        merged = f"the mean of the weights after steps {', '.join(map(str, steps))}"
    encoder = HMDEModel(HMDEConfig.from_pretrained(run / "model"))
    module = TrainedModule(encoder, recipe)
    # A name that is missing belongs to a tensor that has another name, too.
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected and not {name for name, _ in module.named_parameters()} & set(missing), (missing, unexpected)
    scales = [one.constants()["scale"] for one in module.objectives if "scale" in one.constants()]
    encoder.config.scale = float(scales[0].detach()) if scales else recipe.scale
    card = model_card(encoder.config, run, state["step"], merged)
    save_model(encoder, load_tokenizer(run / "model"), out, card)
    return out


def dropout_seed(seed: int, step: int, rank: int, chunk: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank, chunk]).generate_state(1, np.uint64)[0])


if __name__ == "__main__":
    # What is wrong for all ranks the first one says for all: the launcher ends the others while they wait.
    run_command(main, patience=3.0 * (topology.claimed_rank() > 0))
