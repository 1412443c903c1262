"""The test server, as the real SDK sees it."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image
from wandb.agents import pyagent
from wandb_server import WandbServer
from wandb_store import content_path


def wandb_command(*arguments: str, folder: Path) -> str:
    """What the command line says; both of its streams."""
    command = [sys.executable, "-m", "wandb", *arguments]
    environment = os.environ | {"WANDB_SILENT": "false"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def wait_for(condition: Callable[[], object]) -> None:
    """Until the condition holds; a test that waits in vain fails."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def logged(run: Any, name: str) -> list[Any]:
    return [row[name] for row in run.history if name in row]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def log_model(text: str, *, run_id: str, folder: Path, aliases: tuple[str, ...] = ()) -> wandb.Artifact:
    """A run that logs a file of this text as the artifact `model`."""
    with wandb.init(project="p", id=run_id) as run:
        artifact = wandb.Artifact("model", "model", metadata={"text": text})
        artifact.add_file(str(write(folder / f"{run_id}.txt", text)), name="weights.txt")
        run.log_artifact(artifact, aliases=["latest", *aliases])
        return artifact.wait()


def test_an_online_run_arrives_whole(wandb_server: WandbServer, tmp_path: Path) -> None:
    labels = {"tags": ["a", "b"], "notes": "why", "group": "g", "job_type": "train", "name": "first"}
    with wandb.init(project="p", id="one", config={"lr": 0.1, "nested": {"x": 1}}, **labels) as run:
        run.define_metric("accuracy", summary="max")
        for step in range(4):
            run.log({"loss": 1 / (1 + step), "accuracy": [1, 3, 2, 0][step]})
        image = wandb.Image(Image.new("RGB", (4, 4), (255, 0, 0)))
        run.log({"table": wandb.Table(columns=["row", "image"], data=[[1, image]])})
        run.summary["extra"] = 7
        run.config["later"] = True
        run.save(str(write(tmp_path / "note.txt", "hello")), base_path=str(tmp_path), policy="now")
        run.alert("Title", "Text", level=wandb.AlertLevel.WARN)

    (found,) = wandb_server.runs.values()
    assert found.key == ("tester", "p", "one")
    assert logged(found, "loss") == [1, 1 / 2, 1 / 3, 1 / 4]
    assert [row["_step"] for row in found.history] == list(range(5))
    assert found.summary["accuracy"] == {"max": 3}
    assert found.summary["extra"] == 7
    assert found.config == {"lr": 0.1, "nested": {"x": 1}, "later": True}
    assert (found.tags, found.notes, found.group, found.job_type) == (["a", "b"], "why", "g", "train")
    assert (found.display_name, found.state, found.exit_code) == ("first", "finished", 0)
    assert found.files["note.txt"] == b"hello"
    assert {"config.yaml", "wandb-metadata.json", "wandb-summary.json"} <= found.files.keys()
    assert found.alerts == [{"title": "Title", "text": "Text", "severity": "WARN"}]
    assert found.summary["table"]["_type"] == "table-file"
    table = wandb_server.artifact("tester/p/run-one-table:latest")
    (picture,) = (path for path in table.contents if path.endswith(".png"))
    assert wandb_server.blobs[content_path(table.contents[picture]["digest"])].startswith(b"\x89PNG")


RESUMED = """
import sys, time, wandb
run = wandb.init(project="p", id="one", resume=sys.argv[1], config={"lr": 0.1})
first = run.starting_step
for number in range(first, first + 3):
    run.log({"number": number})
if sys.argv[2] == "linger":
    time.sleep(600)
run.finish(exit_code=3 if sys.argv[2] == "fail" else 0)
"""


