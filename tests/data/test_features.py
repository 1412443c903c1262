"""The feature cache: right values, never stale, never half, whatever happens while it is written."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_lightning.data import features as features_module
from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.data.features import SHARD_ROWS, CacheOptions, FeatureCache, Features
from clip_lightning.data.images import Augmentation, decode_image
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.training import extract as extract_module
from clip_lightning.training.extract import Extractor

Patch = pytest.MonkeyPatch
MakeClip = Callable[..., CLIP]
PLAIN = Augmentation(flip=True)
CAPTIONS = ["red", "a large red circle", "a small blue square on a green background", "", "two"]


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@pytest.fixture
def clip(make_clip: MakeClip) -> CLIP:
    clip = make_clip("random:test_resnet")
    clip.freeze("both")
    return clip


@pytest.fixture
def pictures(tmp_path: Path) -> list[CaptionedImage]:
    """Six different pictures of different shapes."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (40 + 5 * i, 60, 3), dtype=np.uint8)).save(path)
        images.append(CaptionedImage(path, (f"picture {i}",)))
    return images


def extractor(cache: FeatureCache, precision: torch.dtype | None = None) -> Extractor:
    return Extractor(cache, torch.device("cpu"), precision)


def image_features(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage], view: int = 0, **options: Any
) -> Tensor:
    settings = {"augmentation": PLAIN, "title": "pictures", **options}
    found = extractor(cache).image_features(clip.image_tower, pictures, view, **settings)
    return found.rows(range(len(pictures)))


@torch.inference_mode()
def forward(clip: CLIP, pictures: list[CaptionedImage], *, mirrored: bool = False) -> Tensor:
    pixels = torch.stack([clip.transform(decode_image(image.path)) for image in pictures])
    return clip.image_tower(pixels.flip(-1) if mirrored else pixels)


def test_image_features_equal_the_towers_in_half_precision(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage], monkeypatch: Patch
) -> None:
    plain = image_features(cache, clip, pictures)
    assert torch.equal(plain, forward(clip, pictures).half().float())
    mirrored = image_features(cache, clip, pictures, view=1)
    assert torch.equal(mirrored, forward(clip, pictures, mirrored=True).half().float())
    assert not torch.equal(mirrored, plain)
    monkeypatch.setattr(extract_module, "encode_images", lambda *_, **__: pytest.fail("computed again"))
    assert torch.equal(plain, image_features(FeatureCache(cache.root), clip, pictures))


def test_towers_compute_features_in_eval_mode(
    cache: FeatureCache, make_clip: MakeClip, pictures: list[CaptionedImage]
) -> None:
    """Neither the statistics of a batch nor its padding nor dropout is in the features; their mode stays."""
    clip = make_clip("random:test_resnet")
    clip.train()
    given = image_features(cache, clip, pictures)
    said = extractor(cache).text_features(clip.text_tower, CAPTIONS, "captions").rows(range(len(CAPTIONS)))
    assert clip.image_tower.training and clip.text_tower.training
    clip.eval()
    torch.testing.assert_close(given, forward(clip, pictures), atol=1e-3, rtol=1e-3)
    with torch.inference_mode():
        alone = torch.cat([clip.text_tower(*clip.tokenize([text]).values()) for text in CAPTIONS])
    torch.testing.assert_close(said, alone, atol=1e-3, rtol=1e-3)


