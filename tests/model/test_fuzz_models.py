"""Changed files of models, caches, checkpoints, indices: what they held, or one line; no other answer."""

import copy
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_fuzz import EDITS, JSON, Edits, edited

from clip_lightning.__main__ import main
from clip_lightning.data.features import FeatureCache
from clip_lightning.errors import UserError
from clip_lightning.model.bundle import _companions
from clip_lightning.model.clip import CLIP
from clip_lightning.search.index import ImageIndex
from clip_lightning.training.checkpoints import SafeCheckpointIO, damage

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
LONG = settings(max_examples=1000, deadline=None)
BOTH = [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.faults)]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value within a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


def check_copies(examples: settings, folder: Path, check: Callable[..., None], **drawn: Any) -> None:
    """Check copies of a folder, each with other draws."""

    @examples
    @given(**drawn)
    def check_copy(**values: Any) -> None:
        with tempfile.TemporaryDirectory() as place:
            check(shutil.copytree(folder, Path(place) / "copy"), **values)

    check_copy()


def loaded(folder: Path) -> dict[str, torch.Tensor] | None:
    """The weights of what lies there; None where it is refused in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return CLIP.from_pretrained(folder).state_dict()
        except UserError as error:
            assert "\n" not in str(error)
            return None


@pytest.mark.parametrize("examples", BOTH)
def test_a_bundle_with_another_configuration(bundle: Path, examples: settings) -> None:
    config = json.loads((bundle / "config.json").read_text())
    weights = loaded(bundle)
    assert weights is not None

    # not the sizes: a number of layers drawn at random may take hours to build
    others = st.sampled_from(["", "x", "../x", "hf-hub:a/b", None, [], {}])
    values = st.integers(-3, 40) | st.floats(-3, 40) | others

    def check(copied: Path, path: tuple[Any, ...], new: Any) -> None:
        changed = copy.deepcopy(config)
        reduce(getitem, path[:-1], changed)[path[-1]] = new
        (copied / "config.json").write_text(json.dumps(changed))
        if (found := loaded(copied)) is not None:
            assert found.keys() == weights.keys()
            assert all(torch.equal(value, found[name]) for name, value in weights.items())

    check_copies(examples, bundle, check, path=st.sampled_from([*places(config)]), new=values)


@pytest.mark.parametrize("examples", BOTH)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_bundle_with_other_bytes(bundle: Path, examples: settings, name: str) -> None:
    content, weights = (bundle / name).read_bytes(), loaded(bundle)
    assert weights is not None

    def check(copied: Path, edits: Edits) -> None:
        (copied / name).write_bytes(edited(content, edits))
        if (found := loaded(copied)) is not None and name != "model.safetensors":
            assert all(torch.equal(value, found[key]) for key, value in weights.items())
        if found is not None and name == "tokenizer.json":
            assert edited(content, edits) == content, "another tokenizer is refused"

    check_copies(examples, bundle, check, edits=EDITS)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        (None, {"tokenizer_files": ["../secret.txt"]}, "'../secret.txt' in tokenizer_files is not the name"),
        (None, {"tokenizer_files": ["/etc/passwd"]}, "'/etc/passwd' in tokenizer_files is not the name"),
        (None, {"head": "triple"}, "unknown head 'triple'"),
        (None, {"metrics": {"rsum": "x"}}, "or its metrics are not numbers"),
        (None, {"training_data": "x"}, "its training_data is not an object"),
        ("transform", {"size": [10**6, 10**6]}, "expected sides of 1 to 4096 pixels"),
        ("transform", {"size": [32, 32, 32]}, "expected sides of 1 to 4096 pixels"),
        ("transform", {"shortest_edge": 16}, "shortest_edge of at least the size"),
        ("transform", {"shortest_edge": 10**6}, "expected sides of 1 to 4096 pixels"),
        ("transform", {"std": [0, 0, 0]}, "a finite mean and a std above 0 for 3 channels"),
        ("transform", {"mean": [0, 0, float("nan")]}, "a finite mean and a std above 0 for 3 channels"),
        ("transform", {"mean": [0]}, "a finite mean and a std above 0 for 3 channels"),
        ("transform", {"interpolation": "nearest"}, "interpolation='nearest'"),
        ("text_tower", {"max_length": -1}, "max_length -1: expected 1 to"),
        ("text_tower", {"max_length": 10**9}, "max_length 1000000000: expected 1 to"),
        ("text_tower", {"max_length": "x"}, "max_length 'x': expected 1 to"),
        ("text_tower", {"pooling": "sum"}, "unknown pooling 'sum'"),
        ("text_tower", {"tokenize": {"pad_id": "x"}}, "pad_id 'x'"),
        # what reaches for other files or a server
        ("image_tower", {"architecture": "hf-hub:timm/resnet18.a1_in1k"}, "is not an architecture of timm"),
        ("image_tower", {"arguments": {"checkpoint_path": "/etc/passwd"}}, "is not an argument of an arch"),
        ("image_tower", {"arguments": {"pretrained_cfg": {"url": "https://x"}}}, "is not an argument of an"),
        ("image_tower", {"arguments": {"cache_dir": "/tmp"}}, "is not an argument of an architecture"),
    ],
)
def test_a_bundle_of_impossible_values_with_checksums_that_fit(
    bundle: Path, tmp_path: Path, part: str | None, change: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(bundle, tmp_path / "model")
    (tmp_path / "secret.txt").write_text("mine")
    config = json.loads((bundle / "config.json").read_text())
    (config if part is None else config[part]).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() | _companions(folder, config)
    save_file(state, folder / "model.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=f"cannot be loaded .*{re.escape(said)}"):
        CLIP.from_pretrained(folder)


@pytest.mark.parametrize("examples", BOTH)
def test_a_cache_with_other_bytes_gives_what_was_computed(examples: settings, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    key = {"kind": "image", "name": "x"}

    def rows(folder: Path) -> torch.Tensor:
        found = FeatureCache(folder).get(key, len(values), lambda part: values[part.start : part.stop], "x")
        return found.rows(range(len(values)))

    truth = rows(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".npy", ".json")]
    assert {path.suffix for path in files} == {".npy", ".json"}

    def check(copied: Path, file: Path, edits: Edits, value: Any) -> None:
        target = copied / file.relative_to(tmp_path)
        target.write_bytes(edited(file.read_bytes(), edits))
        assert torch.equal(rows(copied), truth)
        if file.suffix == ".json":
            target.write_text(json.dumps(value))
            assert torch.equal(rows(copied), truth)

    check_copies(examples, tmp_path, check, file=st.sampled_from(files), edits=EDITS, value=JSON)


@pytest.mark.parametrize("examples", BOTH)
def test_a_checkpoint_with_other_bytes(examples: settings, tmp_path: Path) -> None:
    content = {"weights": torch.arange(50.0), "step": 3}
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "last.ckpt")
    whole = (tmp_path / "last.ckpt").read_bytes()
    target = tmp_path / "other.ckpt"
    edit = st.tuples(st.integers(0, len(whole)), st.integers(0, 9), st.binary(max_size=9))

    @examples
    @given(edits=st.lists(edit, max_size=3))
    def check(edits: Edits) -> None:
        target.write_bytes(edited(whole, edits))
        if damage(target) is None:
            try:
                found = torch.load(target, weights_only=True)
            except Exception:  # of its table of contents, which no checksum covers; `check_fits` refuses it
                return
            assert torch.equal(found["weights"], content["weights"]) and found["step"] == content["step"]

    check()


@pytest.mark.parametrize("examples", BOTH)
def test_an_index_with_other_bytes(
    bundle: Path, scenes: Path, examples: settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("index") / "index"
    assert main(["index", str(bundle), str(scenes), "--out", str(root), "--onnx", "false"]) == 0
    query = np.load(next(root.glob("*.npy")), allow_pickle=False)[:1]
    files = [path for path in root.iterdir() if path.suffix in (".json", ".npy", ".jsonl")]
    known = {path.name for path in scenes.rglob("*.jpg")}

    def check(copied: Path, file: Path, edits: Edits) -> None:
        (copied / file.relative_to(root)).write_bytes(edited(file.read_bytes(), edits))
        try:
            index = ImageIndex.load(copied)
            hits = index.search(query, 3)
        except UserError as error:
            assert "\n" not in str(error)
            return
        assert len(hits) == 1 and len(hits[0]) == 3
        if file.suffix != ".jsonl":
            assert {Path(hit.path).name for hit in hits[0]} <= known

    check_copies(examples, root, check, file=st.sampled_from(sorted(files)), edits=EDITS)
