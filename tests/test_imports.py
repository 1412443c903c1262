"""The architecture of docs/design.md, kept: who may import whom, and what importing the package costs."""

import ast
import importlib
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
    *"__version__ CLIP CLIPModule CaptionDataModule ContrastiveLoss ImageIndex".split(),
    *"info_nce retrieval_metrics siglip_loss zero_shot_classifier".split(),
}

# A room may import from the rooms named before it; search stands beside tracking, which it does not import.
# The modules that lie flat in the package are the ground.
ROOMS = "ground data model evaluation reports tracking training experiments search commands".split()
MAY_IMPORT = {room: set(ROOMS[:place]) for place, room in enumerate(ROOMS)}
MAY_IMPORT["search"] -= {"tracking", "training", "experiments"}

ONLY_IN: dict[str, str] = {
    # package              may be imported by
    "wandb": "wandb_fetch tracking experiments",
    "lightning": "data.datamodule tracking training experiments search commands",
    "pytorch_lightning": "",  # the old name of the same package, with classes of its own
    "torch": "data model evaluation reports tracking training experiments search commands",
    "faiss": "search",
    "peft": "model.lora",
    "starlette": "search.page",
    "uvicorn": "search.page",
    "onnxruntime": "model.export search",
    "onnxscript": "model.export",
    "open_clip": "model",
    "datasets": "data",
    "optuna": "experiments",
    "matplotlib": "reports experiments evaluation",
}

# Where the name that is imported is not the name of the package that is installed.
DISTRIBUTIONS = {"PIL": "pillow", "faiss": "faiss-cpu", "yaml": "pyyaml", "open_clip": "open_clip_torch"}

Imports = dict[str, set[str]]


def module_name(path: Path) -> str:
    """`data.captions` for src/clip_lightning/data/captions.py, `data` for the __init__ beside it."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str) -> set[str]:
    """Full names of everything that the source imports, inside functions too.

    `from a import b` counts as `a.b`, which may be a module or a name within one.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides the direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of_the_package() -> Imports:
    """Module → what it imports. The package's own names and command table may name anything."""
    return {
        module_name(path): imported_names(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in {"__init__.py", "__main__.py"}
    }


def within(name: str, modules: str | Iterable[str]) -> bool:
    """True when the name is one of the modules, or lies in one."""
    listed = modules.split() if isinstance(modules, str) else modules
    return any(name == module or name.startswith(f"{module}.") for module in listed)


def room_of(module: str) -> str:
    """The folder of a module of the package, as `data` for `data.captions`; `ground` for a flat one."""
    first = module.partition(".")[0]
    return first if first in ROOMS else "ground"


def violations(imports: Mapping[str, set[str]]) -> list[str]:
    """Return one line for each import that leads up, or to a package that another room owns."""
    found = []
    for module, names in imports.items():
        here = room_of(module)
        for name in sorted(names):
            if within(name, "clip_lightning"):
                there = room_of(name.removeprefix("clip_lightning").removeprefix("."))
                wrong = there != here and there not in MAY_IMPORT[here]
            else:
                wrong = any(
                    within(name, package) and not within(module, places)
                    for package, places in ONLY_IN.items()
                )
            if wrong:
                found.append(f"{module} imports {name}")
    return found


def test_imports_go_in_one_direction():
    assert violations(imports_of_the_package()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("files", "from clip_lightning.data import captions"),
        ("data.datasets", "def f():\n    from clip_lightning.model.clip import CLIP"),
        ("model.clip", "import clip_lightning.training.module"),
        ("training.module", "def f():\n    import wandb"),
        ("search.index", "from clip_lightning.tracking import logger"),
    ],
)
def test_a_wrong_direction_is_seen(module: str, source: str):
    assert len(violations({module: imported_names(source)})) == 1


def test_there_are_nine_rooms_and_at_most_ten_flat_modules():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == {*ROOMS} - {"ground"}
    assert len([path for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]) <= 10


def test_modules_import_from_where_a_name_is_defined():
    """`from clip_lightning import CLIP` inside the package would hide the direction from the tables."""
    public = {f"clip_lightning.{name}" for name in PUBLIC_NAMES - {"__version__"}}
    assert {module for module, names in imports_of_the_package().items() if names & public} == set()


def test_every_module_has_a_telling_name():
    parts = {part for module in imports_of_the_package() for part in module.split(".")}
    assert parts & {"utils", "util", "common", "helpers", "helper", "misc"} == set()


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
    assert (PACKAGE / "py.typed").is_file()
    package = importlib.import_module("clip_lightning")
    assert {*package.__all__, "__version__"} == PUBLIC_NAMES
    assert set(dir(package)) >= PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_every_file_names_the_same_version():
    version = PYPROJECT["project"]["version"]
    assert importlib.import_module("clip_lightning").__version__ == version
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"clip_lightning-{version}-py3" in (REPOSITORY / "README.md").read_text()
    assert f"\n## [{version}] - " in (REPOSITORY / "CHANGELOG.md").read_text()


# Times are not tested, machines differ; what makes the time is: none of these may be imported early.
SLOW_PACKAGES = ("torch", "torchvision", "lightning", "wandb", "transformers", "timm", "numpy")


HELP = "[main([name, '--help']) for name in COMMANDS if name not in ('embed', 'index')]"  # which need numpy


@pytest.mark.parametrize("command", ["", "main(['--help'])", HELP, "main(['fit', '--lr', '1'])"])
def test_importing_the_package_and_help_imports_nothing_slow(command: str):
    program = f"import sys, clip_lightning\nfrom clip_lightning.__main__ import COMMANDS, main\n{command}"
    line = [sys.executable, "-c", f"{program}\nprint('LOADED', *sys.modules)"]
    loaded = subprocess.check_output(line, text=True).partition("LOADED")[2].split()
    assert {name for name in SLOW_PACKAGES if name in loaded} == set()