def test_views_depend_on_the_augmentation_only_from_the_third_on(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    crops = Augmentation(flip=True, min_scale=0.3, colour=0.2)
    plain = image_features(cache, clip, pictures, augmentation=crops)
    mirrored = image_features(cache, clip, pictures, view=1, augmentation=crops)
    assert torch.equal(mirrored, forward(clip, pictures, mirrored=True).half().float())
    for view in (0, 1):
        image_features(cache, clip, pictures, view=view)
    assert len(cache.entries()) == 2  # so crops and colours are not part of their keys
    still = image_features(cache, clip, pictures, view=1, augmentation=replace(crops, flip=False))
    second = image_features(cache, clip, pictures, view=2, augmentation=crops)
    third = image_features(cache, clip, pictures, view=3, augmentation=crops)
    for one, other in ((still, plain), (still, mirrored), (second, plain), (second, third)):
        assert (one != other).any(dim=1).all()
    elsewhere = FeatureCache(tmp_path / "elsewhere")
    assert torch.equal(second, image_features(elsewhere, clip, pictures, view=2, augmentation=crops))


@pytest.mark.parametrize(
    ("augmentation", "views"),
    [(Augmentation(), 2), (Augmentation(min_scale=0.5), 4), (Augmentation(flip=False, colour=0.1), 4)],
)
def test_no_view_is_computed_twice(
    cache: FeatureCache, clip: CLIP, scenes: Path, augmentation: Augmentation, views: int
) -> None:
    """Without crops and colours there is a plain view and its mirror image, however many are asked for."""
    clip.text_tower.frozen = False
    options = {"cache": str(cache.root), "cache_options": CacheOptions(views=4), "augmentation": augmentation}
    data = CaptionDataModule(clip.transform, clip.tokenize, scenes, batch_size=8, num_workers=0, **options)
    data.setup()
    extractor(cache).cache_frozen_towers(clip, data, "train")
    assert sorted(entry.key["view"] for entry in cache.entries()) == list(range(views))


def test_bf16_features_are_close(cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage]) -> None:
    rough = extractor(cache, torch.bfloat16).image_features(clip.image_tower, pictures, 0, PLAIN, "bf16")
    exact = forward(clip, pictures)
    assert ((rough.rows(range(6)) - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.03
    assert len(cache.entries()) == 1
    image_features(cache, clip, pictures)
    assert len(cache.entries()) == 2


def test_rows_come_in_the_order_asked_for(cache: FeatureCache, monkeypatch: Patch) -> None:
    count = 2 * SHARD_ROWS + 3
    values = np.arange(3 * count, dtype=np.float32).reshape(count, 3) % 2000
    stored = cache.get({"kind": "order"}, count, lambda rows: values[rows.start : rows.stop], "rows")
    wanted = [count - 1, 0, SHARD_ROWS, SHARD_ROWS - 1, 5, 5]
    assert torch.equal(stored.rows(wanted), torch.from_numpy(values[wanted]))
    assert stored.rows([]).shape == (0, 3) and stored.rows([1]).dtype == torch.float32
    monkeypatch.setattr("clip_lightning.data.features.LEAST_FREE", 2**60)
    again = pickle.loads(pickle.dumps(stored))  # memory-mapped, then in memory
    for _ in range(2):
        assert torch.equal(again.rows(wanted), stored.rows(wanted))
        again.move_to(torch.device("cpu"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_features_keep_no_file_open(cache: FeatureCache) -> None:
    """Captions of a large data set are in more shards than a process may have open files."""
    before = len(os.listdir("/proc/self/fd"))
    stored = cache.get({}, 20 * SHARD_ROWS, lambda rows: np.ones((len(rows), 2), np.float32), "rows")
    stored.rows(range(0, 20 * SHARD_ROWS, SHARD_ROWS))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_broken_images_are_nan(cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage]) -> None:
    pictures[3].path.write_bytes(b"")
    stored = image_features(cache, clip, pictures)
    assert stored.isnan().all(dim=1).tolist() == [False, False, False, True, False, False]
    del pictures[3]
    expected = forward(clip, pictures).half().float()
    torch.testing.assert_close(stored[[0, 1, 2, 4, 5]], expected, rtol=2e-3, atol=2e-3)


def test_unreadable_files_are_not_cached_as_broken_images(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage], monkeypatch: Patch
) -> None:
    """The disk is away for a moment, for longer, and back."""
    expected = forward(clip, pictures).half().float()
    gone, away = pictures[2].path, pictures[2].path.with_suffix(".away")
    monkeypatch.setattr("clip_lightning.data.images.time.sleep", lambda seconds: None)
    identity = extract_module._identity

    def lose(image: CaptionedImage) -> str:
        said = identity(image)
        if image.path == gone:
            gone.rename(away)
        return said

    monkeypatch.setattr(extract_module, "_identity", lose)
    with pytest.raises(RunFailed, match=r"2\.png cannot be read at the moment \(No such file"):
        image_features(cache, clip, pictures)
    away.rename(gone)
    monkeypatch.setattr("clip_lightning.data.images.time.sleep", lambda seconds: away.rename(gone))
    assert torch.equal(image_features(cache, clip, pictures), expected)


def change_weight(clip: CLIP, pictures: list[CaptionedImage]) -> None:
    clip.image_tower.state_dict()[next(iter(clip.image_tower.state_dict()))].flatten()[0] += 1e-3
    clip.image_tower.freeze()  # as after loading, when the digest is taken


def change_pixels(clip: CLIP, pictures: list[CaptionedImage]) -> None:
    """Write other pixels in as many bytes."""
    content = pictures[1].path.read_bytes()
    pictures[1].path.write_bytes(content[:-20] + bytes(8) + content[-12:])


def change_transform(**fields: Any) -> Callable[..., None]:
    return lambda clip, _: setattr(clip.image_tower, "transform", replace(clip.transform, **fields))


IMAGE_CHANGES: dict[str, Callable[..., Any]] = {
    "weight": change_weight,
    "pixels": change_pixels,
    "size": change_transform(size=(48, 48)),
    "interpolation": change_transform(interpolation="bilinear"),
    "order": lambda clip, pictures: pictures.reverse(),
    "augmentation": lambda clip, pictures: {"augmentation": Augmentation(min_scale=0.5)},
}


@pytest.mark.parametrize("change", IMAGE_CHANGES)
def test_every_change_that_affects_images_makes_a_new_entry(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage], change: str
) -> None:
    clip.image_tower.transform = replace(clip.transform, interpolation="bicubic")
    before = image_features(cache, clip, pictures, view=2)
    after = image_features(cache, clip, pictures, view=2, **(IMAGE_CHANGES[change](clip, pictures) or {}))
    assert len(cache.entries()) == 2
    assert not torch.equal(before.nan_to_num(), after.nan_to_num())


def test_every_change_that_affects_captions_makes_a_new_entry(
    cache: FeatureCache, clip: CLIP, make_clip: MakeClip, bert: Path
) -> None:
    def cached(clip: CLIP, captions: list[str]) -> int:
        extractor(cache).text_features(clip.text_tower, captions, "captions")
        return len(cache.entries())

    assert cached(clip, CAPTIONS) == 1
    assert cached(clip, CAPTIONS) == 1
    assert cached(clip, [*CAPTIONS[:-1], "three"]) == 2
    assert cached(clip, CAPTIONS[::-1]) == 3
    # two captions are not one with the line break between
    assert cached(clip, ["a\nb"]) == 4
    assert cached(clip, ["a", "b"]) == 5
    pooled = make_clip(text=f"random:{bert}@cls")
    pooled.text_tower.freeze()
    assert cached(pooled, CAPTIONS) == 6
    clip.tokenize.max_length -= 1
    assert cached(clip, CAPTIONS) == 7
    next(clip.text_tower.parameters()).data[0] += 1
    clip.text_tower.freeze()
    assert cached(clip, CAPTIONS) == 8


def noise(rows: range, width: int = 16) -> np.ndarray:
    return np.stack([np.random.default_rng(row).standard_normal(width) for row in rows]).astype(np.float32)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_bit,
    "a truncated file": lambda file: os.truncate(file, 300),
    "an empty file": lambda file: os.truncate(file, 0),
    "a missing file": lambda file: file.unlink(),
    "a shard under another's name": lambda file: shutil.copy(sorted(file.parent.glob("*.npy"))[0], file),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_shards_are_computed_again(cache: FeatureCache, damage: Callable[[Path], object]) -> None:
    count = 3 * SHARD_ROWS - 100
    cache.get({"kind": "noise"}, count, noise, "rows")
    (entry,) = cache.entries()
    before = {file.name: file.read_bytes() for file in entry.path.glob("*.npy")}
    damage(sorted(entry.path.glob("*.npy"))[1])
    compute = Mock(wraps=noise)
    stored = FeatureCache(cache.root).get({"kind": "noise"}, count, compute, "rows")
    compute.assert_called_once_with(range(SHARD_ROWS, 2 * SHARD_ROWS))
    assert {file.name: file.read_bytes() for file in entry.path.glob("*.npy")} == before
    assert torch.equal(stored.rows(range(count)), torch.from_numpy(noise(range(count))).half().float())


def test_a_damaged_manifest_is_written_again(cache: FeatureCache) -> None:
    key = {"kind": "image", "name": "one"}
    cache.get(key, 10, noise, "rows")
    (entry,) = cache.entries()
    manifest = entry.path / "manifest.json"
    intact = manifest.read_bytes()
    for content in (b"", b'{"key": {"ki', b"\xff\xfe", b"[]", b"null", b'{"key": 3, "rows": 1}'):
        manifest.write_bytes(content)
        assert cache.entries() == []
        cache.get(key, 10, pytest.fail, "rows")  # the features themselves are intact
        assert manifest.read_bytes() == intact


PREAMBLE = """
    import os, random, signal, sys, time
    from pathlib import Path
    import numpy as np
    from clip_lightning.data.features import SHARD_ROWS, FeatureCache

    ROOT, COUNT = Path(sys.argv[1]), int(sys.argv[2])

    def compute(rows):
        with open(ROOT / "log", "a") as log:
            log.write(f"{rows.start}\\n")
        time.sleep(0.005)
        return np.stack([np.random.default_rng(row).standard_normal(16) for row in rows]).astype(np.float32)

    def child(seconds=0.0):
        process = os.fork()
        if process == 0:
            time.sleep(seconds)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of the progress bar
            FeatureCache(ROOT / "cache").get({"kind": "noise"}, COUNT, compute, "rows")
            os._exit(0)
        return process
"""
KILLED = """
    random.seed(0)
    log = ROOT / "log"
    log.touch()
    for _ in range(20):
        size = log.stat().st_size + random.randrange(20)
        process = child()
        deadline = time.monotonic() + 10
        while log.stat().st_size <= size and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.05))
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
"""
TOGETHER = """
    processes = [child(), child(0.02)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
"""


def in_process(script: str, folder: Path, count: int) -> list[int]:
    """Run the script, and say which shards it began to compute, in that order."""
    source = textwrap.dedent(PREAMBLE) + textwrap.dedent(script)
    subprocess.run([sys.executable, "-c", source, str(folder), str(count)], check=True, timeout=120)
    return [int(line) // SHARD_ROWS for line in (folder / "log").read_text().split()]


def test_an_entry_is_bit_identical_after_twenty_kills(tmp_path: Path) -> None:
    count = 150 * SHARD_ROWS - 7
    began = in_process(KILLED, tmp_path, count)
    cache = FeatureCache(tmp_path / "cache")
    (entry,) = cache.entries()
    done = len(list(entry.path.glob("*.npy")))
    assert 0 < done < 150  # the kills came while it was written
    assert len(began) > done
    assert len(began) - done <= 20  # a kill costs no more than the shard in hand
    stored = cache.get({"kind": "noise"}, count, noise, "rows")
    undisturbed = FeatureCache(tmp_path / "undisturbed")
    expected = undisturbed.get({"kind": "noise"}, count, noise, "rows")
    assert torch.equal(stored.rows(range(count)), expected.rows(range(count)))
    (twin,) = undisturbed.entries()
    shards = {file.name: file.read_bytes() for file in entry.path.glob("*.npy")}
    assert shards == {file.name: file.read_bytes() for file in twin.path.glob("*.npy")}
    assert not list(entry.path.glob(".0*.tmp"))


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    count = 40 * SHARD_ROWS
    began = in_process(TOGETHER, tmp_path, count)
    assert sorted(began) == list(range(40))  # each shard once
    stored = FeatureCache(tmp_path / "cache").get({"kind": "noise"}, count, pytest.fail, "rows")
    assert torch.equal(stored.rows(range(count)), torch.from_numpy(noise(range(count))).half().float())


def fill(cache: FeatureCache, *names: str) -> None:
    """Entries of 10 kB and a little, used one hour after another, the last of them half a day ago."""
    for hours, name in enumerate(names):
        cache.get({"kind": "image", "name": name}, 10, lambda rows: noise(rows, 500), name)
        (entry,) = (entry for entry in cache.entries() if entry.key["name"] == name)
        used = time.time() - 12 * 3600 + (hours - len(names)) * 3600
        os.utime(entry.path / "manifest.json", (used, used))


def names(cache: FeatureCache) -> list[str]:
    return [entry.key["name"] for entry in cache.entries()]


def test_the_least_recently_used_entries_are_removed_first(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(FeatureCache(root), "oldest", "old", "new")
    cache = FeatureCache(root, budget_bytes=25_000)
    assert names(cache) == ["new", "old", "oldest"]
    fill(FeatureCache(root), "oldest")  # used again
    assert names(cache) == ["oldest", "new", "old"]
    cache.get({"kind": "image", "name": "newest"}, 10, lambda rows: noise(rows, 500), "rows")
    assert names(cache) == ["newest", "oldest"]


def test_entries_in_use_are_kept_beyond_the_budget(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(FeatureCache(root), "old")
    cache = FeatureCache(root, budget_bytes=0)
    one = cache.get({"kind": "image", "name": "one"}, 10, noise, "rows")
    other = FeatureCache(root, budget_bytes=0)  # another run
    two = other.get({"kind": "image", "name": "two"}, 10, noise, "rows")
    assert sorted(names(cache)) == ["one", "two"]
    assert other.prune(0)  # by hand, everything goes; what is mapped stays readable
    assert torch.equal(one.rows(range(10)), two.rows(range(10)))


def test_a_finished_entry_may_be_in_a_read_only_folder(cache: FeatureCache, monkeypatch: Patch) -> None:
    cache.get({}, 10, noise, "rows")
    refused = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "utime", Mock(side_effect=refused))
    assert cache.get({}, 10, pytest.fail, "rows").rows([3]).shape == (1, 16)


def test_a_cache_that_cannot_be_written(cache: FeatureCache, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot be written \(Not a dir.*, give another --data\.cache"):
            FeatureCache(root).get({}, 10, noise, "rows")
    with pytest.raises(UserError, match=r"half precision; use --data\.cache off"):
        cache.get({}, 2, lambda rows: np.full((len(rows), 2), 1e6, np.float32), "rows")
    assert isinstance(cache.get({"none": 0}, 0, pytest.fail, "rows"), Features)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(features_module, "write_atomically", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        cache.get({}, 10, noise, "rows")


def test_list_and_prune(tmp_path: Path, monkeypatch: Patch, ran: Any) -> None:
    folder = str(tmp_path / "cache")
    fill(FeatureCache(Path(folder)), "old", "new")

    def printed(*words: str, folder: str | None = folder) -> dict[str, Any]:
        place = [] if folder is None else ["--folder", folder]
        said = ran("cache", *words, *place, "--json")
        assert said.err == ""
        return json.loads(said.out)

    listed = printed("list")
    assert [row["tower"] for row in listed["entries"]] == ["new", "old"]
    assert listed["bytes"] == sum(row["bytes"] for row in listed["entries"]) > 20_000
    assert {"folder", "kind", "view", "rows", "last_used"} < set(listed["entries"][0])
    removed = printed("prune", "--keep_gb", "15e-6")
    assert [row["tower"] for row in removed["removed"]] == ["old"]
    assert [row["tower"] for row in printed("list")["entries"]] == ["new"]
    assert "1 entries" in ran("cache", "list", "--folder", folder).out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert printed("list", folder=None) == {"entries": [], "bytes": 0}


@pytest.mark.parametrize("name", ["thesis", "d41d8cd98f00b204e9800998ecf8427e"])
@pytest.mark.parametrize("manifest", ['{"key": {"kind": "image"}, "rows": 3}', '{"files": []}', "no JSON"])
def test_other_folders_are_neither_listed_nor_removed(cache: FeatureCache, name: str, manifest: str) -> None:
    theirs = cache.root / name
    theirs.mkdir(parents=True)
    (theirs / "manifest.json").write_text(manifest)
    np.save(theirs / "images-00000-of-00001.npy", np.zeros(9))  # as `embed` names its shards
    cache.budget_bytes = 0
    cache.get({"kind": "image"}, 10, noise, "rows")
    assert [entry.rows for entry in cache.entries()] == [10]
    assert [entry.rows for entry in cache.prune(0)] == [10]
    assert len(list(theirs.iterdir())) == 2
