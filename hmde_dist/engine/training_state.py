"""What the engine trains, as slices of named parameters: the same view of ZeRO 0 to 3 and of any number of ranks.

DeepSpeed lays parameters out in flat buffers that depend on stage and world size. A slice is a run of elements of one
parameter inside them, as views: copying out of all slices of all ranks is saving, copying into them is resuming, and
another world or stage only cuts the same parameters elsewhere. Owns the knowledge of where DeepSpeed keeps fp32 weights and
Adam's moments; refuses anything but fp32 weights and torch's Adam.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hmde_dist.topology import World

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `start + n` of a parameter.

    Attributes:
        parts: "weight" and, for a trained parameter, "exp_avg" and "exp_avg_sq": views [n] into the engine's memory.
    """

    name: str
    start: int
    parts: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.parts[WEIGHT])

    def cut(self, first: int, last: int) -> "Slice":
        """Elements `first` to `last - 1` of this slice."""
        return Slice(self.name, self.start + first, {part: tensor[first:last] for part, tensor in self.parts.items()})


def shapes(engine) -> dict[str, list[int]]:
    """The shape of every parameter, whole."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def buffers(engine) -> dict[str, torch.Tensor]:
    """What the module's `state_dict` holds beside parameters; the same on all ranks."""
    kept = engine.module.state_dict().keys()
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in kept}


def held_slices(engine, world: World) -> list[Slice]:
    """All that this rank holds: under ZeRO 0 every parameter whole, else its partitions."""
    _fill_moments(engine)
    stage = engine.zero_optimization_stage()
    return [
        part
        for name, parameter in engine.module.named_parameters()
        for part in _slices(engine, stage, name, parameter, world.rank)
        if len(part)
    ]


def owned_slices(engine, world: World) -> list[Slice]:
    """What this rank saves: each element of every parameter is owned by exactly one rank."""
    held = held_slices(engine, world)
    stage = engine.zero_optimization_stage()
    partitioned = {name for name, p in engine.module.named_parameters() if stage == 3 or (stage and p.requires_grad)}
    # What all ranks hold is shared out by number of elements.
    total = sum(len(part) for part in held if part.name not in partitioned)
    first, last = (total * number // world.size for number in (world.rank, world.rank + 1))
    owned, place = [], 0
    for part in held:
        if part.name in partitioned:
            owned.append(part)
            continue
        inside = part.cut(*(min(max(edge - place, 0), len(part)) for edge in (first, last)))
        place += len(part)
        if len(inside):
            owned.append(inside)
    return owned


def _slices(engine, stage: int, name: str, parameter: torch.nn.Parameter, rank: int) -> Iterator[Slice]:
    optimizer = engine.optimizer
    if stage == 3:
        # Every rank holds an equal run, padded at the end of the parameter; `ds_tensor` is that of a frozen one.
        if parameter.requires_grad:
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat, first = optimizer.fp32_partitioned_groups_flat[group], offset
        else:
            flat, first, numel = parameter.ds_tensor.view(-1), 0, parameter.ds_tensor.numel()
        start = numel * rank
        numel = max(0, min(numel, parameter.ds_numel - start))
    elif stage and parameter.requires_grad:
        mapping = parameter._hp_mapping
        if mapping is None:
            return  # lies wholly in other ranks' partitions
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        first, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        start = mapping.lp_fragment_address.start
    else:
        flat, first, numel, start = parameter, 0, parameter.numel(), 0
    parts = {WEIGHT: flat.detach().view(-1)[first : first + numel]}
    if parameter.requires_grad:
        moments = _adam(engine).state[flat]
        parts |= {moment: moments[moment].view(-1)[first : first + numel] for moment in MOMENTS}
    assert all(tensor.dtype == torch.float32 for tensor in parts.values()), name
    yield Slice(name, start, parts)


def _adam(engine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _flat_parameters(engine) -> list[tuple[torch.Tensor, dict]]:
    """The tensors that Adam updates, each with its parameter group."""
    stage, groups = engine.zero_optimization_stage(), _adam(engine).param_groups
    if stage == 3:
        optimizer = engine.optimizer
        return [
            (flat, groups[optimizer.sub_group_to_group_id[number]])
            for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat)
        ]
    if stage:
        return list(zip(engine.optimizer.single_partition_of_fp32_groups, groups, strict=True))
    return [(parameter, group) for group in groups for parameter in group["params"]]


def _fill_moments(engine) -> None:
    """Make Adam's state as its first step would, where it has none yet."""
    state = _adam(engine).state
    for flat, _ in _flat_parameters(engine):
        if not state[flat]:
            state[flat].update(step=torch.tensor(0.0), **{name: torch.zeros_like(flat) for name in MOMENTS})


@torch.no_grad()
def load_state(engine, step: int, read: Callable[[str, str, int, torch.Tensor], None], world: World) -> None:
    """Fill all that this rank holds and make DeepSpeed's working copies follow. A collective.

    Args:
        step: updates that were applied, which Adam corrects its bias by.
        read: `read(name, part, start, into)` fills `into` [n] with elements of a parameter from `start` on; buffers are
            asked for whole, as part "buffer".
    """
    for part in held_slices(engine, world):
        for kind, tensor in part.parts.items():
            read(part.name, kind, part.start, tensor)
    for name, buffer in buffers(engine).items():
        read(name, "buffer", 0, buffer.view(-1))
    for flat, group in _flat_parameters(engine):
        _adam(engine).state[flat]["step"].fill_(step - group["since"])
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage:
        optimizer.update_lp_params()


def gradient_norm(engine) -> float:
    """Global norm of the reduced gradients before clipping, NaN where one is not finite. A collective; moves nothing."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        # Gradients are whole and alike on all ranks here.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
    from deepspeed.runtime.utils import combine_grad_norm_groups

    norm = float(
        combine_grad_norm_groups(optimizer._get_norm_groups()) if stage == 3 else optimizer.scaled_global_norm()
    )
    return norm if norm >= 0 else float("nan")  # DeepSpeed says -1


def discard_gradients(engine) -> None:
    """Drop the reduced gradients, as if the batch had never been seen."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        engine.zero_grad()
        return
    # What DeepSpeed does itself when an fp16 step overflows.
    optimizer.zero_grad(set_to_none=True)
    if stage == 3:
        optimizer.averaged_gradients = {}
        return
    optimizer.micro_step_id = -1
    optimizer._release_preflattened_grad_buffers()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
