"""A real Slurm of several nodes on this machine, for tests: munged, slurmctld and one slurmd a node.

All of it lies in one folder and on free ports; a Slurm of the machine is neither read nor touched (`SLURM_CONF` alone ties
clients and jobs to this one). The daemons run in the foreground as children of the test and die with it. It needs root,
because the daemons of Debian's packages do, but no systemd, no cgroups and no namespaces.

Nodes bear addresses of the loopback network as names, `127.0.1.1` and so on, so that ranks find the first node without
a name server.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from launch import PROGRAMS, environment, free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
# /usr/sbin is not on every user's path.
SEARCHED = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

# cred_expire is also the time that a requeued job waits before it may start (default 120 s). A node that is silent for
# SlurmdTimeout is down and its jobs are requeued; a job that is to end gets KillWait seconds after SIGTERM.
CONFIGURATION = """
ClusterName=hmde
FirstJobId={first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# What clusters set where jobs requeue themselves: jobs must ask for it.
JobRequeue=0
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Why no Slurm can be started here; empty where one can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=SEARCHED) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install munge slurmctld slurmd slurm-client"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root here"


class Cluster:
    """Nodes of two CPUs each, in `folder`; `env` is the environment of its clients."""

    def __init__(self, folder: Path, nodes: int, grace: int = 20):
        self.folder, self.daemons = folder, {}
        folder.mkdir()
        (folder / "state").mkdir()
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        configuration = folder / "slurm.conf"
        self.env = environment(SLURM_CONF=str(configuration), PATH=f"{PROGRAMS}{os.pathsep}{SEARCHED}")
        self.nodes = [f"127.0.1.{number}" for number in range(1, nodes + 1)]
        lines = [f"NodeName={n} NodeHostName=localhost NodeAddr={n} Port={free_port()} CPUs=2" for n in self.nodes]
        configuration.write_text(
            CONFIGURATION.format(
                folder=folder,
                port=free_port(),
                nodes="\n".join(lines),
                grace=grace,
                # A job id that an earlier cluster gave would find that job's files in a run folder that stayed.
                first_job=int(time.time()) % 50_000_000 + 1000,
            )
        )
        paths = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        options = [
            f"--{name}{end}={path}"
            for (name, path), end in zip(paths.items(), ("", "-file", "-file", "-file"), strict=True)
        ]
        try:
            # --force: the folders of tests are closed to other users.
            self._start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *options)
            self.wait(paths["socket"].exists, "munged")
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.power_on(node)
            self.wait(
                lambda: self("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == ["idle"] * nodes, "the nodes"
            )
        except BaseException:
            self.stop()
            raise

    def __call__(self, *command: object, check: bool = False) -> str:
        """The output of a Slurm client."""
        done = subprocess.run(
            list(map(str, command)), env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def wait(self, condition, what: str, seconds: float = 400):
        """Wait until `condition()` is true, and return it."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
                tails = "".join(f"\n{path.name}: {path.read_text()[-1500:]}" for path in logs)
                raise AssertionError(f"waited {seconds} s for {what}; ended: {ended}{tails}")
            time.sleep(0.1)
        return found

    def job(self, id: str) -> dict[str, str]:
        """What slurmctld knows of a job: JobState, Restarts, ExitCode, NodeList, …"""
        return dict(field.partition("=")[::2] for field in self("scontrol", "show", "job", id, "-o").split(" "))

    def wait_for_job(self, id: str, *states: str, restarts: int = 0) -> dict[str, str]:
        def reached():
            job = self.job(id)
            return job if job.get("JobState") in states and int(job["Restarts"]) >= restarts else None

        return self.wait(reached, f"job {id} to be {' or '.join(states)}")

    def power_on(self, node: str) -> None:
        (self.folder / node).mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", node, key=node)

    def power_off(self, node: str, ranks: bool = True) -> None:
        """Kill the slurmd of a node at once, with every process of its jobs, or leaving these."""
        self.daemons.pop(node).kill()
        for pid in self.processes(node) if ranks else ():
            os.kill(pid, signal.SIGKILL)

    def processes(self, node: str = "", job: str = "", program: str = "") -> list[int]:
        """Processes of this cluster's jobs, known by their environment: of a node, of a job, of a program."""
        wanted = [f"SLURM_CONF={self.folder}/slurm.conf"]
        wanted += [f"{name}={value}" for name, value in (("SLURMD_NODENAME", node), ("SLURM_JOB_ID", job)) if value]
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if set(wanted) <= set(variables) and (folder / "comm").read_text().startswith(program):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def stop(self) -> None:
        self("scancel", "--state=RUNNING"), self("scancel", "--state=PENDING")
        for name in reversed(list(self.daemons)):
            self.daemons[name].terminate()
            try:
                self.daemons[name].wait(10)
            except subprocess.TimeoutExpired:
                self.daemons[name].kill()
        for pid in set(self.processes()) - {os.getpid()}:
            os.kill(pid, signal.SIGKILL)

    def _start(self, *command: str, key: str = "") -> None:
        # setpriv: the daemon dies with the test, even if that is killed.
        with open(self.folder / f"{key or command[0]}.out", "ab") as output:
            self.daemons[key or command[0]] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
