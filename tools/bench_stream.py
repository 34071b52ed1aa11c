"""How fast do packed batches come from shards? This project's loader beside mosaicml-streaming's and webdataset's own.

All read the same shards, draw two documents of each group, decode them with `decode_group` and pack them with `pack`, in
the same number of processes. What differs is how each finds and orders samples: this project's loader has its plan
(global order, weighed languages, category neighbours), streaming's a global shuffle, webdataset's the shards in order
through a buffer. Each measurement is a fresh process, the systems take turns in rounds, and the first batches are not
counted.

With --remote the sets are also read from an S3 server (moto) that runs in this process: the server is the bottleneck
there, so a cold cache shows that reading works and what it costs to wait, not how fast a real store is.
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hmde_dist.benchmark import machine, markdown
from hmde_dist.command import InputError, argument_parser, positive, progress, run_command
from hmde_dist.corpus.shards import decode_group
from hmde_dist.stream.batch import PackedBatch, pack
from hmde_dist.stream.index import ShardIndex
from hmde_dist.stream.loader import RankBatch, RankBatches, batches, packing_settings
from hmde_dist.stream.mixture import Mixture, Source
from hmde_dist.stream.plan import PlanSettings

OURS, STREAMING, WEBDATASET = "HMDE-dist", "streaming", "webdataset"
LIBRARY = {"mds": STREAMING, "wds": WEBDATASET}  # whose container it is
LOCAL, COLD, WARM = "local", "S3, cold cache", "S3, warm cache"
SENTENCES, NEIGHBOURS, NEIGHBOUR_GROUP, TEMPERATURE = 32, 0.5, 4, 0.3  # the recipe's defaults
PREFETCHED = 4  # batches of each worker, as our loader has it
WARM_UP = 8  # batches of each worker that are not counted
SHUFFLE_BUFFER = 1000  # groups
EPOCHS = 20  # that streaming is given as one, or the pause between epochs would count against it
PATIENCE_S = 300  # beyond the time measured
SHARED_MEMORY = Path("/dev/shm")
BUCKET = "shards"
H200_FLOPS, MFU, PARAMETERS = 989e12, 0.45, 86e6  # dense bf16; the encoder's without embeddings


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        folder: the shard set, also where it is read from a URL.
        endpoint: of the S3 server.
        cache: local folder for what is read from there.
    """

    system: str
    container: str
    where: str
    workers: int
    folder: str
    pairs: int
    seconds: float
    endpoint: str = ""
    cache: str = ""

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.container}" if self.endpoint else ""


class Speed(NamedTuple):
    seconds: float
    documents: int
    tokens: int  # special ones included, padding not
    slots: int  # with padding


# --- the three systems, in the process that measures


def our_batches(job: Job) -> Iterator[RankBatch]:
    index = ShardIndex.open(job.url or job.folder, job.cache or None)
    settings = PlanSettings(job.pairs, NEIGHBOURS, NEIGHBOUR_GROUP, TEMPERATURE, SENTENCES, "first", seed=0)
    dataset = RankBatches(Mixture([Source(index)], settings), rank=0, world=1)
    return batches(dataset, range(1 << 40), job.workers, torch.device("cpu"))


def streaming_batches(job: Job) -> Iterator[PackedBatch]:
    from streaming import StreamingDataLoader, StreamingDataset

    class Groups(StreamingDataset):
        def __getitem__(self, at: int) -> list:
            return two_documents(super().__getitem__(at)["group"])

    class Loader(StreamingDataLoader):
        def _get_batch_size(self, batch: PackedBatch) -> int:  # the library's knows tensors and dictionaries only
            return job.pairs

    index = ShardIndex.open(job.folder)
    dataset = Groups(
        remote=job.url or None,
        local=job.cache or job.folder,
        shuffle=True,
        batch_size=job.pairs,
        epoch_size=None if job.where == COLD else EPOCHS * index.groups,
    )
    loader = Loader(
        dataset, batch_size=job.pairs, drop_last=True, collate_fn=packer(index), **worker_options(job.workers)
    )
    prefix = f"{dataset._shm_prefix_int:06}_"
    note_shared_memory(prefix)
    for number, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(loader))):
        if number == 0:
            note_shared_memory(prefix)  # with what an epoch adds
        yield batch


