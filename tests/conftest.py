"""The same tests everywhere: no network, no account, no one's caches, one thread.

All of it is set in the environment, before torch and the Hugging Face libraries read it on import; child
processes that a test starts have it too.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from wandb_server import WandbServer

    from clip_lightning.model.clip import CLIP
    from clip_lightning.training.module import CLIPModule

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = REPOSITORY / "tests"
# Child processes find the package, what tests share, such as the W&B server, and the callbacks of tests.
CODE = [REPOSITORY / "src", TESTS, *filter(Path.is_dir, TESTS.iterdir())]

for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "TORCH_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
    os.environ.pop(name, None)
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    # pytest-xdist already has a worker for each core.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, CODE), os.environ.get("PYTHONPATH")])),
}

# The process that starts the workers makes the home; they inherit it and leave its removal to that process.
if "PYTEST_XDIST_WORKER" not in os.environ:
    home = tempfile.mkdtemp(prefix="clip-lightning-tests-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ |= {"HOME": home, "XDG_CACHE_HOME": f"{home}/.cache"}

LOCAL_NAMES = {"", "localhost", "::1", "::", "0.0.0.0", socket.gethostname()}


def refuse_the_network(event: str, arguments: tuple[object, ...]) -> None:
    """Answer every attempt to reach another machine as a machine without a network does."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host is not None and host not in LOCAL_NAMES and not str(host).startswith(("127.", "::ffff:127.")):
        raise OSError(errno.ENETUNREACH, f"tests run without a network, and something asked for {host}")


sys.addaudithook(refuse_the_network)


def pytest_configure(config: pytest.Config) -> None:
    """Lightning 2.6 calls jsonargparse by names that its newest versions deprecate."""
    theirs = "jsonargparse._deprecated.JsonargparseDeprecationWarning"
    config.addinivalue_line("filterwarnings", f"ignore::{theirs}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $CLIP_LIGHTNING_DATA, else ../shared/data beside the repository."""
    given = os.environ.get("CLIP_LIGHTNING_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real photographs: {folder} is not a folder; CLIP_LIGHTNING_DATA can name another")
    return folder


def write_bert(folder: Path, **options: Any) -> Path:
    """A folder as the hub has them: a tiny BERT of random weights that knows the scenes' words.

    Its dropout is on, as in the real ones; `options` go to BertConfig.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    from clip_lightning.data.scenes import describe

    words = {word for i in range(200) for line in describe(0, i) for word in re.findall(r"\w+|,", line)}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words), "##s"]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings = {"vocab_size": len(vocabulary), "max_position_embeddings": 64, **shape, **options}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(BertConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command, and returns its outputs, `out` and `err`."""
    from clip_lightning.__main__ import main

    def run(*words: object) -> Any:
        capsys.readouterr()
        assert main([*map(str, words)]) == 0
        return capsys.readouterr()

    return run


@pytest.fixture
def printed(ran: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Runs a command with `--json`, and returns what it prints."""
    return lambda *words: json.loads(ran(*words, "--json").out)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with one line, the last, and returns it."""
    from clip_lightning.__main__ import main

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 2
        out, errors = capsys.readouterr()
        assert not out and errors.count("clip-lightning: error: ") == 1 and "Traceback" not in errors, errors
        assert errors.splitlines()[-1].startswith("clip-lightning: error: ")
        return errors.splitlines()[-1]

    return run


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local text tower, 32 wide, with 64 positions."""
    return write_bert(tmp_path_factory.mktemp("towers") / "bert")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 drawn pictures of 32 pixels with five captions each: 32 to train, 4 to validate, 4 to test."""
    from clip_lightning.data.scenes import write_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, count=40, size=32, seed=0)
    return folder


@pytest.fixture(scope="session")
def command(bert: Path, scenes: Path) -> Callable[..., list[str]]:
    """Builds the words of a small, quiet `fit`; keywords with two underscores for dots change them."""

    def build(name: str, folder: Path, **changes: Any) -> list[str]:
        options = {
            "model.image_tower": "random:test_resnet",
            "model.text_tower": f"random:{bert}",
            "model.heads.embed_dim": 16,
            "data.root": scenes,
            "model.towers.image_size": 32,
            "data.batch_size": 4,
            "data.num_workers": 0,
            "trainer.accelerator": "cpu",
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.max_epochs": 2,
            "trainer.default_root_dir": folder,
        }
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        given = {key: "null" if value is None else value for key, value in options.items()}
        return [name, *(f"--{key}={value}" for key, value in given.items() if value is not ...)]

    return build


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes file systems of so many MB."""
    mounted: list[Path] = []

    def make(megabytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        done = subprocess.run(["mount", *options], capture_output=True)
        if done.returncode:
            pytest.skip(f"mount is not allowed here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def make_clip(bert: Path) -> Callable[..., CLIP]:
    """Builds a tiny CLIP for pictures of 32 pixels, the same for the same arguments."""
    import torch

    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.towers import ImageTower, TextTower

    def make(image: str = "random:test_vit", text: str | None = None, **options: Any) -> CLIP:
        torch.manual_seed(0)
        towers = ImageTower.from_name(image, 32), TextTower.from_name(text or f"random:{bert}")
        return CLIP(*towers, **{"embed_dim": 16, **options})

    return make


@pytest.fixture(scope="session")
def bundle(make_clip: Callable[..., CLIP], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a tiny CLIP, which no test may change."""
    return make_clip().save_pretrained(tmp_path_factory.mktemp("bundle") / "model")


@pytest.fixture
def make_module(bert: Path) -> Callable[..., CLIPModule]:
    """Builds a tiny CLIPModule for pictures of 32 pixels, the same for the same arguments."""
    import torch

    from clip_lightning.training.build import HeadOptions, TowerOptions
    from clip_lightning.training.module import CLIPModule

    def make(**options: Any) -> CLIPModule:
        torch.manual_seed(0)
        names = {"image_tower": "random:test_vit", "text_tower": f"random:{bert}"}
        small = {"towers": TowerOptions(image_size=32), "heads": HeadOptions(embed_dim=16)}
        return CLIPModule(**{**names, **small, **options})

    return make


@pytest.fixture
def wandb_server(tmp_path: Path) -> Iterator[WandbServer]:
    """A W&B server, which the SDK of this process and of its children uses, online, with folders of its own.

    At the end, everything that the SDK asked for must have been answered.
    """
    from wandb_server import WandbServer

    def end_session() -> None:
        """The SDK keeps the settings that it started with until then."""
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()

    kinds = ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR", "ARTIFACT_DIR")
    folders = {f"WANDB_{kind}": str(tmp_path / "wandb" / kind.lower()) for kind in kinds}
    for folder in folders.values():
        Path(folder).mkdir(parents=True)
    end_session()  # before the environment is kept, which names the session's service
    with WandbServer() as server, mock.patch.dict(os.environ, server.environment() | folders):
        try:
            yield server
        finally:
            server.recover()
            end_session()
    assert not server.unknown, "the W&B server does not know these"
    assert not server.failures
