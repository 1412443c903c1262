"""The feature cache: right values, never stale, never half, whatever happens while it is written."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_lightning.__main__ import main
from clip_lightning.data import features as features_module
from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.data.features import SHARD_ROWS, FeatureCache, Features
from clip_lightning.data.images import Augmentation, decode_image
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.training import extract as extract_module
from clip_lightning.training.extract import Extractor, cache_frozen_towers

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


# values


def test_pictures_are_what_the_tower_gives_rounded_to_half_precision(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage]
) -> None:
    assert torch.equal(image_features(cache, clip, pictures), forward(clip, pictures).half().float())
    mirrored = image_features(cache, clip, pictures, view=1)
    assert torch.equal(mirrored, forward(clip, pictures, mirrored=True).half().float())
    assert not torch.equal(mirrored, forward(clip, pictures).half().float())


def test_a_tower_in_training_gives_what_it_gives_in_evaluation(
    cache: FeatureCache, make_clip: MakeClip, pictures: list[CaptionedImage]
) -> None:
    """Neither the statistics of a batch nor dropout is in the features, and its mode stays."""
    clip = make_clip("random:test_resnet")
    clip.train()
    given = extractor(cache).image_features(clip.image_tower, pictures, 0, Augmentation(), "")
    said = extractor(cache).text_features(clip.text_tower, ["a red circle", "a blue square"], "")
    assert clip.image_tower.training and clip.text_tower.training
    clip.eval()
    torch.testing.assert_close(
        given.rows(range(len(pictures))), forward(clip, pictures), atol=1e-3, rtol=1e-3
    )
    tokens = clip.tokenize(["a red circle", "a blue square"])
    with torch.no_grad():
        wanted = clip.text_tower(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(said.rows(range(2)), wanted, atol=1e-3, rtol=1e-3)


def test_views_do_not_flip_where_flips_are_off(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage]
) -> None:
    still = image_features(cache, clip, pictures, view=1, augmentation=Augmentation(flip=False))
    assert torch.equal(still, image_features(cache, clip, pictures))


def test_the_second_view_is_the_mirror_image_whatever_the_augmentation(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage]
) -> None:
    crops = Augmentation(flip=True, min_scale=0.3, colour=0.2)
    mirrored = image_features(cache, clip, pictures, view=1, augmentation=crops)
    assert torch.equal(mirrored, forward(clip, pictures, mirrored=True).half().float())
    image_features(cache, clip, pictures, view=1)
    assert len(cache.entries()) == 1  # so crops and colours are no part of its key
    still = replace(crops, flip=False)
    cropped = image_features(cache, clip, pictures, view=1, augmentation=still)
    assert len(cache.entries()) == 2
    assert (cropped != forward(clip, pictures).half().float()).any(dim=1).all()


@pytest.mark.parametrize(
    ("augmentation", "views"),
    [(Augmentation(), 2), (Augmentation(min_scale=0.5), 4), (Augmentation(flip=False, colour=0.1), 4)],
)
def test_no_view_is_computed_twice(
    cache: FeatureCache, clip: CLIP, scenes: Path, augmentation: Augmentation, views: int
) -> None:
    """Without crops and colours there is a plain view and its mirror image, however many are asked for."""
    clip.text_tower.frozen = False
    data = CaptionDataModule(
        clip.transform,
        clip.tokenize,
        scenes,
        batch_size=8,
        num_workers=0,
        views=4,
        augmentation=augmentation,
        cache=str(cache.root),
    )
    data.setup()
    cache_frozen_towers(extractor(cache), clip, data, "train")
    assert sorted(entry.key["view"] for entry in cache.entries()) == list(range(views))


def test_cropped_views_are_functions_of_view_and_row(
    tmp_path: Path, clip: CLIP, pictures: list[CaptionedImage]
) -> None:
    crops = Augmentation(flip=True, min_scale=0.3, colour=0.2)
    once, again = FeatureCache(tmp_path / "a"), FeatureCache(tmp_path / "b")
    second = image_features(once, clip, pictures, view=2, augmentation=crops)
    assert torch.equal(second, image_features(again, clip, pictures, view=2, augmentation=crops))
    others = [
        image_features(once, clip, pictures, view=view, augmentation=crops if view else PLAIN)
        for view in (0, 1, 3)
    ]
    assert all((second != other).any(dim=1).all() for other in others)


def test_bf16_features_are_near(cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage]) -> None:
    rough = extractor(cache, torch.bfloat16).image_features(clip.image_tower, pictures, 0, PLAIN, "bf16")
    exact = forward(clip, pictures)
    difference = (rough.rows(range(6)) - exact).norm(dim=1) / exact.norm(dim=1)
    assert difference.max() < 0.03
    assert len(cache.entries()) == 1
    image_features(cache, clip, pictures)
    assert len(cache.entries()) == 2


def test_captions_do_not_depend_on_their_neighbours(cache: FeatureCache, clip: CLIP) -> None:
    """Whatever the order and the padding in which the tower saw them."""
    stored = extractor(cache).text_features(clip.text_tower, CAPTIONS, "captions").rows(range(len(CAPTIONS)))
    with torch.inference_mode():
        alone = torch.cat([clip.text_tower(*clip.tokenize([text]).values()) for text in CAPTIONS])
    torch.testing.assert_close(stored, alone, rtol=2e-3, atol=2e-3)


def test_rows_come_in_the_order_asked_for(cache: FeatureCache, tmp_path: Path) -> None:
    count = 2 * SHARD_ROWS + 3
    values = np.arange(3 * count, dtype=np.float32).reshape(count, 3) % 2000
    stored = cache.get({"kind": "order"}, count, lambda rows: values[rows.start : rows.stop], "rows")
    wanted = [count - 1, 0, SHARD_ROWS, SHARD_ROWS - 1, 5, 5]
    assert torch.equal(stored.rows(wanted), torch.from_numpy(values[wanted]))
    assert stored.rows([]).shape == (0, 3)
    assert stored.rows([1]).dtype == torch.float32
    assert torch.equal(pickle.loads(pickle.dumps(stored)).rows(wanted), stored.rows(wanted))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_features_keep_no_file_open(cache: FeatureCache) -> None:
    """Captions of a large data set are in more shards than a process may have open files."""
    before = len(os.listdir("/proc/self/fd"))
    stored = cache.get({}, 20 * SHARD_ROWS, lambda rows: np.ones((len(rows), 2), np.float32), "rows")
    stored.rows(range(0, 20 * SHARD_ROWS, SHARD_ROWS))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_values_beyond_half_precision_are_refused(cache: FeatureCache) -> None:
    with pytest.raises(UserError, match=r"half precision; use --data.cache off"):
        cache.get({}, 2, lambda rows: np.full((len(rows), 2), 1e6, np.float32), "rows")


# broken pictures


def test_broken_pictures_are_nan(cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage]) -> None:
    pictures[2].path.write_bytes(b"no picture")
    stored = image_features(cache, clip, pictures)
    assert stored.isnan().all(dim=1).tolist() == [False, False, True, False, False, False]
    whole = [0, 1, 3, 4, 5]
    expected = forward(clip, [pictures[i] for i in whole]).half().float()
    torch.testing.assert_close(stored[whole], expected, rtol=2e-3, atol=2e-3)


def test_broken_pictures_are_left_out_and_counted(
    cache: FeatureCache, clip: CLIP, scenes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    for file in scenes.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = CaptionDataModule(
        clip.transform,
        clip.tokenize,
        folder,
        batch_size=8,
        num_workers=0,
        max_broken=0.1,
        cache=str(cache.root),
    )
    data.setup()
    broken = [data.images("train")[3].path, data.images("val")[1].path]
    for path in broken:
        path.write_bytes(b"")
    for split in ("train", "val"):
        cache_frozen_towers(extractor(cache), clip, data, split)
    batches = {"train": list(data.train_dataloader()), "val": list(data.val_dataloader())}
    assert [len(batch["image_id"]) for batch in batches["train"]] == [8] * 4  # the next picture steps in
    assert all(batch["image_features"].isfinite().all() for part in batches.values() for batch in part)
    (val,) = batches["val"]
    assert (val["image_id"].tolist(), len(val["text_id"])) == ([0, 2, 3], 15)
    with pytest.warns(UserWarning, match="left out"):
        for part in batches.values():
            for batch in part:
                data.on_before_batch_transfer(batch, 0)
    assert set(data.broken) == set(map(str, broken))


# never stale


def test_the_same_again_is_not_computed_again(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = image_features(cache, clip, pictures)
    monkeypatch.setattr(Extractor, "_run", lambda *_: pytest.fail("computed again"))
    assert torch.equal(before, image_features(FeatureCache(cache.root), clip, pictures))


def change_weight(clip: CLIP, pictures: list[CaptionedImage]) -> dict[str, Any]:
    clip.image_tower.state_dict()[next(iter(clip.image_tower.state_dict()))].flatten()[0] += 1e-3
    clip.image_tower.freeze()  # as after loading: the digest is taken anew
    return {}


def change_size(clip: CLIP, pictures: list[CaptionedImage]) -> dict[str, Any]:
    clip.image_tower.transform = replace(clip.transform, size=(48, 48))
    return {}


def change_interpolation(clip: CLIP, pictures: list[CaptionedImage]) -> dict[str, Any]:
    other = {"bilinear": "bicubic", "bicubic": "bilinear"}[clip.transform.interpolation]
    clip.image_tower.transform = replace(clip.transform, interpolation=other)
    return {}


def change_picture(clip: CLIP, pictures: list[CaptionedImage]) -> dict[str, Any]:
    """Other pixels in as many bytes."""
    path = pictures[1].path
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes(8) + content[-12:])
    return {}


def change_order(clip: CLIP, pictures: list[CaptionedImage]) -> dict[str, Any]:
    pictures.reverse()
    return {}


def change_augmentation(clip: CLIP, pictures: list[CaptionedImage]) -> dict[str, Any]:
    return {"augmentation": Augmentation(min_scale=0.5)}


def test_another_version_makes_other_entries(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (extract_module.VERSION, extract_module.VERSION + 1):
        monkeypatch.setattr(extract_module, "VERSION", version)
        image_features(cache, clip, pictures)
        extractor(cache).text_features(clip.text_tower, CAPTIONS, "captions")
    assert len(cache.entries()) == 4


IMAGE_CHANGES = [
    change_weight,
    change_size,
    change_interpolation,
    change_picture,
    change_order,
    change_augmentation,
]


@pytest.mark.parametrize("change", IMAGE_CHANGES)
def test_whatever_pictures_depend_on_makes_another_entry(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage], change: Callable[..., dict[str, Any]]
) -> None:
    before = image_features(cache, clip, pictures, view=2)
    options = change(clip, pictures)
    after = image_features(cache, clip, pictures, view=2, **options)
    assert len(cache.entries()) == 2
    assert not torch.equal(before.nan_to_num(), after.nan_to_num())


def test_the_plain_view_does_not_depend_on_the_augmentation(
    cache: FeatureCache, clip: CLIP, pictures: list[CaptionedImage]
) -> None:
    for augmentation in (PLAIN, Augmentation(flip=False), Augmentation(min_scale=0.5)):
        image_features(cache, clip, pictures, augmentation=augmentation)
    assert len(cache.entries()) == 1


def test_whatever_captions_depend_on_makes_another_entry(
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


# damage


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
    "a shard under another's name": lambda file: file.write_bytes(
        next(each for each in file.parent.glob("*.npy") if each != file).read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_mended(cache: FeatureCache, damage: str) -> None:
    count = 3 * SHARD_ROWS - 100
    cache.get({"kind": "noise"}, count, noise, "rows")
    (entry,) = cache.entries()
    before = {file.name: file.read_bytes() for file in entry.path.glob("*.npy")}
    DAMAGES[damage](sorted(entry.path.glob("*.npy"))[1])
    asked = []

    def compute(rows: range) -> np.ndarray:
        asked.append(rows)
        return noise(rows)

    stored = FeatureCache(cache.root).get({"kind": "noise"}, count, compute, "rows")
    assert asked == [range(SHARD_ROWS, 2 * SHARD_ROWS)]
    assert {file.name: file.read_bytes() for file in entry.path.glob("*.npy")} == before
    assert torch.equal(stored.rows(range(count)), torch.from_numpy(noise(range(count))).half().float())


MANIFESTS = [b"", b'{"key": {"ki', b"\xff\xfe", b"[]", b"{}", b"null", b'{"key": 3, "rows": 1}']


@pytest.mark.parametrize("content", MANIFESTS)
def test_a_damaged_manifest_stops_nothing_and_is_mended(
    cache: FeatureCache, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    key = {"kind": "image", "name": "one"}
    cache.get(key, 10, noise, "rows")
    (entry,) = cache.entries()
    manifest = entry.path / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(content)
    other = FeatureCache(cache.root)
    other.get({"kind": "image", "name": "two"}, 10, noise, "rows")
    (damaged,) = (entry for entry in other.entries() if entry.path == manifest.parent)
    assert (damaged.key["kind"], damaged.rows, damaged.bytes) == ("unknown", 0, entry.bytes)
    capsys.readouterr()
    assert main(["cache", "list", "--folder", str(cache.root)]) == 0
    assert "unknown  (damaged manifest.json)" in capsys.readouterr().out
    other.get(key, 10, pytest.fail, "rows")  # the features themselves are intact
    assert manifest.read_bytes() == whole
    manifest.write_bytes(content)
    assert len(other.prune(0)) == 2
    assert not entry.path.exists()


def test_a_failure_half_way_leaves_what_was_done(cache: FeatureCache) -> None:
    def fail(rows: range) -> np.ndarray:
        if rows.start == 2 * SHARD_ROWS:
            raise KeyboardInterrupt
        return noise(rows)

    with pytest.raises(KeyboardInterrupt):
        cache.get({}, 3 * SHARD_ROWS, fail, "rows")
    asked = []
    cache.get({}, 3 * SHARD_ROWS, lambda rows: asked.append(rows) or noise(rows), "rows")
    assert asked == [range(2 * SHARD_ROWS, 3 * SHARD_ROWS)]


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
        size = log.stat().st_size
        process = child()
        deadline = time.monotonic() + 10
        while log.stat().st_size == size and time.monotonic() < deadline:
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


def test_killed_twenty_times_then_finished_is_bit_identical(tmp_path: Path) -> None:
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


# room


def fill(cache: FeatureCache, *names: str) -> None:
    """Entries of 10 kB and a little, used one hour after another, the last of them half a day ago."""
    for hours, name in enumerate(names):
        cache.get({"kind": "image", "name": name}, 10, lambda rows: noise(rows, 500), name)
        (entry,) = (entry for entry in cache.entries() if entry.key["name"] == name)
        used = time.time() - 12 * 3600 + (hours - len(names)) * 3600
        os.utime(entry.path / "manifest.json", (used, used))


def names(cache: FeatureCache) -> list[str]:
    return [entry.key["name"] for entry in cache.entries()]


def test_the_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(FeatureCache(root), "oldest", "old", "new")
    cache = FeatureCache(root, budget_bytes=25_000)
    assert names(cache) == ["new", "old", "oldest"]
    fill(FeatureCache(root), "oldest")  # used again
    assert names(cache) == ["oldest", "new", "old"]
    cache.get({"kind": "image", "name": "newest"}, 10, lambda rows: noise(rows, 500), "rows")
    assert names(cache) == ["newest", "oldest"]


def test_what_is_in_use_stays_beyond_the_budget(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(FeatureCache(root), "old")
    cache = FeatureCache(root, budget_bytes=0)
    one = cache.get({"kind": "image", "name": "one"}, 10, noise, "rows")
    other = FeatureCache(root, budget_bytes=0)  # another run
    two = other.get({"kind": "image", "name": "two"}, 10, noise, "rows")
    assert sorted(names(cache)) == ["one", "two"]
    assert other.prune(0)  # by hand, everything goes; what is mapped stays readable
    assert torch.equal(one.rows(range(10)), two.rows(range(10)))


def test_a_finished_entry_may_lie_where_nobody_may_write(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get({}, 10, noise, "rows")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get({}, 10, pytest.fail, "rows").rows([3]).shape == (1, 16)


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            UserError, match=r"cannot be written \(Not a directory\); give another --data.cache"
        ):
            FeatureCache(root).get({}, 10, noise, "rows")


def test_a_full_disk_is_an_error_with_a_remedy(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features_module, "_write_shard", full)
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        cache.get({}, 10, noise, "rows")


def test_an_entry_without_rows_has_none(cache: FeatureCache) -> None:
    assert isinstance(cache.get({}, 0, pytest.fail, "rows"), Features)


# the command


def test_list_and_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "cache")
    fill(FeatureCache(Path(folder)), "old", "new")
    capsys.readouterr()

    def printed(*words: str) -> dict[str, Any]:
        assert main(["cache", *words, "--folder", folder, "--json"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return json.loads(captured.out)

    listed = printed("list")
    assert [row["tower"] for row in listed["entries"]] == ["new", "old"]
    assert listed["bytes"] == sum(row["bytes"] for row in listed["entries"]) > 20_000
    assert {"folder", "kind", "view", "rows", "last_used"} < set(listed["entries"][0])
    removed = printed("prune", "--keep_gb", "15e-6")
    assert [row["tower"] for row in removed["removed"]] == ["old"]
    assert [row["tower"] for row in printed("list")["entries"]] == ["new"]
    assert main(["cache", "list", "--folder", folder]) == 0
    assert "1 entries" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["thesis", "d41d8cd98f00b204e9800998ecf8427e"])
@pytest.mark.parametrize("manifest", ['{"key": {"kind": "image"}, "rows": 3}', '{"files": []}', "no JSON"])
def test_folders_of_others_are_neither_listed_nor_removed(
    cache: FeatureCache, name: str, manifest: str
) -> None:
    theirs = cache.root / name
    theirs.mkdir(parents=True)
    (theirs / "manifest.json").write_text(manifest)
    np.save(theirs / "images-00000-of-00001.npy", np.zeros(9))  # as `embed` names its shards
    cache.budget_bytes = 0
    cache.get({"kind": "image"}, 10, noise, "rows")
    assert [entry.rows for entry in cache.entries()] == [10]
    assert [entry.rows for entry in cache.prune(0)] == [10]
    assert len(list(theirs.iterdir())) == 2


def test_the_default_cache_may_be_missing_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["cache", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"entries": [], "bytes": 0}
    assert main(["cache", "list", "--folder", str(tmp_path / "none")]) == 2
    assert f"--folder {tmp_path / 'none'}: no such folder" in capsys.readouterr().err


def test_a_terminal_that_knows_few_letters(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.get({"kind": "image", "name": "Bär → 熊"}, 1, noise, "rows")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["cache", "list", "--folder", str(cache.root)]) == 0
    terminal.seek(0)
    assert "B?r ? ?" in terminal.read()
