"""Ranks that are forked from one process that has imported everything, so that a job starts in a second.

Run as a program it is that process: it reads one JSON command a line and answers with one line. `Forks` is the test's side.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

GRACE = 2.0  # seconds that the other ranks have when one has failed, as with a launcher


@dataclass
class Job:
    """Ranks that run.

    Attributes:
        pids: of the ranks, each the leader of its own process group, with its loader workers.
        folder: of their output.
    """

    number: int
    pids: list[int]
    folder: Path


@dataclass
class Ended:
    codes: list[int]  # of the ranks; negative: the signal
    output: str  # of all ranks, one after the other


class Forks:
    """Starts jobs of forked ranks; made once a test process (fixture `forks`)."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.folder, self.number = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            start_new_session=True,
        )

    def _ask(self, **command) -> dict:
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server of forks has ended"
        return json.loads(answer)

    def start(self, ranks: int, recipe: Path, *overrides: str, patch: str = "") -> Job:
        """Start `train.py RECIPE overrides` on `ranks` ranks; `patch` is Python that each runs first (`rank`, `train`)."""
        from launch import free_port

        self.number += 1
        folder = self.folder / str(self.number)
        folder.mkdir()
        overrides = ("engine.self_test=false", *overrides)  # has tests of its own
        pids = self._ask(
            do="start",
            ranks=ranks,
            port=free_port(),
            argv=["train.py", str(recipe), *overrides],
            patch=patch,
            folder=str(folder),
        )["pids"]
        return Job(self.number, pids, folder)

    def wait(self, job: Job, seconds: float = 150) -> Ended:
        """Wait until all ranks have ended; when one fails the others follow, as under a launcher."""
        codes = self._ask(do="wait", pids=job.pids, seconds=seconds)["codes"]
        output = "".join((job.folder / f"{rank}.txt").read_text(errors="replace") for rank in range(len(codes)))
        return Ended(codes, output)

    def train(self, ranks: int, recipe: Path, *overrides: str, patch: str = "") -> Ended:
        return self.wait(self.start(ranks, recipe, *overrides, patch=patch))

    def run(self, ranks: int, program: str) -> Ended:
        """Run Python on ranks that may join a process group, without any training; modules of tests can be imported."""
        tests = Path(__file__).parent
        path = f"import sys\nsys.path[:0] = {[str(tests), str(tests / 'objectives')]!r}\n"
        return self.train(ranks, Path(), patch=f"{path}{program}\nraise SystemExit(0)")

    def close(self) -> None:
        from launch import end_tree

        end_tree(self.server.pid)
        self.server.wait()


def kill(pid: int) -> None:
    """SIGKILL to a rank and its loader workers."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _start(command: dict) -> list[int]:
    pids = []
    for rank in range(command["ranks"]):
        pid = os.fork()
        if pid:
            os.setpgid(pid, pid)
            pids.append(pid)
            continue
        output = os.open(Path(command["folder"]) / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        size = str(command["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(command["port"]))
        sys.argv = command["argv"]
        from hmde_dist import command as house
        from hmde_dist import train

        code = 1
        try:
            exec(command["patch"], {"rank": rank, "train": train})
            house.run_command(train.main)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def _wait(pids: list[int], seconds: float) -> list[int]:
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                kill(pid)  # its workers
                if codes[pid]:
                    until = min(until, time.monotonic() + GRACE)
        if time.monotonic() > until:
            for pid in set(pids) - set(codes):
                kill(pid)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def main() -> None:
    import deepspeed.ops
    import streaming.base.format  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    import hmde_dist.train  # noqa: F401

    _ = deepspeed.ops.__compatible_ops__  # found out at first use

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "start":
            answer = {"pids": _start(command)}
        else:
            answer = {"codes": _wait(command["pids"], command["seconds"])}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
