"""Work as submitted jobs: the profile of a cluster, the batch scripts, and what each task of a job runs.

A training is one job. One task of it is one rank; no launcher stands between Slurm and the ranks, so signals reach
them. A build of documents or shards is a chain of job arrays, one a step; a job of an array does its share of the step.

A training that was stopped on request (exit code 75) is requeued by its own batch script, which sees how the ranks ended
and whether the nodes still answer. The run folder is all the state there is:

    RUN/jobs/
      code-1a2b3c4d5e6f/      what the job runs: the package and the resolved recipe as they were submitted
      ID_submission.sh        the batch script
      ID_RANK_log.out, .err   what a rank printed, over all restarts
      ID_RESTART_code         exit code of an attempt, by its first rank
      attempt                 the attempt that has the run folder
      ID_submitted.pkl, …     submitit's own
"""

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import submitit
import yaml
from pydantic import Field, StrictInt, ValidationError, model_validator
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from hmde_dist.command import BAD_INPUT, DONE, FAILED, STOPPED, InputError, code_commit, output_folder
from hmde_dist.recipe import Count, Section
from hmde_dist.run_status import job_ids, slurm_jobs

# Options of sbatch that a profile cannot give in `options`, for they are made from other settings.
OWN_OPTIONS = """array chdir cpus-per-task dependency error export gpus-per-node job-name kill-on-invalid-dep nodes ntasks
    ntasks-per-node open-mode output requeue no-requeue signal time""".split()
# Its settings that act on a profile without Slurm.
LOCAL_SETTINGS = {"cluster", "tasks_per_node", "gpus_per_node", "time_minutes", "signal_lead_seconds"}
PROFILES = Path(__file__).parent.parent / "slurm" / "profiles"


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
    signal_lead_seconds: Count = Field(
        120, description="SIGUSR2 comes this long before the time limit, or up to a minute earlier: time to save"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(100, description="of one job, whatever made Slurm restart it")
    setup: list[str] = Field([], description="shell lines before the ranks start, such as `module load cuda`")
    python: str | None = Field(
        None, description="command that starts Python, such as `apptainer exec --nv hmde.sif python`; null = this one"
    )
    srun: list[str] = Field([], description="further options of srun, such as --container-image=… of pyxis")
    options: dict[str, str | StrictInt | Literal[True]] = Field(
        {}, description="further options of sbatch, such as mem: 200G"
    )

    @model_validator(mode="after")
    def _whole(self) -> "Profile":
        problems = []
        if self.gpus_per_node not in (0, self.tasks_per_node):
            problems.append("tasks_per_node must be gpus_per_node: one rank for each GPU")
        if self.signal_lead_seconds >= self.time_minutes * 60:
            problems.append("signal_lead_seconds is longer than time_minutes")
        if own := [
            name for name in self.options if name.replace("_", "-") in OWN_OPTIONS or name in type(self).model_fields
        ]:
            problems.append(f"options: {', '.join(own)} follows from other settings")
        if self.cluster == "local" and (idle := self.model_fields_set - LOCAL_SETTINGS):
            problems.append(f"{', '.join(sorted(idle))}: nothing that cluster: local has")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def profile_path(name: str) -> Path:
    """A profile of `slurm/profiles/`, or a file."""
    return Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"


def load_profile(path: Path) -> Profile:
    """The profile in the YAML file `path`."""
    try:
        return Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise InputError(f"no profile {path}; there are: {known}") from None
    except (ValidationError, yaml.YAMLError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
        lines = [": ".join([*(str(part) for part in problem["loc"]), problem["msg"]]) for problem in problems]
        raise InputError(f"{path}: {'; '.join(line.replace('Value error, ', '') for line in lines)}") from None


# ---- what tasks run --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainingJob:
    """What a task runs: `train.py` with these arguments, as the rank that the scheduler gave it."""

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        task = submitit.JobEnvironment()
        jobs, attempt = task.paths.folder, f"{task.job_id}_{os.environ.get('SLURM_RESTART_COUNT', '0')}"

        def end(code: int) -> int:
            if task.global_rank == 0:
                (jobs / f"{attempt}_code").write_text(f"{code}\n")
            return code

        def stop_at_once(*_) -> None:
            # Not submitit's own handler: it counts restarts in its own way and calls some of them failures.
            if task.global_rank == 0:
                end(STOPPED)
                os._exit(FAILED)  # srun ends the other ranks

        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, stop_at_once)  # nothing is trained yet; the loop has handlers of its own
        if task.global_rank == 0:
            (jobs / "attempt").write_text(attempt)
            threading.Thread(target=_give_way, args=(jobs / "attempt", attempt), daemon=True).start()
        if task.cluster == "local":
            # Not CUDA_VISIBLE_DEVICES: ranks choose their device by LOCAL_RANK. Under Slurm `topology` knows the ranks.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        sys.argv = ["train.py", *self.arguments]
        from hmde_dist.train import main

        try:
            return end(main() or DONE)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return end(BAD_INPUT)


def _give_way(file: Path, attempt: str) -> None:
    """End this process when a later attempt has the run folder: ranks on a node that Slurm has lost may live on."""
    while True:
        time.sleep(5)
        with contextlib.suppress(OSError):
            if (now := file.read_text()) != attempt:
                print(f"error: attempt {now} has the run folder, {attempt} ends", file=sys.stderr, flush=True)
                os._exit(FAILED)


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


def take_snapshot(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A copy of this package and of `files` in a folder under `folder`, named by its content.

    A job imports from there, so it runs the code that it was submitted with, also when it is restarted weeks later.
    """
    package = Path(__file__).parent
    copied = {
        f"{package.name}/{path.relative_to(package)}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    } | {"commit": code_commit().encode(), **files}
    digest = hashlib.sha256()
    for name, content in copied.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    snapshot = folder.absolute() / f"code-{digest.hexdigest()[:12]}"
    if not snapshot.exists():
        with output_folder(snapshot) as partial:
            for name, content in copied.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(content)
    return snapshot


# ---- batch scripts ---------------------------------------------------------------------------------------------------
def _setup(profile: Profile, snapshot: Path) -> list[str]:
    # PYTHONSAFEPATH: `python -m` would look into the folder of the submission first.
    return [
        *profile.setup,
        f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


# The first node is that of the first rank. Below the ephemeral ports, which start at 32768, and answered by nobody.
CHOOSE_PORT = """
while MASTER_PORT=$((12000 + RANDOM % 20000)); (exec 3<>/dev/tcp/127.0.0.1/$MASTER_PORT) 2>/dev/null; do :; done
export MASTER_PORT"""

BEGIN = """
restarts=${{SLURM_RESTART_COUNT:-0}}
if [ "$restarts" -gt {max_restarts} ]; then
    echo "not started: restarted more often than max_restarts: {max_restarts}"
    exit {stopped}
fi"""

END = """
srun_code=$?
code=$(cat {folder}/"${{SLURM_JOB_ID}}_${{restarts}}_code" 2>/dev/null || echo "$srun_code")
case $code in
    {done} | {bad_input}) exit "$code" ;;
    {stopped} | {killed}) ;;
    *)  # A rank was lost. If all nodes answer, it was the program.
        timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" true && exit "$code"
        echo "a node does not answer" ;;
