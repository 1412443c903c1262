"""What every benchmark writes: `<name>_<device>_<date>.json` and `.md`, with the machine and the versions."""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def header(*packages: str, **settings: Any) -> dict[str, Any]:
    """Date, machine and versions, and the settings of this run."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions, **settings}


def provenance(head: dict[str, Any], more: str = "") -> str:
    """The header as a line: date, machine, whatever else there is to say of the run, versions."""
    versions = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    return f"{head['date']}, {head['machine']}{more}; {versions}"


def machine() -> str:
    """The processor's name and the number of its cores."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return f"{names[0].split(': ')[1] if names else platform.machine()}, {os.cpu_count()} cores"


def save(folder: Path, name: str, head: dict[str, Any], rows: Any, lines: list[str]) -> None:
    """Write the figures as JSON and `lines` as Markdown, replacing those of the same day and machine.

    A benchmark that ran on a GPU has the setting `device="gpu"` in its header.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{head.get('device', 'cpu')}_{head['date']}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    stem = next(each for each in names if _machine_of(folder / f"{each}.json") in (None, head["machine"]))
    (folder / f"{stem}.json").write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")


def _machine_of(file: Path) -> str | None:
    return json.loads(file.read_text())["machine"] if file.exists() else None
