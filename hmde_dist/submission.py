"""Work as submitted jobs: the profile of a cluster, the batch scripts, and what each task of a job runs.

A training is one job. One task of it is one rank; no launcher stands between Slurm and the ranks, so signals reach
them. A build of documents or shards is a chain of job arrays, one a step; a job of an array does its share of the step.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import submitit
import yaml
from pydantic import Field, ValidationError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from hmde_dist.command import BAD_INPUT, DONE, InputError
from hmde_dist.recipe import Count, Section


class Profile(Section):
    """How jobs run on one cluster; unset settings are left to the cluster."""

    cluster: Literal["slurm", "local"] = Field(description="local = processes on this machine, without Slurm")
    tasks_per_node: Count = Field(description="ranks of a node: one for each GPU")
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_task: Count = 1
    time_minutes: Count = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_lead_seconds: Count = Field(120, description="SIGUSR2 comes this long before the time limit: time to save")
    setup: list[str] = Field([], description="shell lines before the ranks start, such as `module load cuda`")


def load_profile(path: Path) -> Profile:
    """The profile in the YAML file `path`."""
    try:
        return Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise InputError(f"no profile {path}; there are: {known}") from None
    except (ValidationError, yaml.YAMLError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
        raise InputError(
            f"{path}: " + "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems)
        ) from None


@dataclass(frozen=True)
class TrainingJob:
    """What a task runs: `train.py` with these arguments, as the rank that the scheduler gave it."""

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        # Not CUDA_VISIBLE_DEVICES: ranks choose their device by LOCAL_RANK.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        sys.argv = ["train.py", *self.arguments]
        from hmde_dist.train import main

        try:
            # 75 is a stop on request: the run folder holds a checkpoint, submitting the same job goes on.
            return main() or DONE
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT


@dataclass(frozen=True)
class ShareJob:
    """What a job of an array runs: its share of one step of a build command."""

    command: tuple[str, ...]
    step: str
    shares: int
    workers: int

    def __call__(self, share: int) -> None:
        arguments = ["--step", self.step, "--share", f"{share}/{self.shares}", "--workers", str(self.workers)]
        # An exception, not a code: Slurm starts the next step only after jobs that end well.
        subprocess.run([sys.executable, *self.command, *arguments], check=True)


def slurm_parameters(profile: Profile, nodes: int, name: str) -> dict:
    """The profile as submitit's names of sbatch options."""
    optional = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
    if profile.gpus_per_node:
        optional["gpus_per_node"] = profile.gpus_per_node
    return {
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": profile.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "time": profile.time_minutes,
        "signal_delay_s": profile.signal_lead_seconds,
        "setup": list(profile.setup) or None,
        # Without it one failed rank leaves the others waiting in a collective.
        "srun_args": ["--kill-on-bad-exit=1"],
    } | {key: value for key, value in optional.items() if value is not None}


def batch_script(profile: Profile, nodes: int, name: str, folder: Path) -> str:
    """The text that would be given to sbatch."""
    command = f"{sys.executable} -u -m submitit.core._submit {folder}"
    return _make_sbatch_string(command=command, folder=folder, **slurm_parameters(profile, nodes, name))


def _step_parameters(profile: Profile, step: str, after: str) -> dict:
    wanted = slurm_parameters(profile, 1, step) | {"ntasks_per_node": 1, "srun_args": None}
    wanted.pop("gpus_per_node", None)
    waits = {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"} if after else {}
    return wanted | {"additional_parameters": waits}


def step_scripts(steps: Mapping[str, bool], profile: Profile, shares: int, folder: Path) -> str:
    """The texts that `submit_steps` would give to sbatch, one after the other."""
    scripts, after = [], ""
    for step, many in steps.items():
        array = {"map_count": shares} if many else {}
        command = f"{sys.executable} -u -m submitit.core._submit {folder / step}"
        parameters = _step_parameters(profile, step, after)
        scripts.append(_make_sbatch_string(command=command, folder=folder / step, **parameters, **array))
        after = f"<id of {step}>"
    return "\n".join(scripts)


def submit_steps(
    command: Sequence[str], steps: Mapping[str, bool], profile: Profile, shares: int, folder: Path
) -> dict[str, str]:
    """Submit a build as job arrays, each of which waits for the one before it; returns the job id of each step.

    Args:
        command: the build without --step, --share and --workers.
        steps: each step in order, and whether it has many tasks, to be shared by `shares` jobs.

    Raises:
        InputError: there is no Slurm here, or Slurm refuses a job.
    """
    if SlurmExecutor.affinity() < 0:
        raise InputError("no Slurm here (srun is not on the path): submit from a login node, or run the command itself")
    ids: dict[str, str] = {}
    for step, many in steps.items():
        executor = SlurmExecutor(folder=folder / step)
        executor.update_parameters(**_step_parameters(profile, step, next(reversed(ids.values()), "")))
        count = shares if many else 1
        job = ShareJob(tuple(command), step, count, profile.cpus_per_task)
        try:
            jobs = executor.map_array(job, range(count))
        except submitit.core.utils.FailedJobError as error:
            raise InputError(f"Slurm refused step {step}: {error}") from None
        ids[step] = jobs[0].job_id.split("_")[0]
    return ids


def submit(job: TrainingJob, profile: Profile, nodes: int, name: str, folder: Path) -> submitit.Job:
    """Submit `job`; logs and the submitted job lie under `folder`.

    Raises:
        InputError: the profile needs Slurm and there is none here, or Slurm refuses the job.
    """
    if profile.cluster == "local":
        if nodes != 1:
            raise InputError(f"--nodes {nodes}: the local executor has one node")
        executor = submitit.LocalExecutor(folder=folder)
        executor.update_parameters(
            tasks_per_node=profile.tasks_per_node,
            gpus_per_node=profile.gpus_per_node,
            timeout_min=profile.time_minutes,
            signal_delay_s=profile.signal_lead_seconds,
        )
        return executor.submit(job)
    if SlurmExecutor.affinity() < 0:
        raise InputError("no Slurm here (srun is not on the path): submit from a login node, or use --profile local")
    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(**slurm_parameters(profile, nodes, name))
    try:
        return executor.submit(job)
    except submitit.core.utils.FailedJobError as error:
        raise InputError(f"Slurm refused the job: {error}") from None
