"""What every command of the project shares: exit codes, one-line errors, all-or-nothing outputs, progress.

Owns the promise that bad input ends with one clear line and exit code 2 and leaves nothing half-written.
Knows nothing of documents, models or ranks.
"""

import argparse
import atexit
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

# Of threads only. tqdm's own lock is of processes, too: one that is killed while it draws its bar would block the others.
tqdm.set_lock(threading.RLock())

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75

was_a_rank = False  # whether this process has joined others; see `run_command`


class InputError(ValueError):
    """Bad input or configuration: the message names the file, line or setting and the way out."""


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that is no fault of the code: the message says what was kept."""


def run_command(main: Callable[[], int | None], patience: float = 0.0) -> None:
    """Run `main` and exit: its return value (None = 0), or one line on stderr for an `InputError` (2), a `RunError` (1) or
    an interrupt (1).

    Args:
        patience: seconds to wait before the line is printed.
    """
    try:
        code = main() or DONE
    except (InputError, RunError) as error:
        time.sleep(patience)
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = BAD_INPUT if isinstance(error, InputError) else FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if not was_a_rank:
        sys.exit(code)
    # Threads of torch and gloo that are still there while the interpreter takes itself apart abort the process now and then
    # ("terminate called without an active exception"): a finished run would look failed. So it ends as multiprocessing's do.
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(code)


def argument_parser(description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with an example that can be copied."""
    return argparse.ArgumentParser(
        description=description,
        epilog="example:\n  " + example.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A progress bar with rate and time left: live on a terminal, a line every half minute in a log."""
    return tqdm(iterable, mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True, **options)


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1 (for `add_argument(type=...)`)."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


@contextlib.contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears at `path` only when the block ends well.

    The block writes to a hidden sibling, which is renamed at the end and removed on any error.

    Raises:
        InputError: something non-empty is at `path` already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not empty: remove it or name another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path}: cannot be created ({error.strerror}: {error.filename})") from None
    try:
        partial.chmod(0o755)
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def remove_partials(folder: Path) -> None:
    """Remove what `output_folder` and `output_file` left in `folder` when their process was killed."""
    for path in folder.glob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def output_file(path: str | Path, mode: str = "w", **open_options) -> Iterator:
    """An open file that appears at `path` only when the block ends well (write aside, sync, rename)."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    if "b" not in mode:
        open_options.setdefault("encoding", "utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(partial, mode, **open_options)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}: {error.filename})") from None
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def code_commit() -> str:
    """The git commit of the code that runs, "" where there is none; a snapshot of the code bears it in a file."""
    root = Path(__file__).parent.parent
    if (root / "commit").is_file():
        return (root / "commit").read_text(encoding="utf-8")
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""  # no git on this node
