"""Help, suggestions and completion of the options of `fit` come at once from a table that fits the code."""

import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import options
import pytest

from clip_lightning.__main__ import main
from clip_lightning.commands.help import TABLE, read_options

Printed = pytest.CaptureFixture[str]


def test_the_option_table_and_document_are_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == options.table(), "run make options"
    assert options.DOC.read_text(encoding="utf-8") == options.document(), "run make options"


def test_the_help_of_fit_is_short_and_begins_with_our_own_options(capsys: Printed) -> None:
    assert main(["fit", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 120
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert names.index("--data.root") < names.index("--model.loss") < names.index("--trainer.max_epochs")
    assert main(["fit", "--help", "all"]) == 0
    everything = capsys.readouterr().out
    for name in read_options():
        assert name.endswith(".*") or f"--{name}" in everything


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--lr", "3"], "did you mean --model.optimizer.lr?"),
        (["fit", "--epochs=3"], "did you mean --trainer.max_epochs"),
        (["fit", "--model.optimiser.lr", "1"], "did you mean --model.optimizer.lr"),
        (["fit", "--nothing.like.it", "1"], "fit --help all lists the options"),
        (["fit", "--model.loss", "InfoNCE", "--model.loss.nothing", "1"], "'nothing' is not accepted"),
        (["sweep"], "FILE is missing; give it before the options of fit: a W&B sweep file, or the name of"),
        (["sweep", "heads", "--trial", "4"], "unknown option --trial; did you mean --trials?"),
        (["fit", "--data.root", ""], "--data.root is empty; give a value"),
        (["fit", "--data.root="], "--data.root is empty; give a value"),
        (["fit", "--data.cache="], "--data.cache is empty; give a value"),
        (["cache", "list", "--folder", "/none"], "--folder /none does not exist"),
        (["nothing"], "--help lists the commands"),
        (["--versoin"], "did you mean --version?"),
        (["search", "x", "y", "--kk", "3"], "unrecognized"),
    ],
)
def test_misspelled_names_and_missing_values(words: list[str], said: str, refused: Any) -> None:
    assert said.lower() in refused(*words).lower()


def test_quiet_commands_print_results_and_errors_only(tmp_path: Path, capfd: Printed) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\n")
    for quiet, words in ((False, []), (True, ["-q"])):
        assert main(["data", "check", str(tmp_path), *words]) == 1
        out, err = capfd.readouterr()
        assert "be read: a.jpg" in out and bool(err) != quiet
    assert main(["--quiet", "data", "check", str(tmp_path / "nothing")]) == 2
    assert capfd.readouterr().err.startswith("clip-lightning: error: ")
    assert main(["-q", "data", "check"]) == 2
    assert capfd.readouterr().err.startswith("clip-lightning: error: missing: root")


def test_configs_env_and_completion(capsys: Printed, printed: Any) -> None:
    assert printed("configs")["heads"].keys() == {"about", "command", "hardware", "time", "score"}
    assert main(["configs"]) == 0 and main(["env"]) == 0
    assert "torch           " in capsys.readouterr().out
    assert main(["completion"]) == 0
    script = capsys.readouterr().out
    for words, number, expected in (("fit --model.optimizer.l", 2, "lr"), ("ev", 1, "evaluate")):
        typed = f"{script}\nCOMP_WORDS=(clip-lightning {words}) COMP_CWORD={number}; _clip_lightning"
        shell = ["bash", "-c", f"{typed}; echo ${{COMPREPLY[@]}}"]
        assert expected in subprocess.run(shell, check=True, capture_output=True, text=True).stdout


def test_an_error_of_the_file_system_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    full = OSError(28, "No space left on device", "results.csv")
    monkeypatch.setattr("clip_lightning.__main__._run", Mock(side_effect=full))
    assert main(["cache", "list"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "clip-lightning: error: results.csv cannot be read or written (No space left on device);"
    )
