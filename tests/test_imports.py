"""The architecture of docs/design.md, kept: who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "clip_lightning"
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))

PUBLIC_NAMES = {
    "CLIP",
    "CLIPModule",
    "CaptionDataModule",
    "ImageIndex",
    "__version__",
    "info_nce",
    "retrieval_metrics",
    "siglip_loss",
    "zero_shot_classifier",
}

# A name below stands for that module or, if it is a package, for everything in it.

# fmt: off
MAY_NOT_IMPORT: dict[str, str] = {
    # importer             may not import
    "errors":              "data towers model module losses optim features evaluation tracking cli",
    # {captions, readers} ← formats ← datasets ← datamodule, and features ← datasets
    "data.captions":       "data.readers data.formats data.datasets data.datamodule",
    "data.readers":        "data.formats data.datasets data.datamodule",
    "data.formats":        "data.datasets data.datamodule",
    # sources ← download ← archive, sources ← unpack ← archive, columns ← materialise ← hub
    "data.sources":        "data.download data.unpack data.archive data.columns data.materialise data.hub",
    "data.download":       "data.unpack data.archive data.datasets data.datamodule",
    "data.unpack":         "data.download data.archive data.datasets data.datamodule",
    "data.archive":        "data.hub data.datasets data.datamodule",
    "data.columns":        "data.materialise data.hub data.datasets data.datamodule",
    "data.materialise":    "data.hub data.datasets data.datamodule",
    "data.hub":            "data.archive data.datasets data.datamodule",
    "data.origin":         "data.datasets data.datamodule",
    "data.datasets":       "data.datamodule",
    "data.scenes":         "data.datamodule",
    "data.transforms":     "data.datamodule",
    "data.sampler":        "data.datamodule",
    # {data, tracking's looks} ← checking ← data_commands
    "checking":            "towers model module cli tuning",
    # Data knows nothing of what is trained on it.
    "data":                "towers model module losses optim extract evaluation tracking checking recorder "
                           "cli",
    # towers ← model ← module ← cli ← tuning
    "towers":              "lora model module cli tuning",
    # {bundle, foreign} ← model
    "digest":              "bundle towers model module",
    "bundle":              "data towers model module recorder cli tuning",
    "foreign":             "model module tracking recorder cli tuning",
    # towers ← lora ← model
    "lora":                "model module extract tracking recorder cli tuning",
    "model":               "module tracking recorder cli tuning",
    "module":              "cli tuning",
    "cli":                 "fitting backbones compare tuning",
    "fitting":             "backbones compare tuning",
    "backbones":           "compare",
    # {losses, gradcache, optim, features, evaluation} ← module
    "losses":              "model module tracking recorder cli tuning",
    "gradcache":           "model init_from module tracking recorder cli tuning",
    "micro_batch":         "init_from module tracking recorder cli tuning",
    "init_from":           "module tracking recorder cli tuning",
    "checkpoints":         "runs module tracking recorder cli tuning",
    "checkpoint_content":  "init_from module runs tracking recorder cli tuning",
    # sharded_checkpoints ← checkpoints ← sharding ← module
    "sharded_checkpoints": "model checkpoints sharding runs module tracking recorder cli tuning",
    "sharding":            "runs module tracking recorder cli tuning",
    "guard":               "module tracking recorder cli tuning",
    # ranks ← stopping
    "ranks":               "stopping module tracking recorder cli tuning",
    "stopping":            "module tracking recorder cli tuning",
    # storage ← manifest ← {chunks, tars} ← {held_out, training}; record ← {write, chunks, tars}
    "shards.storage":      "shards.manifest shards.chunks shards.tars shards.training shards.convert",
    "shards.record":       "shards.manifest shards.chunks shards.tars shards.training shards.convert",
    "shards.chunks":       "shards.tars shards.held_out shards.training shards.convert",
    "shards.tars":         "shards.chunks shards.held_out shards.training shards.convert",
    "shards":              "data.datamodule towers model module tracking recorder cli tuning",
    "timing":              "module tracking recorder cli tuning",
    "optim":               "module tracking recorder cli tuning",
    "towers.base":         "towers.image towers.text",
    "towers.image":        "towers.text",
    "towers.text":         "towers.image",
    "features":            "data towers model module extract tracking recorder cli tuning",
    "extract":             "module tracking recorder cli tuning",
    "evaluation":          "module tracking recorder cli tuning",
    # {model, evaluation, data.classes} ← embedding ← {evaluate, classify}
    # classes ← {torchvision_sets, hub_classes} ← named
    "data.classes":        "data.named data.hub_classes data.torchvision_sets data.datasets data.datamodule",
    "data.torchvision_sets": "data.named data.datasets data.datamodule",
    "data.hub_classes":    "data.named data.datasets data.datamodule",
    "data.named":          "data.datasets data.datamodule",
    "embedding":           "module tracking recorder cli tuning evaluate evaluating classify embed",
    "evaluating":          "module tracking recorder cli tuning classify embed",
    "embed":               "module tracking recorder cli tuning evaluate evaluating classify",
    "evaluate":            "module recorder cli tuning",
    "classify":            "module tracking recorder cli tuning",
    "tracking":            "backbones cli compare tuning",
    "tracking.account":    "data towers model module extract recorder features",
    "tracking.artifacts":  "data towers model module extract recorder tracking.logger",
    "recorder":            "backbones cli compare tuning",
    "export":              "cli tuning",
    "exporting":           "search cli tuning",
    "search.index":        "search.app",
    "search":              "module tracking recorder cli tuning",
}
ONLY_IN: dict[str, str] = {
    # package              may be imported by
    "wandb":               "tracking",
    "lightning":           "module data.datamodule recorder guard checkpoints sharding stopping ranks "
                           "tracking runs embed cli fitting tuning.watch",
    "pytorch_lightning":   "",  # the old name of the same package, with classes of its own
    "faiss":               "search",
    "peft":                "lora",
    "gradio":              "search.page search.endpoints search.server",
    "starlette":           "search.app search.guard search.server",
    "onnxruntime":         "exporting search",
    "onnxscript":          "exporting",
    "open_clip":           "towers.open_clip foreign exporting",
    "datasets":            "data.hub",
}
EXCEPT = {
    # what fetches an artifact knows neither data nor models
    ("data.origin", "tracking.artifacts"),
    ("data.datamodule", "tracking.artifacts"),
    ("bundle", "tracking.artifacts"),
    ("evaluating.outputs", "tracking.evaluations"),
    # thumbnails, which need no run
    ("search.grid", "tracking.grids"),
}
NEVER_IN: dict[str, str] = {
    # module               may not import
    "errors":              "torch numpy",
    "data.captions":       "torch numpy",  # records: names and words
    "data.sources":        "torch numpy",
}
# fmt: on

VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

# Where the name that is imported is not the name of the package that is installed.
DISTRIBUTIONS = {"PIL": "pillow", "faiss": "faiss-cpu", "yaml": "pyyaml", "open_clip": "open_clip_torch"}

Imports = dict[str, set[str]]


def module_name(path: Path) -> str:
    """`data.captions` for src/clip_lightning/data/captions.py, `data` for the __init__ beside it."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, module: str, *, is_package: bool) -> set[str]:
    """Full names of everything that the source imports, inside functions too.

    `from a import b` counts as `a.b`, which may be a module or a name within one.
    """
    package = ["clip_lightning", *filter(None, module.split("."))]
    if not is_package:
        package.pop()
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def imports_of_the_package() -> Imports:
    """Module → what it imports. The package's own names and command table may name anything."""
    return {
        module_name(path): imported_names(
            path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py"
        )
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in {"__init__.py", "__main__.py"}
    }


