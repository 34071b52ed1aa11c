"""Shard sets behind URLs, on a real S3 server (moto), through a proxy that fails on demand."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launch import PROGRAMS, environment, free_port

from hmde_dist.command import InputError
from hmde_dist.corpus.tokenizer import load_tokenizer
from hmde_dist.stream import store as module
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.reader import GroupReader
from hmde_dist.stream.store import SCHEMES, ShardStore

CONTAINERS = ("mds", "wds")
BUCKET = "corpora"


class Proxy(socketserver.ThreadingTCPServer):
    """Between the tests and the server. It can refuse a number of connections, and hold back what the server sends."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, server: int):
        super().__init__(("127.0.0.1", 0), None)
        self.server_port, self.released = server, threading.Event()
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self):
        self.refused, self.cut_after, self.stall_after = 0, None, None
        self.released.set()
        self.released = threading.Event()
        self.gets: list[str] = []

    def finish_request(self, client, address):
        if self.refused:
            self.refused -= 1
            return
        with socket.create_connection(("127.0.0.1", self.server_port)) as server:
            threading.Thread(target=self._ask, args=(client, server), daemon=True).start()
            sent = 0
            while data := server.recv(1024):
                if self.stall_after is not None and sent + len(data) > self.stall_after:
                    self.released.wait(60)
                if self.cut_after is not None and sent + len(data) > self.cut_after:
                    self.cut_after = None
                    return
                client.sendall(data)
                sent += len(data)

    def handle_error(self, request, client_address):
        pass  # the client has gone

    def _ask(self, client, server):
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                self.gets += [path.decode().rpartition("/")[2] for path in re.findall(rb"GET (/\S+) ", data)]
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def remote():
    """`upload(folder, name)` -> URL, and the proxy that all reading goes through."""
    import boto3
    import streaming  # noqa: F401  heavy: once, before anything is forked

    port = free_port()
    server = subprocess.Popen(
        [PROGRAMS / "moto_server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch, Proxy(port) as proxy:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # of each of our attempts
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        client.create_bucket(Bucket=BUCKET)

        def upload(folder: Path, name: str) -> str:
            for path in filter(Path.is_file, folder.rglob("*")):
                client.upload_file(str(path), BUCKET, f"{name}/{path.relative_to(folder)}")
            return f"s3://{BUCKET}/{name}"

        yield SimpleNamespace(client=client, upload=upload, proxy=proxy)
        proxy.shutdown()
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def urls(remote, shards) -> dict[str, str]:
    return {container: remote.upload(shards(container), container) for container in CONTAINERS}


@pytest.fixture(scope="module")
def cold(urls, tmp_path_factory) -> Path:
    """A cache that has all of both sets but their shards."""
    cache = tmp_path_factory.mktemp("cold") / "cache"
    for url in urls.values():
        ShardIndex.open(url, cache)
    return cache


@pytest.fixture
def cache(cold, tmp_path) -> Path:
    return shutil.copytree(cold, tmp_path / "cache")


@pytest.fixture(autouse=True)
def quick(monkeypatch, remote):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    module._downloader.cache_clear()
    yield
    remote.proxy.reset()


@pytest.fixture(scope="module")
def uploaded(remote, shards) -> str:
    return remote.upload(shards("wds"), "changing")


@pytest.fixture
def changing(uploaded, remote, shards):
    """(URL, function that puts or deletes an object) of a set of four shards, restored afterwards."""
    changed = []

    def put(file: str, data: bytes | None):
        changed.append(file)
        if data is None:
            remote.client.delete_object(Bucket=BUCKET, Key=f"changing/{file}")
        else:
            remote.client.put_object(Bucket=BUCKET, Key=f"changing/{file}", Body=data)

    yield uploaded, put
    for file in set(changed):
        put(file, (shards("wds") / file).read_bytes())


def first_of(index: ShardIndex, shard: int) -> int:
    """The first group of a shard."""
    return int(np.searchsorted(index.columns["group_shard"], shard))


def names_in(folder: Path) -> set[str]:
    """Shards in a cache, and anything half-written, wherever it is."""
    found = {path.name for path in folder.rglob("*") if path.suffix in (".mds", ".tar") or "partial" in path.name}
    return found | {path.name for path in folder.rglob("*") if path.parent.name.endswith(".partial")}


def samples_of(index: ShardIndex, order=None) -> list[tuple]:
    reader = GroupReader(index)
    groups = range(index.groups) if order is None else order
    return [(sample.id, sample.tokens.tolist()) for sample in (reader[group] for group in groups)]


def downloader(download: Callable[[str, str], None]):
    """In place of `module._downloader`: one that does this."""

    @functools.lru_cache
    def make(*_):
        return SimpleNamespace(download=download)

    return make


@pytest.fixture
def die(monkeypatch):
    """A function after which the remote is gone."""

    def end():
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        module._downloader.cache_clear()

    return end


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_set_behind_a_url_reads_like_the_folder(container, urls, shards, tmp_path):
    local = ShardIndex.open(shards(container))
    index = ShardIndex.open(urls[container], tmp_path)
    assert (index.is_remote, local.is_remote) == (True, False)
    assert (index.hash, index.groups, index.languages) == (local.hash, local.groups, local.languages)
    assert all(np.array_equal(index.columns[name], column) for name, column in local.columns.items())
    assert (
        load_tokenizer(index.folder / "tokenizer").get_vocab() == load_tokenizer(local.folder / "tokenizer").get_vocab()
    )
    assert names_in(tmp_path) == set()
    assert samples_of(index) == samples_of(local)
    assert names_in(tmp_path) == {entry["name"] for entry in local.manifest["shards"]}


def test_only_the_shard_that_is_read_is_fetched(urls, cache):
    index = ShardIndex.open(urls["mds"], cache)
    GroupReader(index)[first_of(index, 2)]
    assert names_in(cache) == {"shard.00002.mds"}


def test_a_url_may_come_as_a_path_or_end_with_a_slash(urls, cache):
    folders = {ShardStore.of(source, cache).folder for source in (urls["mds"], Path(urls["mds"]), urls["mds"] + "/")}
    assert len(folders) == 1


def test_what_is_cached_is_not_fetched_again(urls, cache, remote):
    samples_of(ShardIndex.open(urls["mds"], cache))
    remote.proxy.gets.clear()
    samples_of(ShardIndex.open(urls["mds"], cache))
    assert remote.proxy.gets == ["manifest.json"]


def test_a_cached_file_that_is_cut_off_is_fetched_again(urls, shards, cache):
    index = ShardIndex.open(urls["wds"], cache)
    samples_of(index)
    for name in ("shard-00001.tar", "columns/category.npy"):
        os.truncate(index.folder / name, 100)
    again = ShardIndex.open(urls["wds"], cache)
    assert samples_of(again) == samples_of(ShardIndex.open(shards("wds")))


def test_a_cached_file_that_is_damaged_is_named_with_the_way_out(urls, cache):
    index = ShardIndex.open(urls["wds"], cache)
    reader = GroupReader(index)
    reader[0]
    path = index.folder / "shard-00000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=f"^{path}: sample 0 is damaged .*delete it, and it is downloaded again$"):
        reader[0]
    path.unlink()
    assert reader[0].id


def test_importing_and_reading_leave_nothing_in_shared_memory_and_temporary_folders(urls, cache, tmp_path):
    code = (
        "import sys; from hmde_dist.stream.reader import *; index = ShardIndex.open(sys.argv[1], sys.argv[2]); "
        "reader = GroupReader(index); [reader[group] for group in range(index.groups)]"
    )
    (tmp_path / "temporary").mkdir()
    env = environment(TMPDIR=str(tmp_path / "temporary"))
    subprocess.run([sys.executable, "-c", code, urls["mds"], str(cache)], env=env, check=True, timeout=120)
    assert list((tmp_path / "temporary").iterdir()) == []
    # Other names in there may be of other programs.
    assert [path for path in Path("/dev/shm").glob("*") if re.match(r"\d{6}_", path.name)] == []


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///data/shards", r"s3://, .* or a local folder, which is given by its path"),
        ("http://host/shards", r"shards are read from .*s3://"),
        ("pipe:/bin/cat x", r"shards are read from .*s3://"),
        ("s3://bucket/shards?versionId=3", r"without \? and #"),
        ("s3://", "not a URL of a folder"),
        ("sftp://me:secret@host/shards", r"^sftp://…: a password in a URL"),
    ],
)
def test_other_urls_are_refused(url, message, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        ShardIndex.open(url, tmp_path)
    assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_url_needs_a_cache(urls):
    with pytest.raises(InputError, match=r"^s3://corpora/mds: name a local folder in data\.cache"):
        ShardIndex.open(urls["mds"])


def test_a_cache_that_cannot_be_written_is_named(urls, cache):
    (cache / "file").touch()
    with pytest.raises(InputError, match=r"file/cache: not usable as a cache .*data\.cache"):
        ShardIndex.open(urls["mds"], cache / "file" / "cache")


def test_streaming_has_a_downloader_for_every_scheme():
    from streaming.base.storage.download import DOWNLOADER_MAPPINGS

    assert set(SCHEMES) < set(DOWNLOADER_MAPPINGS)
    for scheme in SCHEMES:
        DOWNLOADER_MAPPINGS[scheme]()


def test_a_name_that_leads_out_of_the_cache_is_refused(changing, shards, tmp_path):
    url, put = changing
    manifest = json.loads((shards("wds") / "manifest.json").read_text(encoding="utf-8"))
    manifest["columns"][0]["name"] = "../../escaped.npy"
    put("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(InputError, match=rf"^{url}/manifest\.json: damaged or not ours \(names of its files\)"):
        ShardIndex.open(url, tmp_path)
    assert not any("escaped" in path.name for path in tmp_path.parent.rglob("*"))


def test_no_shard_set_at_the_url(remote, tmp_path):
    with pytest.raises(
        InputError, match=r"^s3://corpora/none/manifest\.json: cannot be downloaded in 2 attempts \(not"
    ):
        ShardIndex.open(f"s3://{BUCKET}/none", tmp_path)
    assert names_in(tmp_path) == set()


def test_a_set_without_fingerprints_of_its_tokenizer_is_refused(changing, shards, tmp_path):
    url, put = changing
    manifest = json.loads((shards("wds") / "manifest.json").read_text(encoding="utf-8"))
    del manifest["tokenizer_files"]
    put("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(InputError, match=f"^{url}: the manifest lists no tokenizer files; rebuild"):
        ShardIndex.open(url, tmp_path)


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [
        ("shard-00001.tar", None, r"its SHA-256 is not that in the manifest"),
        ("shard-00001.tar", -1, r"\d+ bytes, the manifest says \d+"),
        ("columns/group_row.npy", None, r"its SHA-256 is not that in the manifest"),
        ("tokenizer/tokenizer.json", -1, r"\d+ bytes, the manifest says \d+"),
    ],
)
def test_an_object_that_is_not_what_the_manifest_says_is_one_clear_line(
    file, size, message, changing, shards, tmp_path
):
    url, put = changing
    data = (shards("wds") / file).read_bytes()
    put(file, data[:-1] if size else data[:-1] + b"x")
    with pytest.raises(
        InputError, match=rf"^{url}/{file}: cannot .* in 5 attempts \({message}\); .*upload it again"
    ) as e:
        samples_of(ShardIndex.open(url, tmp_path))
    assert "\n" not in str(e.value)
    assert not any(path.name == Path(file).name or "partial" in path.name for path in tmp_path.rglob("*"))


# ---- a remote that fails ---------------------------------------------------------------------------------------------


def test_a_missing_shard_is_asked_for_twice(changing, tmp_path, remote):
    url, put = changing
    index = ShardIndex.open(url, tmp_path)
    put("shard-00001.tar", None)
    reader = GroupReader(index)
    assert reader[0].id
    with pytest.raises(
        InputError, match=rf"^{url}/shard-00001\.tar: cannot be downloaded in 2 attempts \(not there, or"
    ):
        reader[first_of(index, 1)]


def test_a_remote_that_fails_for_a_while_is_waited_for(urls, shards, cache, remote):
    remote.proxy.refused = 3
    index = ShardIndex.open(urls["mds"], cache)
    remote.proxy.refused = 4
    assert samples_of(index) == samples_of(ShardIndex.open(shards("mds")))


def test_a_transfer_that_breaks_off_is_begun_again(urls, shards, cache, remote):
    index = ShardIndex.open(urls["mds"], cache)
    remote.proxy.cut_after = 10_000
    assert samples_of(index) == samples_of(ShardIndex.open(shards("mds")))
    assert remote.proxy.cut_after is None


def test_a_dead_remote_is_one_clear_line_and_what_is_cached_stays_readable(urls, cache, die):
    index = ShardIndex.open(urls["mds"], cache)
    reader = GroupReader(index)
    reader[0]
    die()
    with pytest.raises(
        InputError, match=r"^s3://corpora/mds/shard\.00001\.mds: cannot .* in 5 attempts \(\w+: .*\)"
    ) as e:
        reader[first_of(index, 1)]
    assert "\n" not in str(e.value)
    assert reader[0].id
    assert names_in(cache) == {"shard.00000.mds"}
    with pytest.raises(InputError, match=r"^s3://corpora/mds/manifest\.json: cannot be downloaded in 5 attempts"):
        ShardIndex.open(urls["mds"], cache)


def test_attempts_end_within_twenty_seconds():
    """Without the time that each takes; `quick` has shortened the first wait for the other tests."""
    assert 0.5 * (2 ** (module.ATTEMPTS - 1) - 1) < 20


def _errors_of_other_stores():
    from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
    from google.api_core.exceptions import Forbidden, NotFound, ServiceUnavailable
    from huggingface_hub.errors import EntryNotFoundError
    from oci.exceptions import ServiceError
    from requests import Response

    def of(error, status):
        response = Response()
        response.status_code = status
        return error(response=response) if error is not EntryNotFoundError else error("message", response=response)

    return [
        (NotFound("x"), 2), (Forbidden("x"), 2), (of(ResourceNotFoundError, 404), 2), (of(EntryNotFoundError, 404), 2),
        (ServiceError(404, "ObjectNotFound", {}, "x"), 2), (FileNotFoundError(2, "no such file"), 2),
        (ServiceUnavailable("x"), 5), (of(HttpResponseError, 503), 5), (ServiceError(500, "x", {}, "x"), 5),
        (ConnectionResetError(104, "reset"), 5), (ValueError("no credentials\n at all"), 5),
    ]  # fmt: skip


def test_all_stores_say_in_their_way_that_there_is_no_such_object(tmp_path, monkeypatch):
    for error, attempts in _errors_of_other_stores():

        def fail(url, local, error=error):
            raise error

        monkeypatch.setattr(module, "_downloader", downloader(fail))
        with pytest.raises(InputError, match=rf"in {attempts} attempts \((not there|\w+: .*)") as refused:
            ShardStore.of("gs://bucket/shards", tmp_path)
        assert "\n" not in str(refused.value)


def test_a_remote_that_only_lets_wait_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)

    def fail(url, local):
        time.sleep(0.08)
        raise TimeoutError("timed out")

    monkeypatch.setattr(module, "_downloader", downloader(fail))
    with pytest.raises(InputError, match=r"cannot be downloaded in 2 attempts \(TimeoutError: timed out\)"):
        ShardStore.of("gs://bucket/shards", tmp_path)


def test_a_downloader_that_brings_nothing_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_downloader", downloader(lambda url, local: None))
    with pytest.raises(InputError, match=r"manifest\.json: cannot be downloaded in 2 attempts \(not there"):
        ShardStore.of("gs://bucket/shards", tmp_path)


# ---- the cache -------------------------------------------------------------------------------------------------------


def read_with_small_files(index: ShardIndex) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    GroupReader(index)[0]


def test_a_disk_without_room_is_one_clear_line_and_leaves_nothing(urls, cache):
    """A limit on the size of files, which the kernel answers as it answers a full disk."""
    index = ShardIndex.open(urls["mds"], cache)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        with pytest.raises(InputError, match=rf"^{cache}: no room in the cache .*data\.cache_limit_gib.*data\.cache$"):
            pool.submit(read_with_small_files, index).result()
    assert names_in(cache) == set()


def test_a_full_disk_is_not_tried_again_however_the_client_wraps_it(urls, cache, monkeypatch):
    index, tried = ShardIndex.open(urls["mds"], cache), []

    def fail(url, local):
        tried.append(url)
        Path(local + ".tmp").write_bytes(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("download failed") from error

    monkeypatch.setattr(module, "_downloader", downloader(fail))
    with pytest.raises(InputError, match=rf"^{cache}: no room in the cache \(No space left on device\)"):
        GroupReader(index)[0]
    assert (len(tried), names_in(cache)) == (1, set())


def test_the_least_recently_used_shards_are_evicted(urls, shards, cache):
    sizes = [entry["bytes"] for entry in ShardIndex.open(shards("wds")).manifest["shards"]]
    index = ShardIndex.open(urls["wds"], cache, sizes[0] + max(sizes))
    reader = GroupReader(index)

    def read(shard):
        time.sleep(0.02)  # coarser than the clock of any file system
        reader[first_of(index, shard)]
        return {int(name[6:11]) for name in names_in(cache)}

    assert [read(shard) for shard in (0, 1, 0, 2, 0, 3)] == [{0}, {0, 1}, {0, 1}, {0, 2}, {0, 2}, {0, 3}]
    assert samples_of(index) == samples_of(ShardIndex.open(shards("wds")))
    ShardIndex.open(urls["wds"], cache, 1)  # columns and tokenizer are no shards
    assert {path.name for path in index.folder.iterdir()} >= {"columns", "tokenizer", "manifest.json"}
    assert len(list((index.folder / "columns").glob("[!.]*.npy"))) == len(index.columns)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_limit_smaller_than_a_shard_keeps_the_one_that_is_read(container, urls, shards, cache):
    index = ShardIndex.open(urls[container], cache, 1)
    assert samples_of(index) == samples_of(ShardIndex.open(shards(container)))
    assert len(names_in(cache)) == 1
    assert (index.folder / "index.json").exists() == (container == "mds")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_never_written_to_or_deleted_from(container, kind, shards, tmp_path):
    """mosaicml-streaming's own cache limit may evict the only copy of a set (its issue 988)."""
    source = shutil.copytree(shards(container), tmp_path / "source")
    # The set of a user may lie in the folder of the cache, too.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    index = ShardIndex.open(kind(source), tmp_path, 1)
    reader = GroupReader(index)
    reader.prefetch(np.arange(index.groups))
    assert len(samples_of(index)) == index.groups
    for number, entry in enumerate(index.manifest["shards"]):
        index.store.path(entry)
        index.store._evict(source / entry["name"])
        reader[first_of(index, number)]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_set_that_changed_at_its_url_does_not_meet_the_old_one(remote, shards, tmp_path):
    url = remote.upload(shards("mds"), "changed")
    old = ShardIndex.open(url, tmp_path)
    GroupReader(old)[0]
    remote.upload(shards("mds", "validation"), "changed")
    new = ShardIndex.open(url, tmp_path)
    assert new.folder != old.folder
    assert samples_of(new) == samples_of(ShardIndex.open(shards("mds", "validation")))
    # Who goes on with the old one gets old shards or an error, never new ones.
    assert samples_of(old, [0]) == samples_of(ShardIndex.open(shards("mds")), [0])
    (old.folder / "shard.00000.mds").unlink()
    with pytest.raises(InputError, match=r"shard\.00000\.mds: cannot .* the manifest says"):
        GroupReader(old)[0]


# ---- several processes -----------------------------------------------------------------------------------------------


def open_and_read(url: str, cache: Path, limit: int | None, seed: int) -> list[tuple]:
    index = ShardIndex.open(url, cache, limit)
    order = np.random.default_rng(seed).permutation(index.groups).tolist()
    samples = dict(zip(order, samples_of(index, order), strict=True))
    return [samples[group] for group in range(index.groups)]


def in_processes(count: int, *args) -> list:
    with ProcessPoolExecutor(count, mp_context=get_context("fork")) as pool:
        return [future.result() for future in [pool.submit(open_and_read, *args, seed) for seed in range(count)]]


@pytest.mark.parametrize("container", CONTAINERS)
def test_processes_that_share_a_cache_fetch_everything_once(container, urls, shards, cache, remote):
    remote.proxy.gets.clear()
    read = in_processes(3, urls[container], cache / "new", None)
    expected = samples_of(ShardIndex.open(shards(container)))
    assert all(samples == expected for samples in read)
    once = [name for name in remote.proxy.gets if name != "manifest.json"]
    assert len(once) == len(set(once)) >= 4 + 11


@pytest.mark.parametrize("container", CONTAINERS)
def test_processes_that_evict_each_others_shards_read_on(container, urls, shards, cache, remote):
    local = ShardIndex.open(shards(container))
    limit = 2 * max(entry["bytes"] for entry in local.manifest["shards"])
    assert all(samples == samples_of(local) for samples in in_processes(2, urls[container], cache, limit))
    assert sum(path.stat().st_size for name in names_in(cache) for path in cache.rglob(name)) <= limit
    assert not any("partial" in name for name in names_in(cache))


def test_a_shard_that_vanishes_again_and_again_names_the_setting(urls, cache, monkeypatch):
    index = ShardIndex.open(urls["wds"], cache, 1)
    path = ShardStore.path

    def evicted(self, entry, parent=""):
        found = path(self, entry, parent)
        found.unlink()
        return found

    monkeypatch.setattr(ShardStore, "path", evicted)
    with pytest.raises(InputError, match=r"evicted from the cache before .*data\.cache_limit_gib"):
        GroupReader(index)[0]


@pytest.fixture(scope="module")
def large(remote) -> tuple[str, dict]:
    """(URL, entry) of a shard so large that S3's client writes it in several pieces."""
    data = np.random.default_rng(0).bytes(1 << 20)
    for name, body in {"manifest.json": b"{}", "large.tar": data}.items():
        remote.client.put_object(Bucket=BUCKET, Key=f"large/{name}", Body=body)
    entry = {"name": "large.tar", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return f"s3://{BUCKET}/large", entry


@pytest.mark.parametrize("waiting", [False, True], ids=["later", "waiting"])
def test_what_a_killed_process_left_is_no_shard(waiting, large, tmp_path, remote):
    url, entry = large
    store = ShardStore.of(url, tmp_path)
    half = store.folder / ".large.tar.partial"
    remote.proxy.stall_after = 700_000
    context = get_context("fork")
    victim = context.Process(target=store.path, args=(entry,))
    victim.start()
    wait_for(lambda: half.exists() and any(path.stat().st_size > 500_000 for path in half.iterdir()))
    remote.proxy.stall_after = None
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        if waiting:
            other = pool.submit(store.path, entry)
            time.sleep(0.3)
            assert not other.done()
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert waiting or (half.exists() and not (store.folder / "large.tar").exists())
        path = other.result(30) if waiting else store.path(entry)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert not half.exists()


def test_opening_leaves_the_downloads_of_living_processes_alone(urls, cache):
    """And removes what those that were killed have left."""
    index = ShardIndex.open(urls["wds"], cache)
    half = index.folder / ".shard-00000.tar.partial"
    half.mkdir()
    (half / "shard-00000.tar.5f3A").touch()
    with open(index.folder / ".shard-00000.tar.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ShardIndex.open(urls["wds"], cache)
        assert half.exists()
    ShardIndex.open(urls["wds"], cache)
    assert not half.exists()


# ---- ahead of reading ------------------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_prefetched_shards_come_in_the_order_asked_for(urls, cache, remote):
    index = ShardIndex.open(urls["wds"], cache)
    reader = GroupReader(index)
    reader[first_of(index, 3)]
    remote.proxy.gets.clear()
    groups = np.array([first_of(index, shard) for shard in (2, 3, 0, 2, 1)])
    for _ in range(3):
        reader.prefetch(groups)
    wait_for(lambda: len(names_in(cache)) == 4 and not any("partial" in name for name in names_in(cache)))
    assert remote.proxy.gets == ["shard-00002.tar", "shard-00000.tar", "shard-00001.tar"]


def prefetch_and_wait(reader: GroupReader) -> int:
    reader.prefetch(np.arange(reader.index.groups))
    wait_for(lambda: all(reader.index.store.has(entry) for entry in reader.index.manifest["shards"]))
    return threading.active_count()


def test_a_forked_process_prefetches_by_itself(urls, cache):
    index = ShardIndex.open(urls["wds"], cache)
    reader = GroupReader(index)
    reader.prefetch(np.array([0]))
    context = get_context("fork")
    child = context.Process(target=prefetch_and_wait, args=(reader,))
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_what_cannot_be_prefetched_is_reported_when_it_is_read(urls, cache, die):
    index = ShardIndex.open(urls["wds"], cache)
    reader = GroupReader(index)
    die()
    reader.prefetch(np.array([0]))
    wait_for(lambda: not reader._prefetcher[2])
    with pytest.raises(InputError, match=r"shard-00000\.tar: cannot be downloaded in 5 attempts"):
        reader[0]


def test_what_was_evicted_can_be_prefetched_again(urls, cache):
    index = ShardIndex.open(urls["wds"], cache, 1)
    reader = GroupReader(index)
    for shard in (0, 1, 0):
        reader.prefetch(np.array([first_of(index, shard)]))
        wait_for(lambda shard=shard: names_in(cache) == {f"shard-{shard:05d}.tar"})


def test_prefetching_never_waits(urls, cache, monkeypatch, remote):
    """More shards than the queue takes are left out, and asked for again later."""
    monkeypatch.setattr("hmde_dist.stream.reader.PREFETCHED_SHARDS", 1)
    index = ShardIndex.open(urls["wds"], cache)
    reader = GroupReader(index)
    remote.proxy.stall_after = 10_000
    began = time.monotonic()
    for _ in range(10):
        reader.prefetch(np.arange(index.groups))
    assert time.monotonic() - began < 2
    assert len(reader._prefetcher[2]) <= 2
