"""What the tests of features, caches and factors share: photographs, a tiny checkpoint, a sealed cache, an S3."""

import logging
import multiprocessing.forkserver
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from urllib.parse import quote

import pytest
from cachekit import build, cache_directory
from factorkit import DIM, FEW, IMAGES, RANK, write_model, write_tensors

from lowrank_tune.features.checkpoint import (
    CheckpointConfig,
    TowerFiles,
    find_tower,
    read_checkpoint_config,
)
from lowrank_tune.features.sources import write_samples
from lowrank_tune.features.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [path for path, _ in write_samples(40, 0, tmp_path_factory.mktemp("photographs"))]


@pytest.fixture(scope="session")
def checkpoint_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="session")
def tiny_config(checkpoint_root: Path) -> CheckpointConfig:
    write_tiny_checkpoint(checkpoint_root / "checkpoints")
    return read_checkpoint_config("tiny-random", checkpoint_root)


@pytest.fixture(scope="session")
def tiny_tower(tiny_config: CheckpointConfig, checkpoint_root: Path) -> TowerFiles:
    return find_tower(tiny_config, checkpoint_root)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config: CheckpointConfig) -> Path:
    """A directory checkpoint that may be spoilt."""
    return shutil.copytree(tiny_config.directory, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results") / "features"
    build(root)
    (cache_directory(root) / "sources").mkdir(exist_ok=True)
    return cache_directory(root)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of images."""
    return write_tensors(tmp_path_factory.mktemp("few") / "tensors", range(FEW))


@pytest.fixture
def cache(tmp_path: Path, sealed: Path) -> Path:
    """A sealed cache that may be spoilt, in a results directory of its own."""
    return shutil.copytree(sealed, tmp_path / "results" / "features" / sealed.name)


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Of processes that begin with what `cachekit` loads, which would take seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "cachekit"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's copies go."""
    monkeypatch.setenv("LOWRANK_TUNE_STAGING", str(tmp_path / "staging"))
    return tmp_path / "staging"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's server, `host:port`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


class Bucket:
    """A bucket on the server, as an address and as pyarrow sees it."""

    def __init__(self, server: str, name: str) -> None:
        from pyarrow.fs import S3FileSystem

        self.name = name
        self.query = f"?endpoint_override={quote(server, safe='')}&scheme=http&region=us-east-1"
        self.filesystem = S3FileSystem(
            access_key="someone", secret_key="s3cret", endpoint_override=server, scheme="http",
            region="us-east-1", allow_bucket_creation=True,
        )  # fmt: skip
        self.filesystem.create_dir(name)

    def address(self, path: str) -> str:
        return f"s3://someone:s3cret@{self.name}/{path}{self.query}"

    def put(self, directory: Path, path: str) -> str:
        """Upload a folder, and return its address."""
        from pyarrow.fs import LocalFileSystem, copy_files

        copy_files(
            str(directory),
            f"{self.name}/{path}",
            source_filesystem=LocalFileSystem(),
            destination_filesystem=self.filesystem,
        )
        return self.address(path)

    def write(self, path: str, data: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.name}/{path}") as file:
            file.write(data)


@pytest.fixture
def bucket(s3_server: str) -> Bucket:
    return Bucket(s3_server, f"bucket-{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "sketch")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of all directions there are, with which any image can be coded to any error."""
    return write_model(tmp_path_factory.mktemp("models") / "shared", DIM, (RANK, DIM), family="shared")


@pytest.fixture(scope="session")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of images."""
    return write_tensors(tmp_path_factory.mktemp("tensors") / "feature_cache_real", range(IMAGES))
