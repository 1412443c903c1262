"""Shards: what is written is what was there, and what is read of them is a function of seed and place."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from clip_lightning.__main__ import main
from clip_lightning.data.captions import split_by_image
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import Augmentation, ImageTransform
from clip_lightning.data.shards.chunks import ChunkDataset, ChunkFolder, ChunkSampler
from clip_lightning.data.shards.convert import Settings, captioned, convert, tars
from clip_lightning.data.shards.held_out import held_out
from clip_lightning.data.shards.manifest import FILE, Manifest
from clip_lightning.data.shards.options import Reading, ShardOptions
from clip_lightning.data.shards.record import BrokenRecord, CaptionChoice, Filter, Record
from clip_lightning.data.shards.storage import expand
from clip_lightning.data.shards.tars import BatchKey, TarDataset, TarSource, read_tar
from clip_lightning.data.shards.training import TrainingShards
from clip_lightning.errors import RunFailed, UserError

FORMATS = ("litdata", "webdataset")
SPLITS = {"dataset": "auto", "val_share": 0.1, "test_share": 0.1, "split_seed": 0}
TRANSFORM = ImageTransform((16, 16), "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def settings(kind: Any, **changes: Any) -> Settings:
    return replace(Settings(kind, 5, None, 92, ()), **changes)


@pytest.fixture(scope="module")
def shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The scenes in either format, five to a shard."""
    made = {}
    for kind in FORMATS:
        made[kind] = tmp_path_factory.mktemp("shards") / kind
        convert(captioned(scenes, settings(kind), **SPLITS), settings(kind), made[kind], 1)
    return made