esac
if [ "$restarts" -ge {max_restarts} ]; then
    echo "not requeued: max_restarts: {max_restarts}"
    exit "$code"
fi
# This script may outlive its job: it was cancelled, or Slurm has restarted it elsewhere.
case $(squeue --noheader --jobs="$SLURM_JOB_ID" --Format="State:|,RestartCnt:|") in
    "RUNNING|$restarts|" | "SIGNALING|$restarts|") ;;
    *) exit "$code" ;;
esac
echo "exit code $code: requeued"
scontrol requeue "$SLURM_JOB_ID"
"""


def slurm_parameters(profile: Profile, nodes: int, name: str, folder: Path, snapshot: Path) -> dict:
    """A training as submitit's names of sbatch options."""
    optional = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
    if profile.gpus_per_node:
        optional["gpus_per_node"] = profile.gpus_per_node
    facts = {
        "folder": shlex.quote(str(folder.absolute())),
        "max_restarts": profile.max_restarts,
        "done": DONE,
        "bad_input": BAD_INPUT,
        "stopped": STOPPED,
        # By the same signals, before Python had a handler for them.
        "killed": " | ".join(str(128 + number) for number in (signal.SIGUSR2, signal.SIGTERM)),
    }
    return {
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": profile.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "time": profile.time_minutes,
        "signal_delay_s": profile.signal_lead_seconds,
        "setup": [*_setup(profile, snapshot), *(BEGIN.format(**facts) + CHOOSE_PORT).splitlines()],
        "teardown": END.format(**facts).splitlines(),
        # Without it one failed rank leaves the others waiting in a collective.
        "srun_args": ["--kill-on-bad-exit=1", *profile.srun],
        # Also where the cluster does not requeue after preemption and node failure unless asked.
        "additional_parameters": {"requeue": True, **profile.options},
    } | {key: value for key, value in optional.items() if value is not None}


def _python(profile: Profile) -> str:
    return profile.python or shlex.quote(sys.executable)


def _script(profile: Profile, folder: Path, parameters: dict) -> str:
    command = f"{_python(profile)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def batch_script(profile: Profile, nodes: int, name: str, folder: Path) -> str:
    """The text that would be given to sbatch."""
    return _script(profile, folder, slurm_parameters(profile, nodes, name, folder, folder / "code-<hash>"))