def webdataset_batches(job: Job) -> Iterator[PackedBatch]:
    import webdataset

    index = ShardIndex.open(job.folder)
    place = f"{job.endpoint}/{BUCKET}/{job.container}" if job.endpoint else job.folder
    groups = (
        webdataset.WebDataset(
            [f"{place}/{entry['name']}" for entry in index.manifest["shards"]],
            shardshuffle=len(index.manifest["shards"]),
            cache_dir=job.cache or None,
        )
        .shuffle(SHUFFLE_BUFFER)
        .to_tuple("bin")
        .map(lambda sample: two_documents(sample[0]))  # never .decode(), which unpickles
        .batched(job.pairs, collation_fn=packer(index), partial=False)
        .repeat()
    )
    return iter(webdataset.WebLoader(groups, batch_size=None, **worker_options(job.workers)))


SYSTEMS = {OURS: our_batches, STREAMING: streaming_batches, WEBDATASET: webdataset_batches}


def worker_options(workers: int) -> dict:
    options = {"prefetch_factor": PREFETCHED, "persistent_workers": True} if workers else {}
    return {"num_workers": workers} | options


def two_documents(data: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    group = decode_group(data)
    return [group.document(number) for number in random.sample(range(len(group.languages)), 2)]


def packer(index: ShardIndex) -> functools.partial:
    return functools.partial(pack_pairs, packing_settings(index, SENTENCES))


def pack_pairs(packing: dict[str, int], pairs: Sequence[list]) -> PackedBatch:
    first, second = zip(*pairs, strict=True)
    return pack([*first, *second], **packing)


def note_shared_memory(prefix: str) -> None:
    """Leave word of the segments with this prefix, which is ours while we live, for who removes what stays."""
    found = {entry.name: entry.inode() for entry in os.scandir(SHARED_MEMORY) if entry.name.startswith(prefix)}
    note = Path(tempfile.gettempdir()) / "segments.json"
    note.write_text(json.dumps(_noted(note) | found), encoding="utf-8")


def _noted(note: Path) -> dict[str, int]:
    return json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}


def measure(job: Job) -> Speed:
    """Take batches for the job's time; with a cold cache as many as an epoch has, from opening the set on."""
    if job.container == "mds" or job.endpoint:
        import streaming  # noqa: F401  seconds, which are not the loader's
    cold = job.where == COLD
    epoch = ShardIndex.open(job.folder).groups // job.pairs
    start = time.perf_counter()
    stream = SYSTEMS[job.system](job)
    if not cold:
        for _ in range(WARM_UP * max(1, job.workers)):
            next(stream)
        start = time.perf_counter()
    count = tokens = slots = 0
    seconds = 0.0
    while count < epoch if cold else seconds < job.seconds:
        batch = next(stream)
        count += 1
        tokens += batch.tokens
        slots += batch.slots
        seconds = time.perf_counter() - start
    return Speed(seconds, 2 * job.pairs * count, tokens, slots)


def child() -> None:
    job = Job(**json.loads(sys.argv[1]))
    logging.disable(logging.WARNING)
    speed = measure(job)
    (Path(tempfile.gettempdir()) / "speed.json").write_text(json.dumps(speed), encoding="utf-8")


# --- the process that starts them


