"""Tars: what is written is what was there, and what is read of them is a function of seed and place."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import math
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from clip_lightning.__main__ import main
from clip_lightning.data.captions import Splits, split_by_image
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import Augmentation, ImageTransform, open_image
from clip_lightning.data.shards import convert, storage, tars
from clip_lightning.data.shards import index as manifest
from clip_lightning.data.shards.convert import Settings, captioned
from clip_lightning.data.shards.index import Index
from clip_lightning.data.shards.tars import BrokenRecord, Filter, Record, captions_of, draw_captions
from clip_lightning.data.shards.training import ShardDataset, ShardOptions, ShardSampler, held_out
from clip_lightning.errors import RunFailed, UserError

Serve = Callable[[Path], str]
Patch = pytest.MonkeyPatch
TRANSFORM = ImageTransform((16, 16), "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Patch) -> Path:
    """A cache of its own for each test, and no waiting for networks."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    return folder / "clip-lightning" / "shards"


def converted(source: Path, out: Path, samples_per_shard: int = 5, workers: int = 1, **how: Any) -> Path:
    """Captioned images, or a folder of tars, as new tars."""
    if any(source.glob("*.tar")):
        contents = convert.tars(str(source), "train")
    else:
        contents = captioned(source, samples_per_shard)
    convert.convert(contents, Settings(samples_per_shard, **how), out, workers)
    return out


@pytest.fixture(scope="module")
def shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes, five to a tar, written by two processes."""
    return converted(scenes, tmp_path_factory.mktemp("shards") / "out", workers=2)


def picture(seed: int = 0, size: tuple[int, int] = (20, 20)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG")
    return encoded.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    """As img2dataset writes them: name → suffix → content, with a header of pax for each time."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime = len(content), 1.5
                tar.addfile(info, io.BytesIO(content))
    return path


def laion(path: Path, numbers: range, **fields: Callable[[int], Any]) -> Path:
    """A tar of images with `.txt` and `.json`."""
    samples = {}
    for number in numbers:
        text = json.dumps({name: make(number) for name, make in fields.items()})
        files = {"jpg": picture(number), "txt": f"text {number}".encode(), "json": text.encode()}
        samples[f"{number:09d}"] = files
    return write_tar(path, samples)


def records(folder: Path, split: str = "train") -> list[Record]:
    found = Index([str(folder)], split)
    assert not found.broken
    return [*found.records()]


def dataset(*sources: Path | str, **options: Any) -> ShardDataset:
    how = {name: options.pop(name) for name in ("captions_per_image", "seed", "budget") if name in options}
    augmentation = Augmentation(min_scale=0.5)
    options = {"sources": [*map(str, sources)]} | options
    return ShardDataset(ShardOptions(**options), "", TRANSFORM, augmentation, **how)


def names(data: ShardDataset, batch_size: int, epoch: int = 0, **ranks: int) -> list[str]:
    """The keys of the samples of an epoch, in its order."""
    sampler = ShardSampler(data, batch_size, **ranks)
    sampler.set_epoch(epoch)
    return [key(data.index.read(sample)) for _, sample in sampler]


def key(record: Record) -> str:
    return record.name.rpartition("#")[2]


# Converting ---------------------------------------------------------------------------------------------


