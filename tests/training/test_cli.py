"""`fit`, `validate` and `test`: the files of a run, stopping, resuming, and error messages."""

import functools
import hashlib
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from processes import assert_same_state, checkpoint, clip_lightning, ends_at, the_run

from clip_lightning import __version__
from clip_lightning.__main__ import main
from clip_lightning.data.scenes import write_scenes
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.training.cli import RunCLI, changed_options, plain_errors, rehearse, set_gpu_defaults

Command, Undisturbed, Refused = Callable[..., list[str]], Callable[..., Path], Callable[..., str]
Printed, Patch, Options = pytest.CaptureFixture[str], pytest.MonkeyPatch, dict[str, Any]
EPOCH = 8  # batches of 4 of the 32 training scenes
METRICS = {
    f"{direction}_{metric}"
    for direction in ("text_to_image", "image_to_text")
    for metric in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
}


def at(step: int, **options: Any) -> list[str]:
    given = {"step": step, **options}.items()
    return ["--trainer.callbacks=processes.At", *(f"--trainer.callbacks.{name}={v}" for name, v in given)]


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# the files of a run


@pytest.fixture(scope="module")
def finished(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with everything on, the W&B logger too."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", "")  # so that the logger's value is restored
        patch.delenv("WANDB_DATA_DIR")
        assert main(command("fit", root, trainer__logger=..., trainer__enable_progress_bar=...)) == 0
        wandb.finish()
    yield the_run(root)


def test_metrics_are_flat_and_complete(finished: Path) -> None:
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", finished.name)
    metrics = metrics_of(finished)
    assert METRICS < set(metrics)
    assert all(0 <= metrics[name] <= 100 for name in METRICS if "R@" in name)
    recalls = sum(metrics[name] for name in METRICS if "R@" in name)
    assert metrics["rsum"] == pytest.approx(recalls, abs=0.01)
    assert metrics["step"] == EPOCH * (metrics["epoch"] + 1)
    assert min(metrics[name] for name in ("seconds", "samples_per_second", "peak_memory_bytes")) > 0
    assert re.fullmatch("[0-9a-f]{64}", metrics["data_digest"])
    assert metrics["version_clip_lightning"] == __version__
    assert metrics["version_torch"].startswith(torch.__version__.partition("+")[0])
    assert all(isinstance(value, int | float | str) for value in metrics.values())


def test_the_bundle_is_the_best_epoch(finished: Path) -> None:
    clip = CLIP.from_pretrained(finished / "model")
    last, best = checkpoint(finished), checkpoint(finished, "best")
    assert torch.equal(clip.heads.image[1].weight, best["state_dict"]["clip.heads.image.1.weight"])
    assert (last["global_step"], best["global_step"]) == (2 * EPOCH, metrics_of(finished)["step"])
    assert not [name for name in last["state_dict"] if "tower" in name]
    assert clip.embed_texts(["a red circle"]).shape == (1, 16)
    config = json.loads((finished / "model" / "config.json").read_text())
    metrics = metrics_of(finished)
    assert config["metrics"]["rsum"] == metrics["rsum"]
    assert config["training_data"]["digest"] == metrics["data_digest"]


def test_a_run_writes_no_other_files(finished: Path) -> None:
    assert 'id="misses"' in (finished / "predictions.html").read_text()
    found = {path.name for path in finished.iterdir()} - {"wandb", "artifacts"}
    bundle = {"model", "metrics.json", "config.yaml"}
    assert found == {*bundle, "checkpoints", "predictions", "predictions.html"}
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "previous.ckpt", "best.ckpt"}