def picture(seed: int = 0, size: tuple[int, int] = (20, 20)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG")
    return encoded.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """As img2dataset writes them: name → suffix → content."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def laion(path: Path, numbers: range, **fields: Callable[[int], Any]) -> Path:
    """A tar of pictures with `.txt` and `.json`."""
    return write_tar(
        path,
        {
            f"{number:09d}": {
                "jpg": picture(number),
                "txt": f"text {number}".encode(),
                "json": json.dumps({name: make(number) for name, make in fields.items()}).encode(),
            }
            for number in numbers
        },
    )


# Converting ---------------------------------------------------------------------------------------------


def records(folder: Path, split: str) -> list[Record]:
    manifest = Manifest.find(str(folder))
    assert manifest is not None
    if manifest.format == "litdata":
        chunks = ChunkFolder(str(folder), manifest, split, 2)
        return [chunks[row] for row in range(len(chunks))]
    broken: dict[str, str] = {}
    found = [r for s in manifest.splits[split] for r in read_tar(str(folder / split / s.file), broken)]
    assert not broken
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_every_picture_is_there_once_as_it_was(shards: dict[str, Path], scenes: Path, kind: str) -> None:
    parts = split_by_image(read_captions(scenes), seed=0, val_share=0.1, test_share=0.1)
    for split, images in parts.items():
        expected = {image.path.name: (image.path.read_bytes(), list(image.captions)) for image in images}
        found = records(shards[kind], split)
        assert len(found) == len(expected)
        assert {r.fields["name"]: (r.image, r.fields["captions"]) for r in found} == expected
        assert all((r.fields["width"], r.fields["height"]) == (32, 32) for r in found)
    assert [r.fields["name"] for r in records(shards[kind], "train")] != [i.path.name for i in parts["train"]]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_manifest_names_every_file_and_what_is_in_it(shards: dict[str, Path], kind: str) -> None:
    manifest = Manifest.find(str(shards[kind]))
    assert manifest is not None and manifest.format == kind
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 32, "val": 4, "test": 4}
    for split, part in manifest.splits.items():
        others = {"fields.parquet"} | ({"index.json"} if kind == "litdata" else set())
        assert {path.name for path in (shards[kind] / split).iterdir()} == {s.file for s in part} | others
        for shard in part:
            content = (shards[kind] / split / shard.file).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
    assert {path.name for path in shards[kind].iterdir()} == {"train", "val", "test", FILE}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interrupted_conversion_goes_on_and_ends_the_same(
    shards: dict[str, Path], scenes: Path, tmp_path: Path, kind: str
) -> None:
    source, out = captioned(scenes, settings(kind), **SPLITS), tmp_path / "out"
    blocked = out / "train" / f".00004.{'bin' if kind == 'litdata' else 'tar'}.tmp"
    blocked.mkdir(parents=True)  # the fifth shard cannot be written
    (out / "train").rename(tmp_path / "train")
    out.rmdir()
    with pytest.raises(RunFailed, match="give the same command again"):
        (tmp_path / "blocked").mkdir()
        _convert_with(source, settings(kind), out, tmp_path / "train")
    done = {path: path.stat().st_mtime_ns for path in out.glob("train/0*")}
    assert len(done) == 4 and not (out / FILE).exists()
    blocked.rmdir()
    convert(source, settings(kind), out, 1)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was there was not written again"
    once, again = Manifest.find(str(shards[kind])), Manifest.find(str(out))
    assert once is not None and again is not None and once.splits == again.splits


def _convert_with(source: Any, how: Settings, out: Path, blocking: Path) -> None:
    """Convert into a folder in which something is in the way of one shard."""
    from clip_lightning.data.shards import convert as module

    module._begin(out, module._plan(source, how))
    blocking.rename(out / "train")
    convert(source, how, out, 1)


def test_several_processes_write_the_same_files(
    shards: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    how = settings("litdata")
    convert(captioned(scenes, how, **SPLITS), how, tmp_path / "out", 2)
    for path in shards["litdata"].rglob("*.bin"):
        assert (tmp_path / "out" / path.relative_to(shards["litdata"])).read_bytes() == path.read_bytes()


def test_a_finished_conversion_is_left_alone_and_another_refused(scenes: Path, tmp_path: Path) -> None:
    how = settings("webdataset")
    source = captioned(scenes, how, **SPLITS)
    manifest, _ = convert(source, how, tmp_path / "out", 1)
    again, _ = convert(source, how, tmp_path / "out", 1)
    assert again.splits == manifest.splits
    other = settings("webdataset", short_side=16)
    with pytest.raises(UserError, match="another conversion"):
        convert(source, other, tmp_path / "out", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        convert(source, how, tmp_path / "full", 1)


@pytest.mark.parametrize("turned", [False, True])
def test_long_pictures_are_made_smaller_and_stay_upright(tmp_path: Path, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, :45] = 255  # white on the left, as stored
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(pixels[:10, :12]).save(tmp_path / "b.png")
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,A,train\nb.png,B,train\n")
    how = settings("webdataset", short_side=20)
    convert(captioned(tmp_path, how, **{**SPLITS, "val_share": 0.0}), how, tmp_path / "out", 1)
    found = {r.fields["name"]: r for r in records(tmp_path / "out", "train")}
    assert found["b.png"].image == (tmp_path / "b.png").read_bytes(), "smaller ones stay as they are"
    small = Image.open(io.BytesIO(found["a.jpg"].image))
    assert small.size == ((20, 30) if turned else (30, 20))
    assert (found["a.jpg"].fields["width"], found["a.jpg"].fields["height"]) == small.size
    middle = np.asarray(small.convert("L"))
    first, last = (middle[3], middle[-4]) if turned else (middle[:, 3], middle[:, -4])
    assert first.min() > 240 and last.max() < 15, "what was left is on top once it is turned"


def test_broken_pictures_are_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,A,train\nb.jpg,B,train\n")
    how = settings("litdata")
    source = captioned(tmp_path, how, **{**SPLITS, "val_share": 0.0})
    manifest, left_out = convert(source, how, tmp_path / "out", 1)
    assert manifest.samples("train") == 1
    assert left_out == {"b.jpg": "not a picture of a known format"}


def test_tars_become_chunks_with_their_fields_and_a_filter(tmp_path: Path) -> None:
    for number in range(3):
        laion(tmp_path / f"{number}.tar", range(4 * number, 4 * number + 4), similarity=lambda n: n / 10)
    how = settings("litdata", filters=("similarity >= 0.35",))
    manifest, _ = convert(tars(str(tmp_path), "train"), how, tmp_path / "out", 1)
    found = records(tmp_path / "out", "train")
    assert [record.key for record in found] == [f"{number:09d}" for number in range(4, 12)]
    assert found[0].fields == {"similarity": 0.4, "txt": "text 4", "width": 20, "height": 20}
    assert [shard.samples for shard in manifest.splits["train"]] == [4, 4], "the first tar has left nothing"


def test_no_sample_that_passes_is_said(tmp_path: Path) -> None:
    laion(tmp_path / "0.tar", range(3))
    how = settings("litdata", filters=("similarity > 0",))
    with pytest.raises(RunFailed, match="no sample can be used or passes the filters"):
        convert(tars(str(tmp_path), "train"), how, tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "zip"}, "damaged"),
        ({"splits": {"train": [{"file": "../../x", "samples": 1, "bytes": 1, "sha256": ""}]}}, "damaged"),
        ({"splits": {"train": [{"file": "a/b", "samples": 1, "bytes": 1, "sha256": ""}]}}, "damaged"),
        ({"splits": {"../up": []}}, "damaged"),
        ({"splits": {"train": [{"file": "a", "samples": -1, "bytes": 1, "sha256": ""}]}}, "damaged"),
        ({"splits": 3}, "damaged"),
        ({"splits": {"train": [{"file": "a"}]}}, "damaged"),
    ],
)
def test_a_manifest_from_a_stranger(shards: dict[str, Path], change: dict[str, Any], said: str) -> None:
    content = json.loads((shards["litdata"] / FILE).read_bytes())
    with pytest.raises(UserError, match=said):
        Manifest.load(json.dumps(content | change).encode(), "x")


@given(st.binary(max_size=60))
def test_a_manifest_of_anything(data: bytes) -> None:
    with pytest.raises(UserError):
        Manifest.load(data, "x")


# Which captions, which samples --------------------------------------------------------------------------


def test_captions_of_one_field_differ_while_there_are_enough() -> None:
    rng = np.random.default_rng(0)
    fields = {"captions": ["a", "b", " c\n d "], "txt": "e"}
    for _ in range(20):
        assert sorted(CaptionChoice().draw(fields, 3, rng)) == ["a", "b", "c d"]
        assert Counter(CaptionChoice().draw(fields, 6, rng)) == {"a": 2, "b": 2, "c d": 2}
    assert CaptionChoice().draw({"txt": "e", "caption": "f"}, 1, rng) == ["e"]
    assert CaptionChoice().draw({"txt": " ", "caption": "f"}, 1, rng) == ["f"]


def test_fields_are_drawn_by_their_probabilities() -> None:
    rng = np.random.default_rng(0)
    choice = CaptionChoice({"alt": 3.0, "synthetic": 1.0})
    fields = {"alt": "a", "synthetic": ["s", "t"], "caption": "never"}
    counts = Counter(text for _ in range(4000) for text in choice.draw(fields, 1, rng))
    assert set(counts) == {"a", "s", "t"}
    # three standard deviations of a binomial of 4,000 at 0.75 are 82
    assert abs(counts["a"] - 3000) < 82 and abs(counts["s"] - counts["t"]) < 150
    assert choice.draw({"alt": None, "synthetic": "s"}, 2, rng) == ["s", "s"]
    assert choice.all(fields) == ["a", "s", "t"]
    with pytest.raises(BrokenRecord, match="no caption in alt, synthetic"):
        choice.draw({"caption": "never"}, 1, rng)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(UserError, match="share above 0"):
        CaptionChoice({"txt": share})


@pytest.mark.parametrize(
    ("text", "passing", "failing"),
    [
        ("width >= 200", {"width": 200}, {"width": 199}),
        ("similarity>0.28", {"similarity": "0.29"}, {"similarity": 0.28}),
        ("punsafe < 0.1", {"punsafe": 0}, {"punsafe": None}),
        ("NSFW == UNLIKELY", {"NSFW": "UNLIKELY"}, {"NSFW": "LIKELY"}),
        ("NSFW != 'NSFW'", {"NSFW": "UNLIKELY"}, {"NSFW": "NSFW"}),
        ("width <= 1e3", {"width": 1000}, {"width": 1001}),
        ("width == 5", {"width": 5.0}, {"width": "five"}),
        ("width > 5", {"width": 6}, {}),
        ("width > 5", {"width": True, "width ": 1} | {"width": 7}, {"width": float("nan")}),
    ],
)
def test_a_filter(text: str, passing: dict[str, Any], failing: dict[str, Any]) -> None:
    condition = Filter.parse(text)
    assert condition(passing) and not condition(failing)


@pytest.mark.parametrize(
    "text", ["", "width", "width >", "width >> 3", "width > big", "__import__('os') > 1", "> 3"]
)
def test_a_filter_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--data.shards.filters"):
        Filter.parse(text)


# Chunks -------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    window=st.integers(1, 5),
    start=st.integers(0, 9),
)
def test_chunks_in_windows_every_sample_once_for_any_number_of_ranks(
    sizes: list[int], batch_size: int, world_size: int, window: int, start: int
) -> None:
    size, size_of_all = batch_size * world_size, sum(sizes)
    if size_of_all < size:
        return
    alone = ChunkSampler(sizes, size, window=window, seed=3, rank=0, world_size=1)
    alone.set_epoch(1)
    order = [position for _, position in alone]
    assert len(set(order)) == len(order) == size_of_all // size * size
    whole = ChunkSampler(sizes, 1, window=window, seed=3, rank=0, world_size=1)
    whole.set_epoch(1)
    everything = [position for _, position in whole]
    assert sorted(everything) == list(range(size_of_all)) and everything[: len(order)] == order
    chunk_of = np.repeat(np.arange(len(sizes)), sizes)
    seen = [set(chunk_of[everything[i : i + 1]].tolist()) for i in range(size_of_all)]
    opened = [len(set().union(*seen[: i + 1]) & set().union(*seen[i:])) for i in range(size_of_all)]
    assert max(opened) <= window, "no more chunks than that are begun and not finished"
    start = min(start, len(order) // size)
    parts = []
    for rank in range(world_size):
        sampler = ChunkSampler(sizes, batch_size, window=window, seed=3, rank=rank, world_size=world_size)
        sampler.set_epoch(1)
        sampler.start_batch = start
        parts.append([position for _, position in sampler])
    batches = zip(*(np.array(part).reshape(-1, batch_size) for part in parts), strict=True)
    assert [p for batch in batches for part in batch for p in part.tolist()] == order[start * size :]


def reading(**changes: Any) -> Reading:
    options = {"captions_per_image": 1, "batch_size": 4, "seed": 0, "rank": 0, "world_size": 1} | changes
    return Reading(**{"transform": TRANSFORM, "augmentation": Augmentation()} | options)


def chunk_dataset(folder: Path, *filters: str, **changes: Any) -> ChunkDataset:
    manifest = Manifest.find(str(folder))
    assert manifest is not None
    folders = [ChunkFolder(str(folder), manifest, "train", 4)]
    how = reading(**{"augmentation": Augmentation(min_scale=0.5), "captions_per_image": 2} | changes)
    return ChunkDataset(folders, how, CaptionChoice(), [Filter.parse(text) for text in filters])


def test_a_sample_is_a_function_of_seed_epoch_and_position(shards: dict[str, Path]) -> None:
    dataset = chunk_dataset(shards["litdata"])
    batch = dataset.__getitems__([(0, 3), (0, 30), (0, 4)])
    (alone,) = [dataset.__getitems__([(0, 30)])]
    assert torch.equal(batch.pictures[1], alone.pictures[0])
    assert batch.captions[2:4] == alone.captions and batch.image_id[1] == alone.image_id[0]
    later, otherwise = dataset.__getitems__([(1, 30)]), chunk_dataset(shards["litdata"], seed=1)
    assert not torch.equal(later.pictures[0], alone.pictures[0])
    assert not torch.equal(otherwise.__getitems__([(0, 30)]).pictures[0], alone.pictures[0])
    record = dataset.record(30)
    assert set(alone.captions) <= set(record.fields["captions"]) and len(set(alone.captions)) == 2
    assert alone.names == [record.name] and record.name.endswith(f"/train/00006.bin#{record.key}")


def test_filters_choose_rows_by_the_table(tmp_path: Path) -> None:
    for number in range(3):
        laion(tmp_path / f"{number}.tar", range(4 * number, 4 * number + 4), similarity=lambda n: n % 3)
    how = settings("litdata")
    convert(tars(str(tmp_path), "train"), how, tmp_path / "out", 1)
    dataset = chunk_dataset(tmp_path / "out", "similarity == 1", "width >= 20")
    assert [dataset.record(i).key for i in range(len(dataset))] == [f"{n:09d}" for n in (1, 4, 7, 10)]
    assert dataset.chunk_sizes == [1, 2, 1]
    with pytest.raises(
        UserError, match="no sample has 'height_'; there are key, similarity, txt, width, height"
    ):
        chunk_dataset(tmp_path / "out", "height_ > 1")
    with pytest.raises(UserError, match="no sample passes"):
        chunk_dataset(tmp_path / "out", "width > 1000")


def test_a_broken_sample_gives_way_to_the_next(tmp_path: Path) -> None:
    half = picture(1, (200, 200))[:3000]  # its header can be read
    write_tar(
        tmp_path / "0.tar",
        {
            "a": {"jpg": half, "txt": b"a"},
            "b": {"jpg": picture(2)},
            "c": {"jpg": picture(3), "txt": b"c"},
        },
    )
    how = settings("litdata")
    convert(tars(str(tmp_path), "train"), how, tmp_path / "out", 1)
    dataset = chunk_dataset(tmp_path / "out", captions_per_image=1)
    samples = dataset.__getitems__([(0, 0), (0, 2)])
    assert samples.captions == ["c", "c"]
    reasons = {name.rpartition("#")[2]: reason for name, reason in samples.broken.items()}
    assert set(reasons) == {"a", "b"} and reasons["b"] == "no caption in captions, txt, caption"


def test_a_chunk_that_was_cut_off_is_seen_at_the_start(scenes: Path, tmp_path: Path) -> None:
    how = settings("litdata")
    convert(captioned(scenes, how, **SPLITS), how, tmp_path / "out", 1)
    file = tmp_path / "out" / "train" / "00002.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00002.bin is not there, or not of"):
        chunk_dataset(tmp_path / "out")


def keys_of(loader: DataLoader[Any]) -> list[list[str]]:
    return [[name.rpartition("#")[2] for name in samples.names] for samples in loader]


def test_from_two_workers_and_two_ranks_to_one_no_sample_is_lost_or_repeated(shards: dict[str, Path]) -> None:
    def loader(rank: int, world: int, workers: int, start: int = 0) -> DataLoader[Any]:
        dataset = chunk_dataset(shards["litdata"])
        sampler = ChunkSampler(dataset.chunk_sizes, 8 // world, window=2, seed=0, rank=rank, world_size=world)
        sampler.start_batch = start
        return DataLoader(
            dataset, 8 // world, sampler=sampler, num_workers=workers, collate_fn=lambda samples: samples
        )

    undisturbed = keys_of(loader(0, 1, 0))
    first = [a + b for a, b in zip(*(keys_of(loader(rank, 2, 2))[:2] for rank in range(2)), strict=True)]
    rest = keys_of(loader(0, 1, 1, start=2))
    assert first + rest == undisturbed
    seen = [key for batch in first + rest for key in batch]
    assert len(seen) == len(set(seen)) == 32


# Other machines -----------------------------------------------------------------------------------------


@pytest.fixture
def served(shards: dict[str, Path]) -> Iterator[Callable[[Path], str]]:
    """Serves a folder by HTTP and gives its URL."""
    servers: list[http.server.ThreadingHTTPServer] = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Tests need no log."""

    def serve(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("protocol", ["file", "http"])
def test_remote_chunks_are_copied_checked_and_removed_again(
    shards: dict[str, Path],
    served: Callable[[Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = shards["litdata"]
    source = f"file://{here}" if protocol == "file" else served(here)
    manifest = Manifest.find(source)
    assert manifest is not None
    chunks = ChunkFolder(source, manifest, "train", keep=3)
    local = ChunkFolder(str(here), manifest, "train", keep=3)
    for row in np.random.default_rng(0).permutation(len(local)).tolist():
        there, expected = chunks[row], local[row]
        assert (there.image, there.fields, there.key) == (expected.image, expected.fields, expected.key)
        assert len(list(tmp_path.rglob("*.bin"))) <= 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_remote_chunk_that_is_not_what_was_written_is_refused(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    how = settings("litdata")
    convert(captioned(scenes, how, **SPLITS), how, tmp_path / "out", 1)
    file = tmp_path / "out" / "train" / "00000.bin"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    manifest = Manifest.find(f"file://{tmp_path / 'out'}")
    assert manifest is not None
    chunks = ChunkFolder(f"file://{tmp_path / 'out'}", manifest, "train", 3)
    assert chunks[6].image
    with pytest.raises(OSError, match="its checksum differs"):
        chunks[0]


def test_remote_tars(shards: dict[str, Path], served: Callable[[Path], str]) -> None:
    url = served(shards["webdataset"])
    training = TrainingShards(ShardOptions(sources=url), None)  # one of them
    assert training.samples == 32 and not training.chunked
    broken: dict[str, str] = {}
    found = list(read_tar(f"{url}/train/00000.tar", broken))
    assert [r.image for r in found] == [r.image for r in records(shards["webdataset"], "train")[:5]]
    assert list(read_tar(f"{url}/train/00099.tar", broken)) == [] and "00099.tar" in next(iter(broken))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("DIR/{00000..00003}.tar", "there is no .*00003.tar"),
        ("DIR/nothing*.tar", "names no file"),
        ("DIR/empty", "names no file"),
        ("DIR/absent", "there is no .*absent"),
        ("nope://x/{0..1}.tar", "cannot be read here: Protocol not known: nope"),
    ],
)
def test_sources_that_name_nothing(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    for number in range(3):
        (tmp_path / f"{number:05d}.tar").touch()
    with pytest.raises(UserError, match=said):
        for url in expand(source.replace("DIR", str(tmp_path))):
            list(read_tar(url, {}))


def test_patterns_name_files_in_order(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number:05d}.tar").touch()
    names = [str(tmp_path / f"{number:05d}.tar") for number in range(3)]
    for source in (
        tmp_path,
        f"{tmp_path}/{{00000..00002}}.tar",
        f"{tmp_path}/*.tar",
        f"{tmp_path}/0000{{0,1,2}}.tar",
    ):
        assert expand(str(source)) == names
    assert (
        expand(f"file://{tmp_path}") == expand(f"file://{tmp_path}/*.tar") == [f"file://{n}" for n in names]
    )


# Tars ---------------------------------------------------------------------------------------------------


def tar_dataset(
    sources: list[TarSource], *filters: str, shuffle_buffer: int = 3, **changes: Any
) -> TarDataset:
    conditions = [Filter.parse(text) for text in filters]
    return TarDataset(sources, reading(**changes), CaptionChoice(), conditions, shuffle_buffer=shuffle_buffer)


def numbers(samples: Any) -> list[int]:
    return [int(name.rpartition("#")[2]) for name in samples.names]


def test_ranks_and_workers_share_the_tars_of_a_pass(tmp_path: Path) -> None:
    urls = tuple(str(laion(tmp_path / f"{n}.tar", range(8 * n, 8 * n + 8))) for n in range(4))
    seen: list[int] = []
    for rank in range(2):
        dataset = tar_dataset([TarSource(urls, 1.0)], rank=rank, world_size=2, shuffle_buffer=1)
        for batch in range(4):  # 16 samples: half of all
            samples = dataset[BatchKey(0, 0, batch)]
            assert [text.split()[1] for text in samples.captions] == [str(n) for n in numbers(samples)]
            seen += numbers(samples)
    assert sorted(seen) == list(range(32))


def test_with_fewer_tars_than_readers_each_reads_all(tmp_path: Path) -> None:
    urls = (str(laion(tmp_path / "0.tar", range(8))),)
    for rank in range(2):
        dataset = tar_dataset([TarSource(urls, 1.0)], rank=rank, world_size=2, shuffle_buffer=1)
        seen = [n for batch in range(4) for n in numbers(dataset[BatchKey(0, 0, batch)])]
        assert Counter(seen) == dict.fromkeys(range(8), 2), "pass after pass"


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    often = TarSource((str(laion(tmp_path / "a.tar", range(10))),), 3.0)
    seldom = TarSource((str(laion(tmp_path / "b.tar", range(100, 110))),), 1.0)
    dataset = tar_dataset([often, seldom], shuffle_buffer=20)
    seen = [n for batch in range(250) for n in numbers(dataset[BatchKey(0, 0, batch)])]
    # three standard deviations of a binomial of 1,000 at 0.75 are 41
    assert abs(sum(n < 100 for n in seen) - 750) < 41


def test_a_filter_on_a_stream(tmp_path: Path) -> None:
    source = TarSource((str(laion(tmp_path / "a.tar", range(10), similarity=lambda n: n / 10)),), 1.0)
    dataset = tar_dataset([source], "similarity > 0.55")
    assert {n for batch in range(5) for n in numbers(dataset[BatchKey(0, 0, batch)])} == {6, 7, 8, 9}
    with pytest.raises(UserError, match=r"no sample in .*a\.tar and 0 more tars"):
        tar_dataset([source], "similarity > 2")[BatchKey(0, 0, 0)]


def test_damaged_tars_and_samples_are_named_and_passed_over(tmp_path: Path) -> None:
    good = laion(tmp_path / "good.tar", range(6))
    cut = laion(tmp_path / "cut.tar", range(10, 16))
    cut.write_bytes(cut.read_bytes()[:5000])
    none = tmp_path / "none.tar"
    none.write_bytes(b"no tar at all" * 100)
    odd = write_tar(
        tmp_path / "odd.tar",
        {
            "20": {"jpg": b"no picture", "txt": b"x"},
            "21": {"txt": b"no picture"},
            "22": {"jpg": picture(), "txt": b"x", "json": b"{"},
            "23": {"jpg": picture()},
            "24": {"PNG": picture(), "txt": b"fine"},
        },
    )
    urls = tuple(map(str, (good, cut, none, odd, tmp_path / "absent.tar")))
    dataset = tar_dataset([TarSource(urls, 1.0)], shuffle_buffer=1)
    broken: dict[str, str] = {}
    seen = set()
    for batch in range(8):
        samples = dataset[BatchKey(0, 0, batch)]
        broken |= samples.broken
        seen |= set(numbers(samples))
    assert seen >= {0, 1, 2, 3, 4, 5, 24} and not seen & {20, 21, 22, 23}
    reasons = {name.removeprefix(f"{tmp_path}/"): reason for name, reason in broken.items()}
    assert set(reasons) == {"cut.tar", "none.tar", "absent.tar", *(f"odd.tar#{n}" for n in (20, 21, 22, 23))}
    assert reasons["odd.tar#21"] == "no picture" and reasons["odd.tar#22"] == "its JSON cannot be read"


def test_nothing_but_broken_pictures_ends(tmp_path: Path) -> None:
    samples = {str(n): {"jpg": b"none", "txt": b"x"} for n in range(5)}
    source = TarSource((str(write_tar(tmp_path / "a.tar", samples)),), 1.0)
    with pytest.raises(UserError, match="100 samples in a row cannot be used"):
        tar_dataset([source])[BatchKey(0, 0, 0)]


def test_copies_of_a_picture_have_one_id(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {str(n): {"jpg": picture(n % 2), "txt": b"x"} for n in range(4)})
    samples = tar_dataset([TarSource((str(tar),), 1.0)])[BatchKey(0, 0, 0)]
    ids = {number % 2: set() for number in range(2)}
    for number, image_id in zip(numbers(samples), samples.image_id.tolist(), strict=True):
        ids[number % 2].add(image_id)
    assert len(ids[0]) == len(ids[1]) == 1 and ids[0] != ids[1]


# The options ----------------------------------------------------------------------------------------------


def test_how_many_samples_an_epoch_of_tars_has(tmp_path: Path) -> None:
    laion(tmp_path / "0.tar", range(4))
    laion(tmp_path / "1.tar", range(4, 10))
    with pytest.raises(UserError, match=r"it is not known how many samples .*0\.tar holds"):
        TrainingShards(ShardOptions(), tmp_path).loading(reading())
    for number, count in enumerate((4, 6)):
        (tmp_path / f"{number}_stats.json").write_text(json.dumps({"successes": count}))
    _, sampler = TrainingShards(ShardOptions(), tmp_path).loading(reading())
    assert len(sampler) == 2
    _, sampler = TrainingShards(ShardOptions(samples_per_epoch=50), tmp_path).loading(reading(world_size=2))
    assert len(sampler) == 6
    with pytest.raises(UserError, match="not one batch of 4 on each of 3"):
        TrainingShards(ShardOptions(), tmp_path).loading(reading(world_size=3))


def test_sources_that_do_not_go_together(shards: dict[str, Path], tmp_path: Path) -> None:
    lit, tar = str(shards["litdata"]), str(shards["webdataset"])
    laion(tmp_path / "0.tar", range(4))
    for sources, said in (
        ([lit, tar], "one kind"),
        ([lit, str(tmp_path)], "one kind"),
        ({lit: 1.0, f"{lit}/": 2.0}, "weights are for tars"),
    ):
        with pytest.raises(UserError, match=said):
            TrainingShards(ShardOptions(sources=sources), None)
    with pytest.raises(UserError, match="samples_per_epoch is for tars"):
        TrainingShards(ShardOptions(samples_per_epoch=3), lit)
    with pytest.raises(UserError, match="weight above 0"):
        ShardOptions(sources={lit: 0.0})
    with pytest.raises(UserError, match="window 0"):
        ShardOptions(window=0)


def test_pictures_to_validate_on_are_files_with_every_caption(
    shards: dict[str, Path], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = split_by_image(read_captions(scenes), seed=0, val_share=0.1, test_share=0.1)["val"]
    for source in (*map(str, shards.values()), str(scenes)):
        found = held_out(source, "val", CaptionChoice())
        assert [image.captions for image in found] == [image.captions for image in expected]
        assert [image.path.read_bytes() for image in found] == [i.path.read_bytes() for i in expected]
    laion(tmp_path / "0.tar", range(4), synthetic=lambda n: f"made {n}")
    both = held_out(str(tmp_path / "0.tar"), "val", CaptionChoice({"txt": 1.0, "synthetic": 1.0}))
    assert [image.captions for image in both] == [(f"text {n}", f"made {n}") for n in range(4)]
    assert held_out(str(tmp_path / "0.tar"), "val", CaptionChoice())[0].captions == ("text 0",)


def test_remote_pictures_to_validate_on_are_read_anew_when_they_change(
    served: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tars").mkdir()
    url = f"{served(tmp_path / 'tars')}/0.tar"
    for count in (3, 20):
        laion(tmp_path / "tars" / "0.tar", range(count))
        found = held_out(url, "val", CaptionChoice())
        assert [image.captions for image in found] == [(f"text {n}",) for n in range(count)]
    with pytest.raises(UserError, match=r"1\.tar cannot be read"):
        held_out(url.replace("0.tar", "1.tar"), "val", CaptionChoice())


def test_a_picture_with_an_odd_header_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laion(tmp_path / "0.tar", range(3))
    monkeypatch.setattr(Image.Image, "getexif", lambda self: 1 / 0)
    with pytest.raises(RunFailed, match="division by zero"):
        convert(tars(str(tmp_path), "train"), settings("webdataset"), tmp_path / "out", 1)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_the_commands(
    command: Callable[..., list[str]],
    scenes: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert main(["data", "convert", str(scenes), "--to", kind, "--out", str(out), "--num_workers", "1"]) == 0
    said = capfd.readouterr().out
    assert (
        said
        == f"32 to train, 4 to val, 4 to test: clip-lightning fit --data.dataset shards --data.root {out}\n"
    )
    options = {
        "data__dataset": "shards",
        "data__root": out,
        "data__captions_per_image": 2,
        "data__num_workers": 1,
        "model__freeze": "image",
    }
    assert main(command("fit", tmp_path / "runs", **options)) == 0, capfd.readouterr().err
    (metrics,) = (tmp_path / "runs").glob("*/metrics.json")
    scores = json.loads(metrics.read_text())
    assert scores["finished"] and scores["rsum"] > 0 and scores["step"] in (8, 16)
    assert main(command("test", tmp_path / "runs", ckpt_path="last", **options)) == 0
    assert "rsum" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.shards.window=2"], "--data.shards.* are options of --data.dataset shards"),
        (["--data.dataset=shards", "--data.root=nowhere"], "there is no nowhere"),
        (["--data.dataset=shards", "--data.shards.val=nowhere"], "names no file"),
        (["--data.dataset=shards", "--data.shards.sources=[SHARDS]"], "each name data"),
        (
            ["--data.dataset=shards", "--data.root=SHARDS", "--data.shards.filters=[wide]"],
            "FIELD COMPARISON VALUE",
        ),
        (["--data.dataset=shards", "--data.root=SHARDS", "--data.batch_size=64"], "batch of 64"),
        (["--data.dataset=shards", "--data.root=TARS"], "nothing to validate on"),
    ],
)
def test_what_is_said_of_wrong_options(
    command: Callable[..., list[str]],
    shards: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    laion(tmp_path / "0.tar", range(4))
    (tmp_path / "0_stats.json").write_text('{"successes": 4}')
    given_words = [
        word.replace("SHARDS", str(shards["litdata"])).replace("TARS", str(tmp_path)) for word in words
    ]
    assert main([*command("fit", tmp_path / "runs"), *given_words]) != 0
    assert said in capfd.readouterr().err.splitlines()[-1]


def test_fields_of_several_types_are_one_table_and_filter_alike(tmp_path: Path) -> None:
    laion(tmp_path / "0.tar", range(4), score=lambda n: n if n else None, odd=lambda n: None)
    laion(tmp_path / "1.tar", range(4, 8), score=float, odd=lambda n: "x", late=lambda n: True)
    laion(tmp_path / "2.tar", range(8, 12), score=float, odd=lambda n: n)
    how = settings("litdata")
    convert(tars(str(tmp_path), "train"), how, tmp_path / "out", 1)
    samples = records(tmp_path / "out", "train")
    for text in (
        "score > 2",
        "score != 5",
        "odd == x",
        "odd >= 9",
        "odd != x",
        "late == 1",
        "txt == 'text 3'",
    ):
        kept = [record.key for record in samples if Filter.parse(text)(record.fields)]
        dataset = chunk_dataset(tmp_path / "out", text)
        assert kept and [dataset.record(position).key for position in range(len(dataset))] == kept, text