def within(name: str, modules: str | Iterable[str]) -> bool:
    """True when the name is one of the modules, or lies in one."""
    listed = modules.split() if isinstance(modules, str) else modules
    return any(name == module or name.startswith(f"{module}.") for module in listed)


def violations(imports: Mapping[str, set[str]]) -> list[str]:
    """One line for each import that the tables forbid."""
    found = []
    for module, names in imports.items():
        for name in sorted(names):
            own = name.removeprefix("clip_lightning.") if within(name, "clip_lightning") else None
            banned = MAY_NOT_IMPORT if own is not None else NEVER_IN
            wrong = not any(
                module == importer and within(own or name, target) for importer, target in EXCEPT
            ) and any(
                within(module, importer) and within(own or name, targets)
                for importer, targets in banned.items()
            )
            misplaced = own is None and any(
                within(name, package) and not within(module, places) for package, places in ONLY_IN.items()
            )
            if wrong or misplaced:
                found.append(f"{module} imports {name}")
    return found


def test_imports_go_in_one_direction():
    assert violations(imports_of_the_package()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.captions", "from clip_lightning.data.formats import read"),
        ("data.captions", "from . import datamodule"),
        ("data.formats", "from .datasets import CaptionDataset"),
        ("data.datamodule", "from clip_lightning import towers"),
        ("data.datasets", "def f():\n    from ..model import CLIP"),
        ("model", "import clip_lightning.training.module"),
        ("losses", "from clip_lightning.training.module import CLIPModule"),
        ("model", "import lightning.pytorch as pl"),
        ("module", "def f():\n    import wandb"),
        ("module", "from pytorch_lightning import LightningModule"),
        ("data.captions", "import torch.utils.data"),
    ],
)
def test_a_wrong_direction_is_seen(module: str, source: str):
    assert len(violations({module: imported_names(source, module, is_package=False)})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.datamodule", "from .datasets import CaptionDataset\nimport lightning.pytorch as pl"),
        ("module", "from clip_lightning.model.clip import CLIP"),
        ("modules", "import numpy"),
        ("tracking.logger", "import wandb"),
        ("cli", "from lightning.pytorch.cli import LightningCLI\nfrom .module import CLIPModule"),
    ],
)
def test_a_right_direction_is_let_through(module: str, source: str):
    assert violations({module: imported_names(source, module, is_package=False)}) == []