def test_a_resumed_run_goes_on_where_it_was(wandb_server: WandbServer) -> None:
    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", RESUMED, *arguments])

    with start("allow", "linger") as killed:
        wait_for(lambda: (run := wandb_server.runs.get(("tester", "p", "one"))) and len(run.history) == 3)
        killed.kill()
    run = wandb_server.runs["tester", "p", "one"]
    run.state = "crashed"  # as W&B says after some minutes
    with start("must", "fail") as failed:
        assert failed.wait(120) == 0
    assert (run.state, run.exit_code) == ("failed", 3)
    with start("allow", "finish") as finished:
        assert finished.wait(120) == 0
    assert (run.state, run.exit_code) == ("finished", 0)
    assert logged(run, "number") == logged(run, "_step") == list(range(9))
    assert run.summary["number"] == 8
    assert run.config == {"lr": 0.1}
    assert len(wandb_server.runs) == 1


def test_resume_refuses_what_it_should(wandb_server: WandbServer) -> None:
    with pytest.raises(wandb.errors.UsageError, match="does not exist"):
        wandb.init(project="p", id="none", resume="must")
    with wandb.init(project="p", id="one"):
        pass
    with pytest.raises(wandb.errors.UsageError, match="resume"):
        wandb.init(project="p", id="one", resume="never")


def test_versions_aliases_and_lineage(
    wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [
        log_model("one", run_id="a", folder=tmp_path, aliases=("best",)).version,
        log_model("two", run_id="b", folder=tmp_path).version,
        log_model("three", run_id="c", folder=tmp_path, aliases=("best",)).version,
        log_model("two", run_id="d", folder=tmp_path).version,  # nothing new
    ]
    assert versions == ["v0", "v1", "v2", "v1"]
    collection = wandb_server.collections["tester", "p", "model"]
    assert {alias: one.version for alias, one in collection.alias_owners.items()} == {"latest": 1, "best": 2}

    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "empty"))
    with wandb.init(project="p", id="user") as run:
        best = run.use_artifact("model:best")
        assert (Path(best.download()) / "weights.txt").read_text() == "three"
        best.verify()
        assert run.use_artifact("model:v0").metadata == {"text": "one"}
    stored = wandb_server.artifact("tester/p/model:best")
    assert (stored.logged_by, stored.used_by) == (("tester", "p", "c"), [("tester", "p", "user")])

    api = wandb.Api()
    best = api.artifact("p/model:best")
    assert (best.version, best.aliases, best.metadata) == ("v2", ["best"], {"text": "three"})
    assert best.logged_by().id == "c"
    assert [user.id for user in best.used_by()] == ["user"]
    assert [one.version for one in api.run("p/user").used_artifacts()] == ["v0", "v2"]
    assert [one.version for one in api.run("p/c").logged_artifacts()] == ["v2"]
    assert [one.version for one in api.artifacts("model", "p/model")] == ["v2", "v1", "v0"]
    best.aliases.append("chosen")
    best.aliases.remove("best")
    best.metadata["rank"] = 1
    best.save()
    assert api.artifact("p/model:chosen").metadata == {"text": "three", "rank": 1}
    assert not api.artifact_exists("p/model:best")


def test_references_are_kept_and_followed(wandb_server: WandbServer, tmp_path: Path) -> None:
    local = write(tmp_path / "local.txt", "local")
    wandb_server.blobs["remote.txt"] = b"remote"
    with wandb.init(project="p", id="one") as run:
        artifact = wandb.Artifact("data", "dataset")
        artifact.add_reference(local.as_uri())
        artifact.add_reference(wandb_server.storage_url("remote.txt"), name="remote.txt")
        run.log_artifact(artifact)
    contents = wandb_server.artifact("tester/p/data:latest").contents
    assert contents["local.txt"]["ref"] == local.as_uri()
    assert contents["remote.txt"]["ref"] == wandb_server.storage_url("remote.txt")

    data = wandb.Api().artifact("p/data:latest")
    assert {file.name: file.size for file in data.files()} == {"local.txt": 5, "remote.txt": 6}
    folder = Path(data.download(root=str(tmp_path / "copy")))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "local.txt": "local",
        "remote.txt": "remote",
    }
    local.write_text("changed")
    with pytest.raises(ValueError, match="Digest mismatch"):
        data.download(root=str(tmp_path / "again"), skip_cache=True)