def run_job(job: Job) -> Speed:
    """Measure in a fresh process, with a folder for temporary files of its own; leaves nothing behind."""
    outer = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}  # streaming would take them for its own
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if job.endpoint:
        environment |= {"S3_ENDPOINT_URL": job.endpoint, "NO_PROXY": "127.0.0.1"} | CREDENTIALS
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        process = subprocess.Popen(
            [sys.executable, "-c", "import bench_stream; bench_stream.child()", json.dumps(asdict(job))],
            cwd=Path(__file__).resolve().parent,
            env=environment | {"TMPDIR": scratch},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=job.seconds + PATIENCE_S)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            remove_segments(_noted(Path(scratch) / "segments.json"))
        if process.returncode:
            raise RuntimeError(f"{job}: exit code {process.returncode}\n{output[-4000:]}")
        return Speed(*json.loads((Path(scratch) / "speed.json").read_text(encoding="utf-8")))


def remove_segments(noted: dict[str, int]) -> None:
    """Remove segments of shared memory; a name that another process has taken since has another inode."""
    for name, inode in noted.items():
        with contextlib.suppress(FileNotFoundError):
            if (SHARED_MEMORY / name).stat().st_ino == inode:
                (SHARED_MEMORY / name).unlink()


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server(folders: dict[str, Path]) -> Iterator[str]:
    """The endpoint of an S3 server of this process that holds the shard sets, each under the name of its container."""
    try:
        import boto3
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise InputError(f"--remote: {error}; pip install 'moto[server]'") from None

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
        )
        client.create_bucket(Bucket=BUCKET)
        for container, folder in folders.items():
            for path in folder.rglob("*"):
                if path.is_file():  # public, for webdataset reads over plain HTTP
                    key = f"{container}/{path.relative_to(folder)}"
                    client.upload_file(str(path), BUCKET, key, ExtraArgs={"ACL": "public-read"})
        yield endpoint
    finally:
        server.stop()


def jobs_of_round(
    number: int,
    folders: dict[str, Path],
    workers: Sequence[int],
    pairs: int,
    seconds: float,
    endpoint: str,
    caches: Path,
) -> list[Job]:
    """The jobs of a round, systems that are compared side by side; every other round in the opposite order."""
    turns: list[list[Job]] = []
    for count, place, (container, folder) in itertools.product(
        workers, ("local", "s3") if endpoint else ("local",), folders.items()
    ):
        for system in (OURS, LIBRARY[container]):
            base = (system, container)
            rest = (count, str(folder), pairs, seconds)
            if place == "local":
                turns.append([Job(*base, LOCAL, *rest)])
            else:  # the warm cache is what the cold one left
                cache = caches / f"{number}-{count}-{container}-{system}"
                cache.mkdir()
                turns.append([Job(*base, where, *rest, endpoint, str(cache)) for where in (COLD, WARM)])
    return list(itertools.chain.from_iterable(turns[:: -1 if number % 2 else 1]))


Row = tuple[str, str, int, str]  # where, container, workers, system


def table(rounds: Sequence[dict[Row, Speed]]) -> str:
    """The medians over the rounds, and the range of the ratio to our loader in the same round."""
    rows = [(
        "system", "container", "where", "workers", "documents/s", "tokens/s", "tokens/s a worker", "ratio to ours", "padding",
    )]  # fmt: skip
    wheres, systems = [LOCAL, COLD, WARM], list(SYSTEMS)
    for row in sorted(rounds[0], key=lambda row: (wheres.index(row[0]), *row[1:3], systems.index(row[3]))):
        where, container, workers, system = row
        speeds = [measured[row] for measured in rounds]
        tokens = median_tokens(rounds, row)
        ratios = [
            tokens_per_second(measured[row]) / tokens_per_second(measured[where, container, workers, OURS])
            for measured in rounds
        ]
        ratio = "1" if system == OURS else f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        documents = statistics.median(speed.documents / speed.seconds for speed in speeds)
        padding = statistics.median(1 - speed.tokens / speed.slots for speed in speeds)
        rows.append((
            system, container, where, str(workers), f"{documents:,.0f}", f"{tokens:,.0f}", f"{tokens / max(1, workers):,.0f}",
            ratio, f"{100 * padding:.1f} %",
        ))  # fmt: skip
    return markdown(rows)


