"""What the tests share: one CPU thread, no network, and the small corpus as documents, tokenizer and shards.

Everything is made once a test process, in a folder of that process, so pytest-xdist may run any number of them.
"""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    DS_ACCELERATOR="cpu",
    TORCHDYNAMO_DISABLE="1",
)

from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from hypothesis import settings
from launch import SENTENCE_TOKENS, environment, write_recipe

from hmde_dist.corpus import shard_build
from hmde_dist.corpus.documents import write_splits
from hmde_dist.corpus.readers import read_documents
from hmde_dist.corpus.tokenizer import load_tokenizer, train_tokenizer

# Derandomized: the suite passes or fails alike for everyone.
settings.register_profile("suite", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def small_corpus() -> Path:
    """44 groups in en, ru, ar, hi, zh-cn and ja, with two-level categories."""
    return Path(__file__).parent / "data" / "small_corpus.jsonl"


@pytest.fixture(scope="session")
def documents_folder(small_corpus, tmp_path_factory) -> Path:
    """`train|validation|test.jsonl.gz` of the small corpus: 37, 4 and 3 groups."""
    folder = tmp_path_factory.mktemp("documents") / "out"
    write_splits(read_documents([small_corpus]), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(documents_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "out"
    train_tokenizer(read_documents([documents_folder / "train.jsonl.gz"]), 2000, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def shards(documents_folder, tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """`shards("mds" | "wds", split="train")`: a folder of shards, small enough that the training split has several."""
    made: dict[tuple[str, str], Path] = {}

    def build(container: str, split: str = "train") -> Path:
        if (container, split) not in made:
            folder = tmp_path_factory.mktemp(f"{container}-{split}") / "out"
            documents = [documents_folder / f"{split}.jsonl.gz"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shard_build, "SHARD_BYTES", 1 << 15)
                shard_build.build_shards(documents, tokenizer, SENTENCE_TOKENS, folder, container)
            made[container, split] = folder
        return made[container, split]

    return build


@pytest.fixture(scope="session")
def trained_run(shards, tmp_path_factory, forks) -> Path:
    """The run folder of a training of seconds: two ranks under ZeRO-3, MDS shards."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "recipe.yaml", shards("mds"), engine={"zero_stage": 3, "zero3_persistence": 0})
    job = forks.train(2, recipe, "engine.self_test=true")
    assert job.codes == [0, 0], job.output
    return folder / "run"


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts jobs of forked ranks, in a second each."""
    forks = Forks(tmp_path_factory.mktemp("forks"), environment())
    yield forks
    forks.close()