def _step_parameters(profile: Profile, step: str, folder: Path, snapshot: Path, after: str, gpus: int) -> dict:
    wanted = slurm_parameters(profile, 1, step, folder, snapshot) | {"ntasks_per_node": 1, "teardown": None}
    if wanted.pop("gpus_per_node", None) and gpus:
        wanted |= {"gpus_per_node": gpus, "cpus_per_task": gpus * profile.cpus_per_task}
    wanted |= {"setup": _setup(profile, snapshot), "srun_args": profile.srun}
    waits = {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"} if after else {}
    return wanted | {"additional_parameters": wanted["additional_parameters"] | waits}


def step_scripts(steps: Mapping[str, bool], profile: Profile, shares: int, folder: Path, gpus: int) -> str:
    """The texts that `submit_steps` would give to sbatch, one after the other."""
    scripts, after = [], ""
    for step, many in steps.items():
        array = {"map_count": shares} if many else {}
        parameters = _step_parameters(profile, step, folder / step, folder / "code-<hash>", after, gpus)
        scripts.append(_script(profile, folder / step, parameters | array))
        after = f"<id of {step}>"
    return "\n".join(scripts)


# ---- submission ------------------------------------------------------------------------------------------------------
def submit_steps(
    command: Sequence[str], steps: Mapping[str, bool], profile: Profile, shares: int, folder: Path, gpus: int
) -> dict[str, str]:
    """Submit a build as job arrays, each of which waits for the one before it; returns the job id of each step.

    Args:
        command: the build without --step, --share and --workers.
        steps: each step in order, and whether it has many tasks, to be shared by `shares` jobs.
        gpus: that each job gets, if the profile has any, with `cpus_per_task` cores for each.

    Raises:
        InputError: there is no Slurm here, or Slurm refuses a job.
    """
    program = Path(command[0])
    tools = {f"tools/{tool.name}": tool.read_bytes() for tool in sorted(program.parent.glob("*.py"))}
    snapshot = take_snapshot(folder, tools)
    ids: dict[str, str] = {}
    for step, many in steps.items():
        before = next(reversed(ids.values()), "")
        parameters = _step_parameters(profile, step, folder / step, snapshot, before, gpus)
        executor = _slurm(profile, folder / step, parameters)
        count = shares if many else 1
        job = ShareJob((str(snapshot / "tools" / program.name), *command[1:]), step, count, profile.cpus_per_task)
        with _submission(f"step {step}"):
            jobs = executor.map_array(job, range(count))
        ids[step] = jobs[0].job_id.split("_")[0]
    return ids


def submit(recipe: bytes, profile: Profile, nodes: int, name: str, folder: Path) -> submitit.Job:
    """Submit a training; logs, code and the submitted job lie under `folder`.

    Args:
        recipe: the resolved recipe as YAML.

    Raises:
        InputError: the profile needs Slurm and there is none here, Slurm refuses the job, or one is there already.
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
        snapshot = take_snapshot(folder, {"recipe.yaml": recipe})
        with _submission("the job"):
            return executor.submit(TrainingJob((str(snapshot / "recipe.yaml"),)))
    living = {id: job for id, job in slurm_jobs(job_ids(folder)).items() if job.alive}
    if living:
        listed = ", ".join(f"{id} ({job.state})" for id, job in living.items())
        raise InputError(
            f"job {listed} has this run folder: scancel {' '.join(living)} first, or name another run.folder"
        )
    snapshot = take_snapshot(folder, {"recipe.yaml": recipe})
    executor = _slurm(profile, folder, slurm_parameters(profile, nodes, name, folder, snapshot))
    with _submission("the job"):
        return executor.submit(TrainingJob((str(snapshot / "recipe.yaml"),)))


def _slurm(profile: Profile, folder: Path, parameters: dict) -> SlurmExecutor:
    if SlurmExecutor.affinity() < 0:
        raise InputError("no Slurm here (srun is not on the path): submit from a login node, or use --profile local")
    executor = SlurmExecutor(folder=folder, python=_python(profile))
    executor.update_parameters(**parameters)
    return executor


@contextlib.contextmanager
def _submission(what: str) -> Iterator[None]:
    """Submit `what` with an environment in which nothing of an outer job is left, but where Slurm is found."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        with submitit.helpers.clean_env():
            os.environ.update(kept)
            yield
    except submitit.core.utils.FailedJobError as error:
        raise InputError(f"Slurm refused {what}: {error}") from None


def wait(job: submitit.Job, folder: Path) -> int:
    """Wait until a job has ended for good, restarts included; its exit code."""
    if isinstance(job, submitit.LocalJob):
        codes = job.results()
        print(f"exit codes of the ranks: {' '.join(map(str, codes))}")
        return max(codes)
    restarts = 0
    while (now := slurm_jobs([job.job_id]).get(job.job_id)) and now.alive:
        restarts = now.restarts or 0
        time.sleep(5)
    try:
        return int((folder / f"{job.job_id}_{restarts}_code").read_text())
    except FileNotFoundError:
        return FAILED