def tokens_per_second(speed: Speed) -> float:
    return speed.tokens / speed.seconds


def median_tokens(rounds: Sequence[dict[Row, Speed]], row: Row) -> float:
    return statistics.median(tokens_per_second(measured[row]) for measured in rounds)


def workers_needed(tokens_per_worker: float) -> str:
    """How many workers one H200 keeps busy, from a formula and what a worker was measured to give."""
    eaten = H200_FLOPS * MFU / (6 * PARAMETERS)
    return (
        f"An H200 eats peak FLOP/s x MFU / (6 x parameters) = {H200_FLOPS:.3g} x {MFU} / (6 x {PARAMETERS:.3g}) = {eaten:,.0f} "
        f"tokens/s, what {eaten / tokens_per_worker:.2f} workers of {tokens_per_worker:,.0f} tokens/s give (arithmetic; "
        "no H200 was measured)."
    )


def containers_of(sources: Sequence[Path], pairs: int, workers: Sequence[int]) -> dict[str, Path]:
    """The folder of each container, checked.

    Raises:
        InputError: two sets of one container, or one that the systems cannot all read in this way.
    """
    folders: dict[str, Path] = {}
    for source in sources:
        index = ShardIndex.open(source)
        container = index.manifest["container"]
        if container in folders:
            raise InputError(f"--shards: {folders[container]} and {source} are both {container}; name one of each")
        if index.groups < pairs:
            raise InputError(f"{source}: has {index.groups} groups; set --pairs to that or less")
        if (np.diff(index.columns["group_documents"].astype(np.int64)) < 2).any():
            raise InputError(f"{source}: has groups of one document; measure a set in which every group has a pair")
        if container == "wds" and len(index.manifest["shards"]) < max(workers):
            raise InputError(f"{source}: has fewer shards than workers, which webdataset refuses; lower --workers")
        folders[container] = source.resolve()
    return folders


def worker_counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 0 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text} are not different numbers, 0 or more")
    return counts


def main() -> None:
    parser = argument_parser(
        __doc__, "python tools/bench_stream.py --shards build/shards build/shards-wds --workers 0,1,2 --remote"
    )
    parser.add_argument(
        "--shards", type=Path, nargs="+", required=True, metavar="DIR", help="one MDS, one WebDataset or both"
    )
    parser.add_argument("--remote", action="store_true", help="also from an S3 server that is started here")
    parser.add_argument("--pairs", type=positive, default=256, help="of a batch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="of a measurement (%(default)s)")
    parser.add_argument(
        "--workers", type=worker_counts, default="0,1,2", help="numbers of worker processes (%(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="%(default)s")
    args = parser.parse_args()
    folders = containers_of(args.shards, args.pairs, args.workers)
    for path in itertools.chain.from_iterable(folder.rglob("*") for folder in folders.values()):
        if path.is_file():
            path.read_bytes()  # into the page cache
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(s3_server(folders)) if args.remote else ""
        rounds: list[dict[Row, Speed]] = []
        for number in range(args.rounds):
            with tempfile.TemporaryDirectory(prefix="bench-") as caches:
                jobs = jobs_of_round(number, folders, args.workers, args.pairs, args.seconds, endpoint, Path(caches))
                rounds.append({
                    (job.where, job.container, job.workers, job.system): run_job(job)
                    for job in progress(jobs, desc=f"round {number + 1} of {args.rounds}", unit="run")
                })  # fmt: skip
    print(table(rounds))
    print(f"\n{machine()}; load {load:.1f} at the start.")
    print(
        f"Batches of {args.pairs} pairs; medians of {args.rounds} rounds of {args.seconds:g} s; a cold cache: one epoch."
    )
    if args.remote:
        print("The S3 server is moto on the same cores: it is the bottleneck of a cold cache.")
    most = max(args.workers)
    print(workers_needed(median_tokens(rounds, (LOCAL, next(iter(folders)), most, OURS)) / max(1, most)))


if __name__ == "__main__":
    run_command(main)
