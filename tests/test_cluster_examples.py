"""The scripts for clusters, as far as one machine goes: torchrun on what it takes for two."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "cluster" / "torchrun.sh"


@pytest.mark.faults
def test_two_torchrun_agents_train_one_model(command: Callable[..., list[str]], tmp_path: Path) -> None:
    # the script gives the command, the accelerator and the number of devices itself
    words = command("fit", tmp_path / "runs", trainer__accelerator=..., trainer__max_epochs=1)[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "ACCELERATOR": "cpu", "MASTER": f"127.0.0.1:{port}", "NODES": "2"}
    agents = []
    for node in range(2):
        own = {**env, "NODE": str(node)}
        with (tmp_path / f"{node}.log").open("w") as log:
            agents.append(subprocess.Popen([SCRIPT, *words], env=own, stdout=log, stderr=log))
    try:
        statuses = [agent.wait(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    logs = [(tmp_path / f"{node}.log").read_text() for node in range(2)]
    assert statuses == [0, 0], logs
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())
    assert [log.count("run folder:") > 0 for log in logs] == [True, False], "the first rank alone reports"
