"""The same tests everywhere: no network, no account, no one's caches, one thread.

All of it is set in the environment, before torch and the Hugging Face libraries read it on import; child
processes that a test starts have it too.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

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
    "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")])),
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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $CLIP_LIGHTNING_DATA, else ../shared/data beside the repository."""
    given = os.environ.get("CLIP_LIGHTNING_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real photographs: {folder} is not a folder; CLIP_LIGHTNING_DATA can name another")
    return folder