def test_linked_artifacts(wandb_server: WandbServer, tmp_path: Path) -> None:
    model = log_model("one", run_id="a", folder=tmp_path)
    with wandb.init(project="p", id="b") as run:
        linked = run.link_artifact(model, "wandb-registry-model/retrieval", aliases=["production"])
        run.link_artifact(model, "portfolio")
    assert linked.is_link
    assert linked.qualified_name == "test-organization/wandb-registry-model/retrieval:v0"
    portfolio = wandb_server.collections["test-organization", "wandb-registry-model", "retrieval"]
    assert portfolio.portfolio
    assert portfolio.find("production") is wandb_server.artifact("tester/p/model:v0")
    found = wandb.Api().artifact("wandb-registry-model/retrieval:production")
    assert (found.source_qualified_name, found.aliases) == ("tester/p/model:v0", ["latest", "production"])
    assert wandb.Api().artifact("p/portfolio:latest").digest == model.digest


def test_a_run_can_be_stopped_from_outside(wandb_server: WandbServer) -> None:
    script = """if True:
        import itertools, time, wandb
        with wandb.init(project="p", id="one") as run:
            for number in itertools.count():
                run.log({"number": number})
                time.sleep(0.1)
    """
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: ("tester", "p", "one") in wandb_server.runs)
        wandb_server.runs["tester", "p", "one"].stop_requested = True
        assert "KeyboardInterrupt" in process.communicate(timeout=120)[1]
    assert wandb_server.runs["tester", "p", "one"].state == "failed"


def test_an_offline_run_is_synced_later(wandb_server: WandbServer, tmp_path: Path) -> None:
    settings = wandb.Settings(root_dir=str(tmp_path))
    with wandb.init(project="p", id="one", mode="offline", config={"lr": 0.1}, settings=settings) as run:
        run.log({"loss": 1})
        run.log({"loss": 2})
        artifact = wandb.Artifact("model", "model")
        artifact.add_file(str(write(tmp_path / "weights.txt", "w")))
        run.log_artifact(artifact, aliases=["best"])
    assert not wandb_server.operations
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    wandb_command("sync", str(folder), folder=tmp_path)
    run = wandb_server.runs["tester", "p", "one"]
    assert (logged(run, "loss"), run.config, run.state) == ([1, 2], {"lr": 0.1}, "finished")
    best = wandb.Api().artifact("p/model:best")
    assert best.logged_by().id == "one"
    assert (Path(best.download()) / "weights.txt").read_text() == "w"


# wandb.sweep calls what wandb has deprecated; wandb.agent does not close the file of a run's parameters.
sweeps = pytest.mark.filterwarnings(
    "ignore:Read the `app_url` setting:DeprecationWarning",
    r"ignore:Exception ignored in.*config-sweep\d+-\d+.yaml:pytest.PytestUnraisableExceptionWarning",
)

GRID = {
    "method": "grid",
    "name": "a grid",
    "metric": {"name": "score", "goal": "maximize"},
    "parameters": {"lr": {"values": [1, 2]}, "model": {"parameters": {"depth": {"values": [10, 20]}}}},
}


@sweeps
def test_an_agent_works_a_grid_off(wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyagent.Agent, "HEARTBEAT_SLEEP_SECONDS", 0.05)

    def train() -> None:
        with wandb.init() as run:
            run.log({"score": run.config["lr"] + run.config["model"]["depth"]})

    sweep_id = wandb.sweep(GRID, project="p")
    wandb.agent(sweep_id, train, count=4)
    runs = [run for run in wandb_server.runs.values() if run.sweep == sweep_id]
    assert [(run.config["lr"], run.config["model"]["depth"]) for run in runs] == [
        (1, 10),
        (1, 20),
        (2, 10),
        (2, 20),
    ]
    sweep = wandb.Api().sweep(f"p/{sweep_id}")
    assert (sweep.name, sweep.expected_run_count, sweep.config) == ("a grid", 4, GRID)
    assert [run.summary["score"] for run in sweep.runs] == [11, 21, 12, 22]
    assert sweep.best_run().config == {"lr": 2, "model": {"depth": 20}}


