"""Where the files of a shard set come from: a local folder, or a URL through a cache on local disk.

A folder is used in place: nothing in it is ever written or deleted. A file behind a URL is downloaded by
mosaicml-streaming into a folder beside its place, checked against the size and SHA-256 that the manifest states, and
only then moved to its place. This happens under a lock of each file, so that all processes of a node, of any number of
jobs, may share a cache, and what a killed process left is never taken for a file. The cache of a set is named after
URL and manifest: files of a set that changed at its URL do not meet the old ones.

Refuses URLs of other kinds than `SCHEMES`, and every file that is not what the manifest states.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmde_dist.command import InputError, output_file

# Of the downloaders of mosaicml-streaming, those whose client libraries it brings along.
SCHEMES = ("azure", "azure-dl", "gs", "hf", "oci", "s3", "sftp")
ATTEMPTS = 5
MISSING_ATTEMPTS = 2  # an object store may show a new object late, but no later than this
FIRST_WAIT_S = 0.5  # doubled after each attempt: 7.5 s in all
PATIENCE_S = 120  # a remote that does not even refuse runs into the time limits of the clients: no attempt after this
WHOLE_SET = ("manifest.json", "index.json")  # files beside the shards, which stay as long as the cache

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MISSING = {"403", "404", "NoSuchBucket", "NoSuchKey"}


@dataclass(frozen=True)
class ShardStore:
    """The files of one shard set. Holds no state, so it may be forked and pickled.

    Attributes:
        folder: the shard set as a local folder; behind a URL, as much of it as is cached.
        url: where missing files come from; None: `folder` is the shard set itself.
        cache_limit: bytes of shards to keep; those being downloaded come on top. None: all.
    """

    folder: Path
    url: str | None = None
    cache_limit: int | None = None

    @classmethod
    def of(cls, source: str | Path, cache: Path | None = None, cache_limit: int | None = None) -> "ShardStore":
        """The store of the shard set at `source`, a folder or a URL; the manifest of a URL is downloaded anew.

        Args:
            cache: the folder that holds the caches of shard sets; needed for URLs only, as is `cache_limit`.

        Raises:
            InputError: no such URL, a URL without a cache, or a cache that cannot be written.
        """
        # A URL that went through `Path` has lost a slash.
        match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(source), re.DOTALL)
        if not match:
            return cls(Path(source))
        scheme, rest = match[1].lower(), match[2].rstrip("/")
        if scheme not in SCHEMES:
            raise InputError(
                f"{source}: shards are read from {', '.join(f'{name}://' for name in SCHEMES)} or a local folder, which "
                "is given by its path"
            )
        if re.match(r"[^/@]*:[^/@]*@", rest):
            raise InputError(f"{scheme}://…: a password in a URL ends in logs; use a key file or the environment")
        if not re.fullmatch(r"[^?#\x00-\x1f]+", rest):
            raise InputError(f"{source}: not a URL of a folder; write it as {scheme}://bucket/folder, without ? and #")
        url = f"{scheme}://{rest}"
        if cache is None:
            raise InputError(f"{url}: name a local folder in data.cache, for shards behind a URL are copied there")
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        with _usable(Path(cache)):
            latest = Path(cache).absolute() / f"{name}.json"
            latest.parent.mkdir(parents=True, exist_ok=True)
            with _locked(latest):
                _fetch(f"{url}/manifest.json", latest)
                manifest = latest.read_bytes()
            folder = latest.with_name(f"{name}-{hashlib.sha256(manifest).hexdigest()[:16]}")
            if not (folder / "manifest.json").exists():
                with output_file(folder / "manifest.json", "wb") as file:
                    file.write(manifest)
            _sweep(folder)
        return cls(folder, url, cache_limit)

    def path(self, entry: dict, parent: str = "") -> Path:
        """The local path of a file of the manifest, downloaded if need be. It is now the last of the files to be evicted.

        A shard may be evicted by another process at any time, which does not harm those who have it open.

        Args:
            entry: its `name`, `bytes` and `sha256`.
            parent: the folder it lies in, "" for shards.

        Raises:
            InputError: the remote cannot be read, holds another file, or the cache has no room.
        """
        path = self.folder / parent / entry["name"]
        if self.url is None or _touch(path, entry["bytes"]):
            return path
        with _usable(self.folder.parent):
            path.parent.mkdir(exist_ok=True)
            with _locked(path):
                if not _touch(path, entry["bytes"]):  # else another process has brought it meanwhile
                    _fetch("/".join(filter(None, (self.url, parent, entry["name"]))), path, entry)
            if not parent and entry["name"] not in WHOLE_SET:
                self._evict(path)
        return path

    def has(self, entry: dict) -> bool:
        """Whether a shard can be had without a download."""
        return self.url is None or (self.folder / entry["name"]).exists()

    def _evict(self, keep: Path) -> None:
        """Delete the least recently used shards beyond the limit of the cache, but not `keep`."""
        if self.url is None or self.cache_limit is None:
            return
        with _locked(self.folder / "eviction"):
            facts = [
                (file.stat().st_mtime_ns, file.stat().st_size, file.name)
                for file in os.scandir(self.folder)
                if file.is_file() and not file.name.startswith(".") and file.name not in WHOLE_SET
            ]
            total = sum(size for _, size, _ in facts)
            for _, size, name in sorted(facts):
                if total > self.cache_limit and name != keep.name:
                    (self.folder / name).unlink(missing_ok=True)
                    total -= size


@contextlib.contextmanager
def _usable(cache: Path) -> Iterator[None]:
    """Turn what the file system says of the cache into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise InputError(
                f"{cache}: no room in the cache ({error.strerror}); free some, lower data.cache_limit_gib, or name a "
                "larger disk in data.cache"
            ) from None
        raise InputError(f"{cache}: not usable as a cache ({error}); name another folder in data.cache") from None


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, across processes and threads; False if somebody else does and `wait` is not wanted.

    The lock file stays: were it deleted, two could hold the lock, one of a file that has no name any more.
    """
    with open(path.with_name(f".{path.name}.lock"), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            # Closing is not enough: a process that was forked meanwhile has the same lock open.
            fcntl.flock(file, fcntl.LOCK_UN)


def _aside(path: Path) -> Path:
    """The folder in which the file is made: downloaders have temporary files of their own there, under any name."""
    return path.with_name(f".{path.name}.partial")


def _sweep(folder: Path) -> None:
    """Remove what killed processes left under `folder`."""
    for aside in folder.rglob(".*.partial"):
        with _locked(aside.with_name(aside.name[1 : -len(".partial")]), wait=False) as mine:
            if mine:
                shutil.rmtree(aside, ignore_errors=True)


def _touch(path: Path, size: int) -> bool:
    """Mark the file as just used (access times are not kept everywhere); False if it is not there in full."""
    try:
        os.utime(path)
        return path.stat().st_size == size
    except OSError:
        return False


def _fetch(url: str, path: Path, entry: dict | None = None) -> None:
    """Download `url` to `path`, all or nothing; its lock is held. `entry` says what it must be."""
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        _download(url, aside / path.name, entry)
        (aside / path.name).replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@functools.lru_cache(maxsize=8)
def _downloader(host: str, process: int, thread: int) -> Any:
    """mosaicml-streaming's downloader for URLs of a host: to make one takes longer than to download a small file.

    Each process and thread has its own, for the clients in them may be shared by neither.
    """
    from streaming.base.storage import CloudDownloader  # heavy: only where there is a URL

    return CloudDownloader.get(host)


def _download(url: str, path: Path, entry: dict | None) -> None:
    """Download and check `url`, trying again as often as may help.

    Raises:
        InputError: the last reason why it did not work.
        OSError: no room.
    """
    began, wait = time.monotonic(), FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        missing = False
        try:
            host = "/".join(url.split("/")[:3])
            _downloader(host, os.getpid(), threading.get_ident()).download(url, str(path))
            if not path.exists():  # the client for gs:// swallows some errors
                raise FileNotFoundError(url)
            problem = _check(path, entry)
            if not problem:
                return
            way_out = "the shard set there is damaged or was replaced: upload it again, then start again"
        except Exception as error:  # what the clients of object stores raise has no common type
            _downloader.cache_clear()  # the next attempt begins with new connections and credentials
            for cause in _causes(error):
                if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                    raise cause from None
            missing = _is_missing(error)
            problem = "not there, or not to be read with these credentials" if missing else _one_line(error)
            way_out = "check the URL, the network and the credentials"
        path.unlink(missing_ok=True)
        if attempt == (MISSING_ATTEMPTS if missing else ATTEMPTS) or time.monotonic() - began > PATIENCE_S:
            break
        time.sleep(wait)
        wait *= 2
    raise InputError(f"{url}: cannot be downloaded in {attempt} attempts ({problem}); {way_out}")


def _check(path: Path, entry: dict | None) -> str:
    """What is wrong with a downloaded file; it is on the disk when nothing is."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if entry and size != entry["bytes"]:
            return f"{size} bytes, the manifest says {entry['bytes']}"
        if entry and hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            return "its SHA-256 is not that in the manifest"
        # Or a crash of the machine might leave the name and the size, but not the bytes.
        os.fsync(file.fileno())
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_missing(error: Exception) -> bool:
    """Whether a client says that there is no such object, or that it is not for us: waiting hardly helps."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        codes = {response.get("Error", {}).get("Code")}
    else:  # Azure, Google, Oracle, Hugging Face
        codes = {getattr(response, "status_code", None)}
        codes |= {getattr(error, name, None) for name in ("code", "status", "status_code")}
    return isinstance(error, FileNotFoundError) or not _MISSING.isdisjoint(map(str, codes))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