def test_converted_images_are_unchanged_and_complete(shards: Path, scenes: Path) -> None:
    parts = split_by_image(read_captions(scenes), Splits())
    splits = manifest.find(str(shards)) or {}
    assert {path.name for path in shards.iterdir()} == {*parts, manifest.FILE}
    for split, images in parts.items():
        expected = {image.path.name: (image.path.read_bytes(), list(image.captions)) for image in images}
        found = records(shards, split)
        assert len(found) == len(expected) == sum(shard["samples"] for shard in splits[split])
        assert {r.fields["name"]: (r.image, r.fields["captions"]) for r in found} == expected
        assert all((r.fields["width"], r.fields["height"]) == (32, 32) for r in found)
        assert all(r.fields["txt"] == r.fields["captions"][0] for r in found)
        names = {Path(shard["file"]).stem for shard in splits[split]}
        assert {path.name for path in (shards / split).iterdir()} == {
            f"{name}.{suffix}" for name in names for suffix in ("tar", "parquet")
        }
        for shard in splits[split]:
            content = (shards / split / shard["file"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert [r.fields["name"] for r in records(shards)] != [i.path.name for i in parts["train"]]


def test_a_stopped_conversion_resumes(shards: Path, scenes: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    def full(records: Iterator[Record], path: Path) -> None:
        if path.name.startswith(".00004.tar"):
            with pytest.raises(UserError, match=r"another process is writing to .*out; wait for it"):
                converted(scenes, out)
            raise OSError(28, "No space left on device")
        write(records, path)

    out, write = tmp_path / "out", convert.write_tar
    monkeypatch.setattr(convert, "write_tar", full)
    with pytest.raises(RunFailed, match=r"No space left.*run the same command again"):
        converted(scenes, out)
    monkeypatch.undo()
    done = {path: path.stat().st_mtime_ns for path in out.glob("train/0*.tar")}
    assert len(done) == 4 and not (out / manifest.FILE).exists()
    with pytest.raises(UserError, match="no conversion of this data with these options"):
        converted(scenes, out, 4)
    converted(scenes, out)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was there was not written again"
    for path in shards.rglob("*.*"):
        assert (out / path.relative_to(shards)).read_bytes() == path.read_bytes()
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    converted(scenes, out)
    for folder, short_side in ((out, 16), (out / "train", None)):
        with pytest.raises(UserError, match="not empty, and has no conversion of this data"):
            converted(scenes, folder, short_side=short_side)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == finished


@pytest.mark.parametrize("turned", [False, True])
def test_large_images_are_resized_and_stay_upright(tmp_path: Path, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, :45] = 255  # white on the left, as stored
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(pixels[:10, :12]).save(tmp_path / "b.png")
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,A,train\nb.png,B,val\n")
    out = converted(tmp_path, tmp_path / "out", short_side=20)
    assert records(out, "val")[0].image == (tmp_path / "b.png").read_bytes(), "smaller ones stay as they are"
    (record,) = records(out)
    small = open_image(record.image)
    assert small.size == ((20, 30) if turned else (30, 20))
    assert (record.fields["width"], record.fields["height"]) == small.size
    middle = np.asarray(small.convert("L"))
    first, last = (middle[3], middle[-4]) if turned else (middle[:, 3], middle[:, -4])
    assert first.min() > 240 and last.max() < 15, "what was left is on top once it is turned"


def test_broken_images_are_left_out_and_unreadable_ones_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,A,train\nb.jpg,B,val\n")
    source = captioned(tmp_path, 5)
    (tmp_path / "a.jpg").rename(tmp_path / "away.jpg")
    away = r"a\.jpg cannot be read at the moment \(No such file.*run the same command again"
    with pytest.raises(RunFailed, match=away):
        convert.convert(source, Settings(5), tmp_path / "out", 1)
    (tmp_path / "away.jpg").rename(tmp_path / "a.jpg")
    splits, left_out = convert.convert(source, Settings(5), tmp_path / "out", 1)
    assert [*splits] == ["train"] and left_out == {"b.jpg": "not an image of a known format"}
    monkeypatch.setattr(Image.Image, "getexif", lambda self: 1 / 0)
    with pytest.raises(RunFailed, match=r"no sample is usable.*division by zero"):
        converted(tmp_path, tmp_path / "odd headers")


def test_tars_are_converted_with_their_fields_and_a_filter(tmp_path: Path) -> None:
    for number in range(3):
        laion(tmp_path / f"{number}.tar", range(4 * number, 4 * number + 4), similarity=lambda n: n / 10)
    found = records(converted(tmp_path, tmp_path / "out", filters=(Filter.parse("similarity >= 0.35"),)))
    assert [key(record) for record in found] == [f"{number:09d}" for number in range(4, 12)]
    assert found[0].fields == {"similarity": 0.4, "txt": "text 4", "width": 20, "height": 20}
    shards = (manifest.find(str(tmp_path / "out")) or {})["train"]
    assert [shard["samples"] for shard in shards] == [4, 4], "the first tar has left nothing"
    with pytest.raises(RunFailed, match="no sample is usable and passes --filters"):
        converted(tmp_path, tmp_path / "none", filters=(Filter.parse("similarity > 9"),))


@given(st.binary(max_size=60))
def test_invalid_manifests_are_refused(shards: Path, data: bytes) -> None:
    content = json.loads((shards / manifest.FILE).read_bytes())
    shard = {"file": "a.tar", "samples": 1, "bytes": 1, "sha256": ""}
    assert manifest.load(json.dumps(content | {"splits": {"train": [shard]}}).encode(), "x")
    wrong: list[Any] = [{"file": "../../x"}, {"file": "a/b"}, {"bytes": "1"}, {"more": 1}]
    splits: list[Any] = [3, {"../up": []}, {"train": [{"file": "a"}]}]
    changes = [{"splits": each} for each in [*splits, *({"train": [shard | each]} for each in wrong)]]
    for change in ({"version": 1}, {"format": "litdata"}, *changes):
        with pytest.raises(UserError, match=r"x is damaged .*convert the data again"):
            manifest.load(json.dumps(content | change).encode(), "x")
    with pytest.raises(UserError):
        manifest.load(data, "x")


# Which captions, which samples --------------------------------------------------------------------------


def test_captions_are_drawn_by_the_probabilities_of_their_fields() -> None:
    rng = np.random.default_rng(0)
    fields: dict[str, Any] = {"captions": ["a", "b", " c\n d "], "txt": "e"}
    for _ in range(20):
        assert sorted(draw_captions(fields, {}, 3, rng)) == ["a", "b", "c d"]
        assert Counter(draw_captions(fields, {}, 6, rng)) == {"a": 2, "b": 2, "c d": 2}
    assert draw_captions({"txt": " ", "caption": "f"}, {}, 1, rng) == ["f"]
    choice = {"alt": 3.0, "synthetic": 1.0}
    fields = {"alt": "a", "synthetic": ["s", "t"], "caption": "never"}
    counts = Counter(text for _ in range(4000) for text in draw_captions(fields, choice, 1, rng))
    assert set(counts) == {"a", "s", "t"}
    # three standard deviations of a binomial of 4,000 at 0.75 are 82
    assert abs(counts["a"] - 3000) < 82 and abs(counts["s"] - counts["t"]) < 150
    assert draw_captions({"alt": None, "synthetic": "s"}, choice, 2, rng) == ["s", "s"]
    assert captions_of(fields, choice) == {"alt": ["a"], "synthetic": ["s", "t"]}
    with pytest.raises(BrokenRecord, match="no caption in alt, synthetic"):
        draw_captions({"caption": "never"}, choice, 1, rng)


def test_filters() -> None:
    for text, passing, failing in [
        ("width >= 200", 200, 199),
        ("similarity>0.28", "0.29", 0.28),
        ("punsafe < 0.1", 0, None),
        ("NSFW == UNLIKELY", "UNLIKELY", "LIKELY"),
        ("NSFW != 'NSFW'", "UNLIKELY", "NSFW"),
        ("width <= 1e3", 1000, 1001),
        ("width == 5", 5.0, "five"),
        ("width > 5", 7, float("nan")),
    ]:
        assert Filter.parse(text)([passing, failing]).tolist() == [True, False], text
    for text in ("", "width", "width >", "width >> 3", "width > big", "__import__('os') > 1", "> 3"):
        with pytest.raises(UserError, match=r"--data.shards.filters"):
            Filter.parse(text)


# What is in a tar ---------------------------------------------------------------------------------------


LONG = "folder/" * 20 + "b"  # fits into the two fields of USTAR


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (tarfile.USTAR_FORMAT, ["a", LONG, "c"]),
        (tarfile.GNU_FORMAT, ["a", LONG, "c" * 150, "ü" * 90, "folder.d/e"]),
        (tarfile.PAX_FORMAT, ["a", LONG, "c" * 150, "ü" * 90, "👩 path=x"]),
    ],
)
def test_samples_are_found_at_the_offsets_of_tarfile(tmp_path: Path, kind: int, keys: list[str]) -> None:
    samples = {name: {"JPG": bytes([i]) * 700 * i, "txt": b"t"} for i, name in enumerate(keys)}
    path = write_tar(tmp_path / "a.tar", samples, kind)
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
        expected = [tar.extractfile(members[f"{name}.JPG"]).read() for name in keys]  # type: ignore[union-attr]
    index = Index([str(path)], "train")
    assert [(record.name, record.image) for record in index.records()] == [
        (f"{path}#{name}", image) for name, image in zip(keys, expected, strict=True)
    ]


def test_damaged_tars_and_samples_are_skipped_and_named(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(tars, "LARGEST_SAMPLE", 100_000)
    laion(tmp_path / "good.tar", range(6))
    cut = laion(tmp_path / "cut.tar", range(10, 16))
    cut.write_bytes(cut.read_bytes()[:12000])
    two = {"30": {"jpg": picture(), "txt": b"x"}, "31": {"jpg": picture()}}
    bent = write_tar(tmp_path / "bent.tar", two, tarfile.GNU_FORMAT)
    content = bytearray(bent.read_bytes())
    place = content.index(b"31.jpg")  # of its header
    content[place] ^= 1
    bent.write_bytes(content)
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "void.tar").touch()
    strange = {
        "20": {"jpg": b"not an image", "txt": b"x"},
        "21": {"txt": b"no image"},
        "22": {"jpg": picture(), "txt": b"x", "json": b"{"},
        "23": {"jpg": picture()},
        "24": {"PNG": picture(), "txt": b"fine", "json": b'{"big": 1%s, "bad": "\\ud800"}' % (b"0" * 400)},
        "25": {"jpg": picture(), "json": b"[" * 9000},
        "26": {"jpg": b"large" * 30_000, "txt": b"x"},
        "32": {"jpg": picture(), "txt": b"x", "json": b"[[1, 2]]"},
        "27": {"npy": b"not read" * 30_000, "cls": b"x", "jpg": picture(), "txt": b"x"},
        "._28": {"jpg": b"", "txt": b"x"},
        "__meta__/29": {"jpg": b"", "txt": b"x"},
    }
    write_tar(tmp_path / "odd.tar", strange)
    data = dataset(tmp_path)
    broken = data.index.take_broken()
    assert not data.index.take_broken()
    drawn = [data.__getitems__([(0, sample)]) for _, sample in ShardSampler(data, 1)]
    reasons = {name.removeprefix(f"{tmp_path}/"): reason for name, reason in broken.items()}
    assert reasons == {
        "bent.tar": f"it is truncated or damaged at byte {place:,}",
        "cut.tar": "it is not a tar, or is damaged: empty header",
        "none.tar": "it is not a tar, or is damaged: invalid header",
        "void.tar": "it is not a tar, or is damaged: empty file",
        "odd.tar#21": "no image",
        "odd.tar#22": "its JSON cannot be read",
        "odd.tar#25": "its JSON cannot be read",
        "odd.tar#26": "its 153,089 bytes are more than 100,000",
        "odd.tar#32": "its JSON is not an object",
    }
    read = {int(name.rpartition("#")[2]) for samples in drawn for name in samples.names or ()}
    assert read >= {0, 1, 2, 3, 4, 5, 10, 24, 27} and not read & {20, 21, 22, 23, 25, 26}
    later = {name.rpartition("#")[2]: reason for samples in drawn for name, reason in samples.broken.items()}
    assert set(later) == {"20", "23"} and later["23"] == "no caption in captions, txt, caption"
    none = write_tar(tmp_path / "a.tar", {str(n): {"jpg": b"none", "txt": b"x"} for n in range(5)})
    with pytest.raises(UserError, match="100 consecutive samples cannot be used"):
        dataset(none).__getitems__([(0, 0)])


def test_a_header_that_points_back_is_damaged(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1": {"jpg": picture()}}, tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[124:136], content[148:156] = b"\xff" * 10 + b"\xf0\0", b" " * 8  # a size of -4,096
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    assert [*Index([str(path)], "train").broken] == [str(path)]


def test_a_tar_is_scanned_again_only_if_it_has_changed(tmp_path: Path, cache: Path) -> None:
    tar = laion(tmp_path / "0.tar", range(3))
    data = dataset(tmp_path)
    (index,) = (cache / "index").iterdir()
    written = index.stat().st_mtime_ns
    assert len(names(dataset(tmp_path), 1)) == 3 and index.stat().st_mtime_ns == written
    index.write_bytes(b"damaged")
    assert len(names(dataset(tmp_path), 1)) == 3 and index.stat().st_mtime_ns != written
    write_tar(tar, {"longer": {"txt": b"x" * 9000, "jpg": picture()}})
    with pytest.raises(RunFailed, match="so the tar has changed"):
        data.index.read(2)
    assert names(dataset(tmp_path), 1) == ["longer"]


# Order --------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    window=st.integers(1, 5),
    start=st.integers(0, 9),
    epoch=st.integers(0, 2),
)
@settings(deadline=None)
def test_a_pass_has_every_sample_once_for_any_number_of_ranks(
    sizes: list[int], batch_size: int, world_size: int, window: int, start: int, epoch: int
) -> None:
    made = mock.Mock(seed=3, window=window, weights=np.array([1.0]), streams=[range(len(sizes))])
    made.index.count = sizes.__getitem__
    made.index.samples = lambda tar: 100 * tar + np.arange(sizes[tar])

    def order(samples: int, batch_size: int, start: int = 0, **ranks: int) -> list[int]:
        made.samples = samples
        sampler = ShardSampler(made, batch_size, **ranks)
        sampler.set_epoch(epoch)
        sampler.start_batch = start
        return [sample for _, sample in sampler]

    size, total = batch_size * world_size, sum(sizes)
    if total < size:
        return
    everything, whole = order(total, 1), order(total, size)
    assert len({*everything}) == total and everything[: len(whole)] == whole
    tars_of = [sample // 100 for sample in everything]
    begun = [len({*tars_of[: i + 1]} & {*tars_of[i:]}) for i in range(total)]
    assert max(begun) <= window, "no more tars than that are begun and not finished"
    ranks = [
        np.array(order(total, batch_size, start, rank=rank, world_size=world_size)).reshape(-1, batch_size)
        for rank in range(world_size)
    ]
    assert np.concatenate(ranks, axis=1).ravel().tolist() == whole[start * size :]


def test_epochs_of_another_length_continue_the_pass(tmp_path: Path) -> None:
    for number in range(3):
        laion(tmp_path / f"{number}.tar", range(4 * number, 4 * number + 4))
    data = dataset(tmp_path, samples_per_epoch=5, window=2)
    seen = [name for epoch in range(12) for name in names(data, 1, epoch)]
    assert len(seen) == 60
    passes = [seen[first : first + 12] for first in range(0, 60, 12)]
    assert all(len({*part}) == 12 for part in passes) and len({*map(tuple, passes)}) == 5


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    often, seldom = laion(tmp_path / "a.tar", range(10)), laion(tmp_path / "b.tar", range(100, 130))
    data = dataset(sources={str(often): 3.0, str(seldom): 1.0}, samples_per_epoch=100)
    epochs = [names(data, 1, epoch) for epoch in range(8)]
    counts = Counter(name for epoch in epochs for name in epoch)
    first = sum(count for name, count in counts.items() if int(name) < 100)
    assert abs(first - 600) < 40 and epochs[0] != epochs[1]
    for part in ([n for n in counts if int(n) < 100], [n for n in counts if int(n) >= 100]):
        assert max(counts[n] for n in part) - min(counts[n] for n in part) <= 1, "pass after pass"
    assert sorted(names(dataset(often, seldom), 40)) == sorted(counts), "without weights every sample once"


def test_a_sample_is_a_function_of_seed_epoch_and_number(shards: Path, tmp_path: Path) -> None:
    data = dataset(shards, captions_per_image=2)
    numbers = [number for tar in range(7) for number in data.index.samples(tar).tolist()]
    batch = data.__getitems__([(0, numbers[3]), (0, numbers[30]), (0, numbers[4])])
    alone = data.__getitems__([(0, numbers[30])])
    assert torch.equal(batch.images[1], alone.images[0]) and batch.captions[2:4] == alone.captions
    for other in (
        data.__getitems__([(1, numbers[30])]),
        dataset(shards, seed=1).__getitems__([(0, numbers[30])]),
    ):
        assert not torch.equal(other.images[0], alone.images[0])
    record = data.index.read(numbers[30])
    assert {*alone.captions} <= {*record.fields["captions"]} and len({*alone.captions}) == 2
    assert alone.names == [record.name] and record.name.endswith(f"/train/00006.tar#{key(record)}")
    write_tar(tmp_path / "a.tar", {str(n): {"jpg": picture(n % 2), "txt": b"x"} for n in range(4)})
    ids = dataset(tmp_path).__getitems__([(0, sample) for sample in range(4)]).image_id
    assert ids[0] == ids[2] != ids[1] == ids[3], "copies of an image have one id"


@pytest.mark.parametrize("form", ["converted", "tars", "remote"])
def test_resuming_on_fewer_workers_and_ranks_loses_no_sample(shards: Path, served: Serve, form: str) -> None:
    source = {"converted": shards, "tars": shards / "train", "remote": served(shards / "train")}[form]
    options = {"samples_per_epoch": 32} if form == "remote" else {}

    def loader(rank: int, world: int, workers: int, start: int = 0) -> list[list[str]]:
        data = dataset(source, window=2, **options)
        sampler = ShardSampler(data, 8 // world, rank=rank, world_size=world)
        sampler.start_batch = start
        how = {"sampler": sampler, "num_workers": workers, "collate_fn": lambda samples: samples.names}
        return list(DataLoader(data, 8 // world, **how))

    undisturbed = loader(0, 1, 0)
    first = [a + b for a, b in zip(*(loader(rank, 2, 2)[:2] for rank in range(2)), strict=True)]
    rest = loader(0, 1, 1, start=2)
    assert first + rest == undisturbed
    seen = [name for batch in first + rest for name in batch]
    assert len(seen) == len({*seen}) == 32


def test_filters_choose_samples_by_the_fields_of_any_type(tmp_path: Path) -> None:
    laion(tmp_path / "0.tar", range(4), score=lambda n: n if n else None, odd=lambda n: None)
    laion(tmp_path / "1.tar", range(4, 8), score=float, odd=lambda n: "x", late=lambda n: True)
    laion(tmp_path / "2.tar", range(8, 12), score=float, odd=lambda n: n)
    converted(tmp_path, tmp_path / "out")
    expected = {
        "score > 2": range(3, 12),
        "score != 5": [*range(1, 5), *range(6, 12)],
        "odd == x": range(4, 8),
        "odd >= 9": range(9, 12),
        "odd != x": range(8, 12),
        "late == 1": range(4, 8),
        "txt == 'text 3'": [3],
    }
    for source in (tmp_path, tmp_path / "out"):
        for text, numbers in expected.items():
            assert sorted(map(int, names(dataset(source, filters=[text]), 1))) == [*numbers], text
        assert names(dataset(source, filters=["score >= 2", "odd == x", "txt != 'text 5'"]), 3)
        for text in ("score > 99", "height_ > 1"):
            said = r"no sample passes .*filters; the samples have the fields .*score, txt"
            with pytest.raises(UserError, match=said):
                dataset(source, filters=[text])


# Other machines -----------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[Serve]:
    """Serves a folder by HTTP and gives its URL."""
    with contextlib.ExitStack() as at_end:

        def serve(folder: Path) -> str:
            handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
            server = at_end.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            at_end.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield serve


@pytest.mark.parametrize("form", ["converted", "tars"])
@pytest.mark.parametrize("protocol", ["file", "http"])
def test_remote_tars_are_cached(shards: Path, served: Serve, cache: Path, protocol: str, form: str) -> None:
    here = shards if form == "converted" else shards / "train"
    source = f"file://{here}" if protocol == "file" else served(here)
    options = {} if form == "converted" else {"samples_per_epoch": 32}
    data = dataset(source, window=2, budget=60_000, **options)
    for epoch in range(2):
        assert names(data, 4, epoch) == names(dataset(here, window=2), 4, epoch)
    copies = [path.stat().st_size for path in (cache / "copies").iterdir() if path.suffix != ".lock"]
    total = sum(path.stat().st_size for path in (shards / "train").glob("*.tar"))
    assert 0 < sum(copies) <= 60_000 + 2 * max(copies) < total, "but for those that arrive at the moment"


def test_a_changed_remote_tar_is_refused(scenes: Path, tmp_path: Path) -> None:
    file = converted(scenes, tmp_path / "out") / "train" / "00000.tar"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    data = dataset(f"file://{tmp_path / 'out'}")
    assert data.index.read(1 << 32).image
    with pytest.raises(UserError, match="its checksum differs"):
        data.index.read(0)


def test_patterns_match_files_in_order(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{number:05d}.tar") for number in range(3)]
    for file in files:
        Path(file).touch()
    for source in ("", "/{00000..00002}.tar", "/*.tar", "/0000{0,1,2}.tar"):
        assert storage.expand(f"{tmp_path}{source}") == files
    for url in (f"file://{tmp_path}", f"file://{tmp_path}/*.tar"):
        assert storage.expand(url) == [f"file://{file}" for file in files]
    for source in (f"{tmp_path}/no*.tar", f"{tmp_path}/absent", f"{tmp_path}/{{00000..00003}}.tar"):
        with pytest.raises(UserError, match="matches no file"):
            storage.expand(source)


# The options ----------------------------------------------------------------------------------------------


def test_the_number_of_samples_per_epoch(served: Serve, tmp_path: Path) -> None:
    laion(tmp_path / "0.tar", range(4))
    laion(tmp_path / "1.tar", range(4, 10))
    url = served(tmp_path)
    assert dataset(tmp_path).samples == 10 and dataset(tmp_path, filters=["txt == 'text 3'"]).samples == 1
    with pytest.raises(UserError, match=r"the number of samples in remote tars is unknown; give --data"):
        dataset(url)
    assert dataset(url, samples_per_epoch=50).samples == 50
    with pytest.raises(UserError, match=r"batch of 4 × 3 images is larger.*set of 10 images; reduce --data"):
        ShardSampler(dataset(tmp_path), 4, world_size=3)
    for endless in ({"sources": {str(tmp_path): math.inf}}, {"captions": {"txt": math.inf}}):
        with pytest.raises(UserError, match="expected finite numbers"):
            dataset(tmp_path, **endless)


def test_tars_must_match_the_manifest(scenes: Path, tmp_path: Path) -> None:
    out = converted(scenes, tmp_path / "out")
    whole = names(dataset(out), 4)
    (out / "train" / "00000.parquet").unlink()
    (out / "train" / "00001.parquet").write_bytes(b"damaged")
    shutil.copy(out / "train" / "00003.parquet", out / "train" / "00002.parquet")
    assert names(dataset(out), 4) == whole, "these tars are scanned"
    with mock.patch.object(manifest, "scan", side_effect=AssertionError("scanned again")):
        assert names(dataset(out), 4) == whole
    content = json.loads((out / manifest.FILE).read_bytes())
    (out / manifest.FILE).write_text(json.dumps(content | {"splits": {"val": content["splits"]["val"]}}))
    with pytest.raises(UserError, match="has no train split"):
        dataset(out)


def test_validation_images_become_files(shards: Path, scenes: Path, tmp_path: Path, served: Serve) -> None:
    expected = split_by_image(read_captions(scenes), Splits())["val"]
    for source in (str(shards), str(scenes)):
        found = held_out(source, "val", {})
        assert [image.captions for image in found] == [image.captions for image in expected]
        assert [image.path.read_bytes() for image in found] == [i.path.read_bytes() for i in expected]
    url = f"{served(tmp_path / 'tars')}/0.tar"
    for count in (3, 20):
        tar = laion(tmp_path / "tars" / "0.tar", range(count), synthetic=lambda n: f"made {n}")
        found = held_out(url, "val", {})
        assert [image.captions for image in found] == [(f"text {n}",) for n in range(count)], "read again"
    both = held_out(str(tar), "val", {"txt": 1.0, "synthetic": 1.0})
    assert [image.captions for image in both] == [(f"text {n}", f"made {n}") for n in range(20)]
    with pytest.raises(UserError, match=r"1\.tar does not exist"):
        held_out(url.replace("0.tar", "1.tar"), "val", {})
    with pytest.raises(UserError, match=r"has no usable sample for val.*no caption in alt"):
        held_out(str(tar), "val", {"alt": 1.0})


def test_the_commands(
    command: Callable[..., list[str]], scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["data", "convert", str(scenes), "--out", str(out), "--num_workers", "1"]) == 0
    counts = "32 samples for train, 4 samples for val, 4 samples for test"
    assert capfd.readouterr().out == f"wrote {counts}; next: clip-lightning fit --data.root {out}\n"
    options = {"data__root": out, "data__captions_per_image": 2, "data__num_workers": 1}
    options |= {"model__freeze": "image"}
    assert main(command("fit", tmp_path / "runs", **options)) == 0, capfd.readouterr().err
    (metrics,) = (tmp_path / "runs").glob("*/metrics.json")
    scores = json.loads(metrics.read_text())
    assert scores["finished"] and scores["rsum"] > 0 and scores["step"] in (8, 16)
    assert main(command("test", tmp_path / "runs", ckpt_path="last", **options)) == 0
    assert "rsum" in capfd.readouterr().out
    options |= {"trainer__max_epochs": 4, "data__shards__samples_per_epoch": 16}
    assert main(command("fit", tmp_path / "runs", ckpt_path="last", **options)) != 0
    assert "trained with --data.shards.samples_per_epoch 32, but this run has 16;" in capfd.readouterr().err