@sweeps
@pytest.mark.parametrize("method", ["random", "bayes"])
def test_an_agent_draws_parameters(
    wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(pyagent.Agent, "HEARTBEAT_SLEEP_SECONDS", 0.05)
    parameters = {
        "lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "width": {"distribution": "q_uniform", "min": 8, "max": 64, "q": 8},
        "depth": {"min": 1, "max": 4},
        "loss": {"values": ["a", "b"], "probabilities": [0.0, 1.0]},
        "seed": {"value": 3},
    }
    early = {"type": "hyperband", "min_iter": 3}
    metric = {"name": "score", "goal": "minimize"}
    config = {"method": method, "parameters": parameters, "early_terminate": early, "metric": metric}
    sweep_id = wandb.sweep(config, project="p")

    def train() -> None:
        with wandb.init():
            pass

    wandb.agent(sweep_id, train, count=2)
    configs = [run.config for run in wandb_server.runs.values()]
    assert len(configs) == 2
    assert configs[0] != configs[1]
    for drawn in configs:
        assert 1e-4 <= drawn["lr"] <= 1e-2
        assert drawn["width"] in range(8, 65, 8)
        assert drawn["depth"] in (1, 2, 3, 4)
        assert (drawn["loss"], drawn["seed"]) == ("b", 3)


@pytest.mark.slow
def test_sweep_and_agent_on_the_command_line(wandb_server: WandbServer, tmp_path: Path) -> None:
    write(
        tmp_path / "train.py",
        "import sys, wandb\n"
        "with wandb.init() as run:\n"
        "    run.log({'words': ' '.join(sys.argv[1:]), 'lr': run.config['optimizer.lr']})\n",
    )
    write(
        tmp_path / "sweep.yaml",
        "program: train.py\n"
        "project: p\n"
        "method: grid\n"
        f"command: ['{sys.executable}', '${{program}}', fit, '${{args}}']\n"
        "parameters:\n"
        "  optimizer.lr: {values: [0.5]}\n",
    )
    assert "wandb agent tester/p/sweep000" in wandb_command("sweep", "sweep.yaml", folder=tmp_path)
    wandb_command("agent", "tester/p/sweep000", folder=tmp_path)
    (run,) = wandb_server.runs.values()
    assert (run.sweep, run.state) == ("sweep000", "finished")
    assert logged(run, "words") == ["fit --optimizer.lr=0.5"]
    assert wandb_server.sweeps["tester", "p", "sweep000"].state == "FINISHED"


def test_the_public_api_reads_runs(wandb_server: WandbServer, tmp_path: Path) -> None:
    for number, group in enumerate(["x", "x", "y"]):
        with wandb.init(project="p", id=f"run{number}", group=group, config={"lr": number}) as run:
            for step in range(3):
                run.log({"loss": 10 * number + step})
            run.log({"other": 1})
    api = wandb.Api()
    run = api.run("p/run1")
    assert (run.state, run.config, run.summary["loss"]) == ("finished", {"lr": 1}, 12)
    assert [row["loss"] for row in run.history(keys=["loss"], pandas=False)] == [10, 11, 12]
    assert [row["_step"] for row in run.history(pandas=False)] == [0, 1, 2, 3]
    assert [row.get("loss") for row in run.scan_history()] == [10, 11, 12, None]
    assert "config.yaml" in {file.name for file in run.files()}
    with run.file("config.yaml").download(root=str(tmp_path)) as config:
        assert "value: 1" in config.read()

    def found(filters: dict[str, Any], order: str = "+created_at") -> list[str]:
        return [run.id for run in api.runs("p", filters=filters, order=order)]

    assert found({"group": "x"}) == ["run0", "run1"]
    assert found({"config.lr": {"$gte": 1}, "state": "finished"}) == ["run1", "run2"]
    assert found({"$or": [{"config.lr.value": 0}, {"group": {"$ne": "x"}}]}) == ["run0", "run2"]
    assert found({"display_name": {"$regex": "^run-[12]$"}}) == ["run0", "run1"]
    assert found({}, order="-summary_metrics.loss") == ["run2", "run1", "run0"]
    assert [run.id for run in api.runs("p", per_page=2)] == ["run0", "run1", "run2"]
    with pytest.raises(wandb.errors.CommError, match="Could not find run"):
        api.run("p/none")
    run.tags.append("good")
    run.update()
    assert wandb_server.runs["tester", "p", "run1"].tags == ["good"]


def test_what_is_unknown_fails_loudly(wandb_server: WandbServer) -> None:
    with pytest.raises(Exception, match="does not know the operation SearchUsers"):
        wandb.Api().users("somebody")
    assert wandb_server.unknown == ["SearchUsers"]
    wandb_server.unknown.clear()


def test_a_wrong_key_is_refused(wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "1" * 40)
    with pytest.raises(wandb.errors.CommError, match="the API key is wrong"):
        wandb.init(project="p")
    assert not wandb_server.runs


def test_faults_begin_and_end(wandb_server: WandbServer) -> None:
    def status() -> int:
        try:
            return urllib.request.urlopen(wandb_server.storage_url("file")).status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    wandb_server.blobs["file"] = b""
    assert status() == 200
    wandb_server.fail(60, status=503)
    assert status() == 503
    wandb_server.fail(status=None)
    with pytest.raises(http.client.RemoteDisconnected):
        status()
    wandb_server.fail(0)
    assert status() == 200
    wandb_server.stop()
    with pytest.raises(urllib.error.URLError, match="refused"):
        status()
    wandb_server.recover()
    assert status() == 200
    assert wandb_server.spoiled == 2


@pytest.mark.parametrize("fault", ["errors", "hang-ups", "lost answers", "gone", "slow"])
def test_nothing_is_lost_in_an_outage(wandb_server: WandbServer, tmp_path: Path, fault: str) -> None:
    begin: dict[str, Callable[[], object]] = {
        "errors": lambda: wandb_server.fail(),
        "hang-ups": lambda: wandb_server.fail(status=None),
        "lost answers": lambda: wandb_server.fail(handled=True),
        "gone": lambda: wandb_server.stop(),
        "slow": lambda: setattr(wandb_server, "delay", 0.2),
    }

    def repair() -> None:
        if fault in ("gone", "slow"):
            time.sleep(1.5)
        else:
            wait_for(lambda: wandb_server.spoiled >= 3)
        wandb_server.recover()

    with wandb.init(project="p", id="one") as run, ThreadPoolExecutor() as executor:
        run.log({"number": 0})
        wait_for(lambda: wandb_server.runs["tester", "p", "one"].history)
        begin[fault]()
        repaired = executor.submit(repair)
        for number in range(1, 5):
            run.log({"number": number})
        artifact = wandb.Artifact("model", "model")
        artifact.add_file(str(write(tmp_path / "weights.txt", "w")))
        run.log_artifact(artifact)  # waits for the server, and raises after some 20 s without an answer
        repaired.result()
    found = wandb_server.runs["tester", "p", "one"]
    assert logged(found, "number") == list(range(5))
    assert found.state == "finished"
    assert list(wandb_server.artifact("tester/p/model:latest").contents) == ["weights.txt"]
    assert len(wandb_server.collections["tester", "p", "model"].versions) == 1
