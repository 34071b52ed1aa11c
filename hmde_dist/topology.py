"""Who am I: rank, world, device, and how ranks agree. The only reader of RANK, WORLD_SIZE, LOCAL_* and SLURM_*.

The same program is started by `deepspeed`, `torchrun`, Slurm's `srun` or plain `python`; each sets another part of the
environment. `join` completes it, so that every library that reads it afterwards sees the same world.
"""

import os
import random
import re
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hmde_dist import command
from hmde_dist.command import InputError


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """True on every rank where it is True on any: a decision that leads to a collective is made by one."""
        return bool(self.maximum(float(flag)))

    def messages(self, own: str) -> list[str]:
        """The messages of all ranks that have one, on every rank."""
        return [message for message in self.gather(own) if message]

    def gather(self, own) -> list:
        """The small plain values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [own]
        found = [None] * self.size
        dist.all_gather_object(found, own)
        return found

    def maximum(self, value: float) -> float:
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def total(self, value: float) -> float:
        return self.totals([value])[0]

    def totals(self, values: list[float]) -> list[float]:
        """The sum over ranks of each of several numbers, in one collective."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: list[float], operation) -> list[float]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()


def complete_environment(environment: dict[str, str] | os._Environ = os.environ) -> None:
    """Fill in what the launcher at hand leaves out of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_*.

    - `torchrun` sets all.
    - `deepspeed` sets all but LOCAL_WORLD_SIZE (it calls it LOCAL_SIZE); without that mosaicml-streaming takes every
      rank for the first of its node.
    - `srun` sets only SLURM_*; the port is derived from job and step, so two jobs on a node do not meet.
    - plain `python`: a world of one, on a free port.
    """
    env = environment
    if "RANK" in env:
        env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))
        env.setdefault("LOCAL_RANK", str(int(env["RANK"]) % int(env["LOCAL_WORLD_SIZE"])))
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # Only srun sets the variables of a step: a batch script itself is no rank of many.
        tasks = env["SLURM_STEP_NUM_TASKS"]
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], tasks, env["SLURM_LOCALID"]
        # "2(x3),1": tasks per node, in the order of the nodes; SLURM_NODEID says which is ours.
        layout = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", tasks))
        per_node = [
            int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", layout) for _ in range(int(times or 1))
        ]
        env["LOCAL_WORLD_SIZE"] = str(per_node[int(env.get("SLURM_NODEID", "0"))])
        env.setdefault(
            "MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "localhost")))
        )
        job = ".".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
        # Below the ephemeral range that starts at 32768.
        env.setdefault("MASTER_PORT", str(random.Random(job).randrange(12_000, 32_000)))
    else:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in env:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                env["MASTER_PORT"] = str(probe.getsockname()[1])


def choose_device(local_rank: int, local_size: int) -> torch.device:
    """The GPU of a rank; the CPU where there is none, or DS_ACCELERATOR=cpu asks for it.

    Raises:
        InputError: more ranks than GPUs on this node.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        # With `srun --gpus-per-task=1` every rank sees one GPU, its own.
        return torch.device("cuda", 0)
    if local_size > count:
        raise InputError(f"{local_size} ranks on a node of {count} GPUs: start one rank for each GPU")
    return torch.device("cuda", local_rank)


def claimed_rank() -> int:
    """The rank that the launcher gave this process, before anything is joined."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def has_ranks() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    complete_environment()
    return int(os.environ["WORLD_SIZE"]) > 1


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9],b1` -> `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodelist)
    assert match, nodelist
    return "".join(part or "" for part in match.groups())


def join(timeout_minutes: int = 30) -> World:
    """Join the run: complete the environment, initialise the process group and DeepSpeed's view of it."""
    complete_environment()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    world = World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        local_size=local_size,
        device=choose_device(local_rank, local_size),
    )
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # The deepspeed launcher leaves every rank all cores.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    command.was_a_rank = True
    import deepspeed
    import deepspeed.ops

    # On a CPU this op is compiled at start (needs g++ and ninja, and waits for ever on the lock of a build that was
    # killed), leaves 66 MiB in /dev/shm per rank, and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    return world


def leave() -> None:
    """Leave the process group, so that no rank's exit looks like a failure to another."""
    if dist.is_initialized():
        dist.destroy_process_group()