def test_modules_import_from_where_a_name_is_defined():
    """`from clip_lightning import CLIP` inside the package would hide the direction from the tables."""
    hidden = [
        f"{module} imports {name}"
        for module, names in imports_of_the_package().items()
        for name in names & {f"clip_lightning.{public}" for public in PUBLIC_NAMES - {"__version__"}}
    ]
    assert hidden == []


def test_every_module_has_a_telling_name():
    parts = {part for module in imports_of_the_package() for part in module.split(".")}
    assert parts & VAGUE_NAMES == set()


def normal(distribution: str) -> str:
    """`open-clip-torch` for `open_clip_torch>=3.2`."""
    return re.match(r"[\w.-]+", distribution).group().lower().replace("_", "-")


def test_every_imported_package_is_declared():
    project = PYPROJECT["project"]
    declared = {normal(each) for each in project["dependencies"]}
    declared |= {normal(each) for extra in project["optional-dependencies"].values() for each in extra}
    imported = {name.partition(".")[0] for names in imports_of_the_package().values() for name in names}
    third_party = imported - sys.stdlib_module_names - {"clip_lightning"}
    undeclared = {name for name in third_party if normal(DISTRIBUTIONS.get(name, name)) not in declared}
    assert undeclared == set(), "add them to pyproject.toml and constraints.txt"


def test_public_names():
    package = importlib.import_module("clip_lightning")
    assert {*package.__all__, "__version__"} == PUBLIC_NAMES
    assert set(dir(package)) >= PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_version_is_the_one_in_pyproject():
    assert importlib.import_module("clip_lightning").__version__ == PYPROJECT["project"]["version"]


# Times are not tested, machines differ; what makes the time is: none of these may be imported early.
SLOW_PACKAGES = ("torch", "torchvision", "lightning", "wandb", "transformers", "timm", "numpy")


def run_python(program: str) -> str:
    """What a fresh interpreter prints on stdout; its failure fails the test, with what it said."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_slow():
    loaded = run_python("import sys, clip_lightning; print(*sys.modules)").split()
    assert {name for name in SLOW_PACKAGES if name in loaded} == set()


def test_the_command_table_imports_nothing_slow():
    program = f"""
import sys
from clip_lightning.__main__ import main
try:
    status = main(["--help"])
except SystemExit as stop:
    status = stop.code
assert not status, status
print("LOADED", *[name for name in {SLOW_PACKAGES!r} if name in sys.modules])
"""
    *said, loaded = run_python(program).strip().splitlines()
    assert "fit" in " ".join(said)
    assert loaded.split() == ["LOADED"]


def test_the_model_needs_neither_lightning_nor_wandb():
    program = """
import sys
for name in ("lightning", "pytorch_lightning", "wandb"):
    sys.modules[name] = None
import clip_lightning
print(clip_lightning.CLIP.from_pretrained.__name__, clip_lightning.info_nce.__name__)
print(clip_lightning.siglip_loss.__name__, clip_lightning.retrieval_metrics.__name__)
"""
    assert run_python(program).split() == ["from_pretrained", "info_nce", "siglip_loss", "retrieval_metrics"]