def test_config_yaml_starts_the_same_run_again(finished: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["heads"]["embed_dim"] == 16
    assert config["data"]["read"]["splits"]["val_fraction"] == 0.1  # defaults are written out
    assert config["ckpt_path"] is None
    again = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false"]
    assert main(["fit", "--config", str(finished / "config.yaml"), *again]) == 0
    folder = the_run(tmp_path)
    assert folder.name != finished.name
    assert_same_state(checkpoint(folder), checkpoint(finished))
    rerun = yaml.safe_load((folder / "config.yaml").read_text())
    assert rerun["model"] == config["model"]
    assert rerun["data"] == config["data"]


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_without_fast_bf16_trains_in_fp32(
    command: Command, tmp_path: Path, monkeypatch: Patch, fast: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    words = command("fit", tmp_path, trainer__precision="bf16-mixed", trainer__fast_dev_run="true")
    with plain_errors():
        ran = RunCLI(words)
    assert ran.trainer.precision == precision
    assert yaml.safe_load(ran.config_to_save)["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize(
    ("given", "expected", "products"),
    [
        ({}, ("bf16-mixed", True), "high"),
        ({"precision": "32-true", "benchmark": False}, ("32-true", False), "high"),
        ({"deterministic": True}, ("bf16-mixed", None), "highest"),
    ],
)
def test_a_gpu_trains_in_bf16_unless_told_otherwise(
    monkeypatch: Patch, given: Options, expected: tuple[Any, ...], products: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config = Namespace(**{"precision": None, "benchmark": None, "deterministic": None} | given)
    try:
        set_gpu_defaults(config)
        assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (config.precision, config.benchmark) == expected


def test_validate_and_test_print_and_create_no_run(finished: Path, command: Command, capsys: Printed) -> None:
    metrics = metrics_of(finished)
    file = finished / "checkpoints" / "best.ckpt"
    for name, given in (("validate", "best"), ("test", "last"), ("validate", file)):
        capsys.readouterr()
        assert main(command(name, finished.parent, ckpt_path=given, trainer__logger=...)) == 0
        printed = capsys.readouterr().out
        (rsum,) = re.findall(r"^rsum ([\d.]+)$", printed, flags=re.MULTILINE)
        assert name == "test" or float(rsum) == pytest.approx(metrics["rsum"], abs=0.05)
        assert ("val" if name == "validate" else "test") in printed.splitlines()[0]
        assert the_run(finished.parent) == finished


def test_keys_of_urls_stay_secret(command: Command, scenes: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    archive = Path(shutil.make_archive(str(tmp_path / "scenes"), "zip", scenes))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    options = {"data__root": f"file://{archive}?X-Signature=secret#sha256={digest}"}
    words = command("fit", tmp_path / "runs", trainer__logger=..., trainer__max_epochs=1, **options)
    monkeypatch.setattr(sys, "argv", ["clip-lightning", *words])
    assert main(words) == 0
    wandb.finish()
    assert sys.argv[1:] == words
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    (log,) = (file for file in files if file.suffix == ".wandb")
    assert b"scenes.zip" in log.read_bytes()
    assert not [file for file in files if b"X-Signature" in file.read_bytes()]


def test_a_tilde_is_expanded(command: Command, tmp_path: Path, monkeypatch: Patch, refused: Refused) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text("data: {root: ~/scenes}\nzero_shot: {data: ~/classes, names: ~/names.txt}")
    config = rehearse([f"--config={file}", *command("", Path("~/runs"), data__root=...)[1:]]).config["fit"]
    assert (config.data.root, config.zero_shot.data) == (f"{tmp_path}/scenes", f"{tmp_path}/classes")
    assert config.zero_shot.names == tmp_path / "names.txt"
    said = refused(*command("fit", Path("~/runs"), model__image_tower="test_vit=~/weights.pth"))
    assert f"{tmp_path}/weights.pth" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "runs"]
    file.write_text("data: {root: ''}")
    with pytest.raises(UserError, match=r"^--data\.root is empty in a configuration"):
        rehearse([f"--config={file}", *command("", tmp_path, data__root=...)[1:]])


def test_a_csv_logger_and_a_custom_checkpoint_plugin(command: Command, tmp_path: Path) -> None:
    plugin = {"trainer__plugins": "lightning.fabric.plugins.TorchCheckpointIO"}
    options = {"trainer__logger": "CSVLogger", "trainer__log_every_n_steps": 2, **plugin}
    assert main(command("fit", tmp_path, **options)) == 0
    header, *rows = (the_run(tmp_path) / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/samples_per_second", "val/rsum", "step"} < set(header.split(","))
    assert len(rows) >= 2 * EPOCH / 2
    assert (the_run(tmp_path) / "checkpoints" / "last.ckpt").is_file()


def test_metrics_with_and_without_the_cache_are_nearly_equal(command: Command, tmp_path: Path) -> None:
    weights = []
    for cache in ("off", tmp_path / "cache"):
        options = {"data__cache": cache, "data__augmentation.flip": "false"}
        root = tmp_path / Path(cache).name / "runs"
        assert main(command("fit", root, **options, model__image_tower="random:test_vit")) == 0
        weights.append(checkpoint(the_run(root))["state_dict"])
    assert list((tmp_path / "cache").glob("*/manifest.json"))
    for name, tensor in weights[0].items():
        difference = (tensor - weights[1][name]).norm() / tensor.norm().clamp(min=1e-6)
        assert difference < 0.02, name


# stopping and resuming

WHOLE = {"trainer__max_epochs": 3}


@pytest.fixture(scope="module")
def undisturbed(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Returns an uninterrupted run, trained once per set of options."""

    @functools.cache
    def get(**options: Any) -> Path:
        root = tmp_path_factory.mktemp("undisturbed")
        assert main(command("fit", root, **WHOLE, **options)) == 0
        return the_run(root)

    return get


TRAINED = {"model__freeze": "none", "data__cache": "off"}
WAYS: dict[str, dict[str, Any]] = {
    "cached features": {},
    "trained towers": TRAINED,
    "workers": TRAINED | {"data__num_workers": 2},
    "image tower cached": {"model__freeze": "image"},
    "accumulated gradients": {"trainer__accumulate_grad_batches": 2},
    "three accumulated gradients": {"trainer__accumulate_grad_batches": 3},
    "teacher": {},
    "adapters": TRAINED | {"model__freeze": "both", "model__lora__towers": "both"},
}


# the way, the step that is asked to stop, how, and the step that is saved
MOMENTS = [("cached features", step, "now", step) for step in (3, EPOCH)] + [("workers", EPOCH, "now", EPOCH)]
MOMENTS += [(way, EPOCH + 3, "now", EPOCH + 3) for way in WAYS if "accumulated" not in way]
MOMENTS += [("accumulated gradients", 5, "now", 5), ("three accumulated gradients", 1, "window", 2)]
# Ctrl-C finishes the step and the validation; it is at once within a validation
MOMENTS += [("cached features", *rest) for rest in ((2, "step", 3), (EPOCH - 1, "step", EPOCH + 1))]
MOMENTS += [("cached features", 0, "validation", EPOCH)]


# Lightning does not repeat the interrupted validation, so the epoch has no score.
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
@pytest.mark.parametrize(("way", "step", "press", "saved"), MOMENTS)
def test_resuming_is_bit_identical(
    command: Command,
    undisturbed: Undisturbed,
    bundle: Path,
    tmp_path: Path,
    way: str,
    step: int,
    press: str,
    saved: int,
) -> None:
    """The run is stopped within the first epoch, within the second, or at its start."""
    options = WAYS[way] | ({"model__teacher": bundle} if way == "teacher" else {})
    words = command("fit", tmp_path, **WHOLE, **options)
    assert main([*words, *at(step, press=press)]) == 130
    folder = the_run(tmp_path)
    assert checkpoint(folder)["global_step"] == saved
    assert CLIP.from_pretrained(folder / "model")
    assert "seconds" in metrics_of(folder)
    again = [*words, "--ckpt_path", "last"]
    if step == 3:  # stopped twice
        assert main([*again, *at(6)]) == 130
        assert checkpoint(folder)["global_step"] == 6
    assert main(again) == 0
    assert the_run(tmp_path) == folder
    assert_same_state(checkpoint(folder), checkpoint(undisturbed(**options)))
    if press != "validation":
        ours, theirs = metrics_of(folder), metrics_of(undisturbed(**options))
        assert {name: ours[name] for name in METRICS} == {name: theirs[name] for name in METRICS}
    assert "ckpt_path: null" in (folder / "config.yaml").read_text()


def test_a_run_that_was_moved_keeps_its_best_epoch(command: Command, tmp_path: Path) -> None:
    assert main(command("fit", tmp_path / "here", **WHOLE)) == 0
    before = metrics_of(the_run(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    longer = {"trainer__max_epochs": 4, "model__optimizer.lr": 0}
    assert main([*command("fit", tmp_path / "there", **longer), "--ckpt_path", "last"]) == 0
    folder = the_run(tmp_path / "there")
    assert metrics_of(folder)["rsum"] >= before["rsum"]
    assert checkpoint(folder, "best")["global_step"] == metrics_of(folder)["step"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_which_is_resumed(
    command: Command, undisturbed: Undisturbed, tmp_path: Path, capsys: Printed, monkeypatch: Patch, stop: int
) -> None:
    """The run has the W&B logger, and is stopped within its second epoch."""
    options = WHOLE | {"trainer__logger": ...}
    words = command("fit", tmp_path / "runs", **options)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of this process
    ends = ends_at(tmp_path / "steps", step=EPOCH + 2, signum=int(stop))
    done = clip_lightning(*command("fit", tmp_path / "runs", **options, **ends))
    assert done.returncode == 128 + stop, done.stderr
    assert f"stopped; the same command with --ckpt_path last resumes from step {EPOCH + 3}" in done.stderr
    assert "Traceback" not in done.stderr

    folder = the_run(tmp_path / "runs")
    assert checkpoint(folder)["global_step"] == EPOCH + 3, "the step is finished"
    assert CLIP.from_pretrained(folder / "model")
    before = metrics_of(folder)
    assert before["step"] == EPOCH  # of its only validation
    monkeypatch.setenv("WANDB_DATA_DIR", "")  # so that what the logger sets is taken back
    monkeypatch.delenv("WANDB_DATA_DIR")
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert wandb.run.id == folder.name
    wandb.finish()
    assert the_run(folder.parent) == folder
    assert f"resuming from {folder / 'checkpoints' / 'last.ckpt'}" in capsys.readouterr().err
    assert len(list(folder.glob(f"wandb/offline-run-*/run-{folder.name}.wandb"))) == 2
    assert_same_state(checkpoint(folder), checkpoint(undisturbed()))
    assert metrics_of(folder)["seconds"] > before["seconds"]


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "absent loss": ({"model__loss": "myloss.Focal"}, r"loss: cannot import myloss\.Focal: No module"),
    "no loss": ({"model__loss": "torch.nn.Linear"}, r"loss: torch\.nn\.Linear is not a ContrastiveLoss"),
    "no epochs": ({"trainer__check_val_every_n_epoch": 0}, r"n_epoch 0: expected a number greater"),
    "after the epoch": ({"trainer__val_check_interval": 9}, r"interval 9 is more than the 8 batches"),
    "monitor": ({"early_stopping__monitor": "nothing"}, r"monitor nothing: expected one of val/rsum"),
    "averages without a score": (
        {"trainer__callbacks": "StochasticWeightAveraging", "trainer__callbacks__swa_lrs": 0.01},
        r"StochasticWeightAveraging averages .*; use EMAWeightAveraging",
    ),
    "one image for batch norms": (
        {"model__freeze": "none", "model__micro_batch_size": 3},
        r"--data\.batch_size 4 and --model\.micro_batch_size 3 leave a single image",
    ),
    "unknown logger": ({"trainer__logger": "Nonsense"}, r"--trainer\.logger: expected the name of a class"),
    "seed": ({"seed_everything": -5}, r"--seed_everything is invalid .*-5"),
    "runs in a file": ({"trainer__default_root_dir": __file__}, r"default_root_dir .* another folder"),
    "frozen there, not here": (
        {"ckpt_path": "LAST", "model__freeze": "image"},
        r"of a different model \(frozen is .*text_tower.* there and .* here\); set the same --model options",
    ),
    "a loss with a bias": (
        {"ckpt_path": "LAST", "model__loss": "SigLIP"},
        r"of a different model \(clip\.logit_bias is absent there and \(\) here",
    ),
}


def assert_one_line(errors: str, says: str) -> None:
    lines = [line for line in errors.splitlines() if line.startswith("clip-lightning: error:")]
    assert len(lines) == 1, errors
    assert re.search(says, lines[0]), lines[0]
    assert errors.splitlines()[-1] == lines[0]
    assert "Traceback" not in errors
    progress = ("Seed set to", "training ", "run folder:", "resuming from", "GPU available", "")
    for line in errors.splitlines()[:-1]:
        assert line.startswith(progress) or "row/s" in line, line


@pytest.mark.parametrize(("options", "message"), INVALID.values(), ids=INVALID)
def test_invalid_options_print_one_line(
    command: Command, finished: Path, tmp_path: Path, capsys: Printed, options: dict[str, Any], message: str
) -> None:
    if "ckpt_path" in options:
        options = options | {"ckpt_path": finished / "checkpoints" / "last.ckpt"}
    status = main(command("fit", tmp_path / "runs", **options))
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert_one_line(captured.err, message)
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert not Path("lightning_logs").exists()


def test_usage_version_and_no_control_characters_are_printed(capsys: Printed, ran: Any) -> None:
    assert main([]) == 2
    assert "usage: clip-lightning COMMAND" in capsys.readouterr().out
    assert "fit --config quickstart" in ran("--help").out
    assert ran("--version").out == f"{__version__}\n"
    assert main(["data", "check", "\x1b[2Jx"]) == 2
    assert "\x1b" not in (said := capsys.readouterr().err) and "[2Jx does not exist" in said


def test_scoring_a_missing_split(
    command: Command, scenes: Path, finished: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    rows = (folder / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").write_text("\n".join(row for row in rows if not row.endswith(",test")))
    last = finished / "checkpoints" / "last.ckpt"
    said = refused(*command("test", tmp_path / "runs", data__root=folder, ckpt_path=last))
    assert "has no test split; give data that has one" in said


def test_too_many_broken_images(command: Command, scenes: Path, tmp_path: Path, capsys: Printed) -> None:
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    for name in ("00000.jpg", "00001.jpg"):
        (folder / name).write_bytes(b"")
    assert main(command("fit", tmp_path / "strict", data__root=folder, trainer__max_epochs=1)) == 2
    assert "--data.read.max_broken 0.01 allows; fix" in capsys.readouterr().err.splitlines()[-1]
    with pytest.warns(UserWarning, match="left out"):
        assert main(command("fit", tmp_path / "mild", data__root=folder, data__read__max_broken=0.1)) == 0
    broken = json.loads((the_run(tmp_path / "mild") / "broken.json").read_text())
    assert sorted(Path(path).name for path in broken) == ["00000.jpg", "00001.jpg"]


validated: list[int] = []


class Notes(Callback):
    """Notes the step of each validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validated.append(trainer.global_step)


def contents(*folders: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"trainer__check_val_every_n_epoch": 4, "trainer__max_epochs": 1}, [EPOCH]),
        ({"trainer__check_val_every_n_epoch": 2, "trainer__max_epochs": 3}, [2 * EPOCH, 3 * EPOCH]),
        ({"trainer__check_val_every_n_epoch": 4, "trainer__max_steps": EPOCH + 3}, [EPOCH + 3]),
        ({"trainer__val_check_interval": 5, "trainer__max_epochs": 1}, [5, EPOCH]),
    ],
)
def test_the_last_step_is_validated(
    command: Command, tmp_path: Path, options: Options, steps: list[int]
) -> None:
    validated.clear()
    options = options | {"predictions__queries": 0, "trainer__callbacks": "test_cli.Notes"}
    assert main(command("fit", tmp_path, **options)) == 0
    assert validated == steps
    assert metrics_of(the_run(tmp_path))["step"] in steps
    assert (the_run(tmp_path) / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
def test_a_run_without_validation_prints_it(command: Command, tmp_path: Path, ran: Any) -> None:
    words = command("fit", tmp_path, trainer__max_epochs=1, trainer__limit_val_batches=0)
    assert "no epoch was validated" in ran(*words).err
    assert "rsum" not in metrics_of(the_run(tmp_path))
    assert not (the_run(tmp_path) / "checkpoints" / "best.ckpt").exists()


@pytest.fixture(scope="module")
def begun(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs folder with one finished run of trained towers, whose learning rate of 0 ended it early."""
    root = tmp_path_factory.mktemp("begun")
    assert main(command("fit", root / "runs", **STOPS)) == 0
    folder = the_run(root / "runs")
    (folder / "wandb").mkdir()
    (folder / "wandb" / f"history-{folder.name}.jsonl").write_text("{}\n")
    yield root / "runs"


RATES = {f"model__optimizer.{name}": 0 for name in ("lr", "image_lr", "text_lr")}
STOPS = RATES | {"model__freeze": "image", "data__batch_size": 16, "predictions__queries": 0}
STOPS |= {"early_stopping__patience": 1, "trainer__max_epochs": 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__root": ...}, "the checkpoint was trained with data (digest)"),
        ({"seed_everything": 5}, "another frozen image_tower"),  # which is drawn from it
        ({"data__batch_size": 8}, "--data.batch_size × ranks 16, but this run has 8"),
        ({"model__optimizer.layer_decay": 0.5}, "with the parameter groups"),
    ],
)
@pytest.mark.parametrize("name", ["last", "best"])
def test_a_rejected_resume_writes_and_computes_nothing(
    command: Command, begun: Path, tmp_path: Path, refused: Refused, options: Options, message: str, name: str
) -> None:
    if "data__root" in options:
        write_scenes(tmp_path / "other", count=40, size=32, seed=1)
        options = {"data__root": tmp_path / "other"}
    words = command("fit", begun, **{**STOPS, **options, "data__cache": tmp_path / "cache"})
    before = contents(begun)
    assert message in refused(*words, "--ckpt_path", name)
    assert contents(begun) == before
    assert not (tmp_path / "cache").exists()


def test_a_run_that_stopped_early_stays_finished(command: Command, begun: Path, ran: Any) -> None:
    before = checkpoint(the_run(begun))
    assert before["global_step"] < 9 * 2, "it has stopped early"
    assert "the run has stopped early" in ran(*command("fit", begun, **STOPS), "--ckpt_path=auto").err
    assert checkpoint(the_run(begun))["global_step"] == before["global_step"]
    assert metrics_of(the_run(begun))["finished"]


def test_changed_options_apply_after_a_resume(command: Command, tmp_path: Path, capsys: Printed) -> None:
    words = command("fit", tmp_path, predictions__queries=0, data__batch_size=16, trainer__max_epochs=2)
    assert main([*words, "--model.optimizer.lr=0.002", "--early_stopping.patience=3"]) == 0
    capsys.readouterr()
    changed = {"lr": 0.004, "weight_decay": 0.3, "betas": [0.8, 0.9]}
    changes = [f"--model.optimizer.{name}={value}" for name, value in changed.items()]
    changes += ["--trainer.max_epochs=4", "--early_stopping.patience=7"]
    assert main([*words, *changes, "--ckpt_path=last"]) == 0
    said = capsys.readouterr().err
    for line in ("--model.optimizer.lr 0.004 (was 0.002)", "--early_stopping.patience 7 (was 3)"):
        assert f"changed: {line}\n" in said
    assert "the learning rate of step 4 is now 0.00" in said
    after = checkpoint(the_run(tmp_path))
    for group in after["optimizer_states"][0]["param_groups"]:
        assert group["initial_lr"] == 0.004
        assert tuple(group["betas"]) == (0.8, 0.9)
        assert group["weight_decay"] in (0.3, 0.0)
    (stopping,) = (state for key, state in after["callbacks"].items() if key.startswith("EarlyStopping"))
    assert stopping["patience"] == 7


def test_options_that_a_resume_ignores_are_listed() -> None:
    loss = "loss: {class_path: a.L, init_args: {init_scale: %d, smoothing: %d}}"
    before = "model: {init_from: a, " + loss % (1, 0) + "}"
    now = "model: {init_from: b, " + loss % (2, 1) + ", lora: {r: 2}}"
    ignored = "; ignored, since the checkpoint contains the weights"
    assert changed_options(before, now) == [
        f'--model.init_from "b" (was "a"){ignored}',
        f"--model.loss.init_scale 2 (was 1){ignored}",
        "--model.loss.smoothing 1 (was 0)",
        "--model.lora.r 2 (was null)",
    ]
