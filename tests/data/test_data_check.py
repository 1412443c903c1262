"""`data check`: what is found, how it is shown, and the cleaned table."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from clip_lightning.__main__ import main
from clip_lightning.data import check as check_module
from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.check import (
    MOST_DIFFERENT,
    PLAIN,
    Entry,
    alike,
    find_copies,
    groups,
    perceptual_hash,
)

Printed = pytest.CaptureFixture[str]
Row = tuple[str, ...]


def blobs(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Soft coloured blobs, as different from each other as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Two splits of images in `tmp_path / "data"`, whose faults the tests add."""
    (tmp_path / "data").mkdir()
    for number in range(12):
        blobs(number).save(tmp_path / "data" / f"{number}.jpg", quality=92)
    return [(f"{n}.jpg", f"an image called {n}", "val" if n > 9 else "train") for n in range(12)]


@pytest.fixture
def check(tmp_path: Path, capsys: Printed) -> Any:
    """Writes a table of rows, or takes a path, and gives the status and what is found."""

    def run(data: Path | list[Row], *options: str) -> tuple[int, dict[str, Any]]:
        root = data if isinstance(data, Path) else tmp_path / "data"
        if isinstance(data, list):
            with (root / "captions.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("image", "caption", "split")[: len(data[0])], *data])
        capsys.readouterr()
        status = main(["data", "check", str(root), "--json", "--num_workers", "1", *options])
        return status, json.loads(capsys.readouterr().out)

    return run


def again(root: Path, name: str, new: str) -> None:
    """Write a smaller image that looks the same."""
    Image.open(root / name).resize((64, 48)).save(root / new, quality=60)


def hash_of(image: Image.Image) -> np.ndarray:
    return perceptual_hash(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_perceptual_hashes_survive_scaling_and_encoding(tmp_path: Path) -> None:
    for seed in range(5):
        image = blobs(seed)
        image.save(tmp_path / "a.png")
        again(tmp_path, "a.png", "small.jpg")
        assert (hash_of(image) != hash_of(Image.open(tmp_path / "small.jpg"))).sum() <= MOST_DIFFERENT
        assert (hash_of(image) != hash_of(blobs(seed + 100))).sum() > MOST_DIFFERENT
    assert not perceptual_hash(torch.full((3, 40, 40), 200, dtype=torch.uint8)).any()


def test_pairs_equal_those_of_a_brute_force_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "BLOCK", 7)
    rng = np.random.default_rng(0)
    hashes = [rng.choice([-1, 1], 256) for _ in range(30)]
    for row, changed in ((20, MOST_DIFFERENT), (21, MOST_DIFFERENT + 1), (22, 0)):
        hashes[row] = hashes[row - 15].copy()
        hashes[row][rng.choice(256, changed, replace=False)] *= -1
    hashes[3] = PLAIN
    kept = [row for row in range(30) if row != 3]
    near = ((a, b) for a in kept for b in kept if a < b and (hashes[a] != hashes[b]).sum() <= MOST_DIFFERENT)
    assert alike(hashes) == list(near) == [(5, 20), (7, 22)]
    assert alike([PLAIN, hashes[0]]) == []
    assert groups([(4, 9), (1, 2), (2, 4), (6, 7)]) == [[1, 2, 4, 9], [6, 7]]


def test_every_kind_of_problem_is_reported(rows: list[Row], check: Any, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "3.jpg").write_bytes((root / "3.jpg").read_bytes()[:400])
    shutil.copy(root / "0.jpg", root / "copy.jpg")
    again(root, "1.jpg", "smaller.jpg")
    blobs(50, (20, 20)).save(root / "tiny.png")
    rows += [
        ("copy.jpg", "the same", "val"),
        ("smaller.jpg", "nearly the same", "val"),
        *[("tiny.png", "an image called 5", "train")] * 2,
        *[(name, "long " * 12 + end, "train") for end in "ab" for name in ("4.jpg", "6.jpg")],
        ("gone.jpg", "there is none", "train"),
        ("2.jpg", "", "train"),
    ]
    status, found = check(rows)
    assert status == 1
    assert list(found["broken"]) == ["3.jpg"]
    assert found["left_out"] == {"gone.jpg": "there is no such image", "2.jpg": "row 22 has no caption"}
    assert found["leaks"] == found["same"] == [["0.jpg", "copy.jpg"]]
    assert found["alike_leaks"] == [["1.jpg", "smaller.jpg"]]
    assert (found["captions_repeated"], found["captions_shared"]) == (1, 3)
    assert found["splits"] == {"train": {"images": 10, "captions": 15}, "val": {"images": 4, "captions": 4}}
    assert (found["images"], found["captions"], found["official_splits"]) == (14, 19, True)
    assert [line.split(":")[0] for line in found["errors"]] == [
        "1 image cannot be read",
        "2 annotations cannot be used",
        "1 group of byte-identical images in more than one split (leakage)",
    ]
    long = repr("long " * 12)
    looks = "1 group of images that look the same in more than one split (leakage)"
    assert found["warnings"] == [
        f"{looks}: 1.jpg (train) = smaller.jpg (val)",
        "1 image with repeated captions: tiny.png (1)",
        f"3 captions shared by several images: {long} (2), {long} (2), 'an image called 5' (2)",
        "1 image with a side of less than 32 pixels: tiny.png",
    ]


def test_fix_writes_a_clean_table(rows: list[Row], check: Any, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "3.jpg").write_bytes(b"")
    shutil.copy(root / "0.jpg", root / "copy.jpg")
    again(root, "1.jpg", "smaller.jpg")
    check([*rows, ("copy.jpg", 'with "quotes", a comma', "val"), ("smaller.jpg", "s", "test"), rows[5]])
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    fixed = tmp_path / "elsewhere" / "clean.csv"
    status, found = check(root, f"--fix={fixed}")
    assert status == 1, "of what was checked"
    assert found["fixed"] == {
        "path": str(fixed), "images": 11, "captions": 11,
        "without_broken": 1, "without_leaks": 2, "without_copies": 0, "without_repeats": 1,
    }  # fmt: skip
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before
    status, found = check(fixed)
    assert (status, found["errors"], found["warnings"]) == (0, [], [])
    sizes = {name: split["images"] for name, split in found["splits"].items()}
    assert sizes == {"train": 7, "val": 3, "test": 1}


def test_fixed_random_splits_have_no_leaks(rows: list[Row], check: Any, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name, *_ in rows[:9]:  # so many that some must be on both sides
        again(root, name, f"again-{name}")
    undivided = [(file, f"caption of {file}") for name, *_ in rows[:9] for file in (name, f"again-{name}")]
    splits = "--read.splits.val_fraction=0.3", "--read.splits.test_fraction=0.3"
    _, found = check(undivided, *splits, f"--fix={root / 'clean.csv'}")
    assert found["alike_leaks"] and not found["official_splits"]
    status, found = check(root / "clean.csv")
    assert (status, found["alike_leaks"], found["official_splits"]) == (0, [], True)


def test_text_and_page_show_the_report(rows: list[Row], check: Any, tmp_path: Path, ran: Any) -> None:
    assert check(rows)[0] == 0
    printed = ran("data", "check", tmp_path / "data").out
    assert "12: train 10, val 2 (official splits)" in printed
    assert "read      captions.csv (12 rows), 0 rows or images left out" in printed
    assert "72 to 72 (median 72) on the short side" in printed
    assert printed.endswith("no errors\n")
    evil = "<script>alert(1)</script>"
    shutil.copy(tmp_path / "data" / "0.jpg", tmp_path / "data" / "<b>.jpg")
    status, found = check([*rows, ("<b>.jpg", evil, "val"), ("1.jpg", evil, "train")], f"--out={tmp_path}")
    assert status == 1
    assert json.loads((tmp_path / "check.json").read_text()) == found
    page = (tmp_path / "check.html").read_text()
    assert evil not in page and "<b>.jpg" not in page and "&lt;script&gt;" in page
    assert page.count("<figure>") == 13 + 2  # all of them, and the two that are the same


def test_truncated_and_unknown_captions_are_counted(rows: list[Row], bert: Path, check: Any) -> None:
    rows += [("0.jpg", "red square " * 10, "train"), ("1.jpg", "\u0e44\u0e21\u0e48 \u732b", "train")]
    _, found = check(rows, f"--text_tower=random:{bert}", "--max_length=16")
    lost = {"max_length": 16, "count": 1, "unknown": 1}
    assert found["captions_cut"] == {"text_tower": f"random:{bert}", **lost}
    for line in ("7.1 % of the captions are longer than 16 tokens", "7.1 % of the captions have no word"):
        assert any(warning.startswith(line) for warning in found["warnings"])


def test_too_few_images_to_split_are_checked(tmp_path: Path, check: Any, ran: Any) -> None:
    write_pairs(tmp_path, 1)
    assert "too few to hold out" in ran("data", "check", tmp_path).err
    for option in ("--num_workers=0", f"--out={tmp_path / '0.txt'}", f"--fix={tmp_path / '0.txt'}"):
        assert main(["data", "check", str(tmp_path), option]) == 2
    write_pairs(tmp_path, 6)
    for number in range(1, 5):
        shutil.copy(tmp_path / "0.jpg", tmp_path / f"{number}.jpg")
    _, found = check(tmp_path)
    assert found["same"] == found["alike"] == [[f"{number}.jpg" for number in range(5)]]


def write_pairs(folder: Path, count: int) -> None:
    for number in range(count):
        blobs(number).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"caption {number}")


def test_a_name_that_is_not_utf8_is_left_out(tmp_path: Path, check: Any) -> None:
    write_pairs(tmp_path, 4)
    try:
        (tmp_path / "3.jpg").rename(tmp_path / os.fsdecode(b"3\xff.jpg"))
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    status, found = check(tmp_path)
    assert (status, found["images"]) == (1, 3)
    assert found["left_out"] == {"3?.jpg": "its name is not UTF-8; rename it"}


def test_copies_in_other_data_are_found_and_left_out(
    rows: list[Row], check: Any, tmp_path: Path, refused: Any
) -> None:
    root, other = tmp_path / "data", tmp_path / "other"
    other.mkdir()
    for number in range(200, 230):
        blobs(number).save(other / f"{number}.jpg")
    kinds = {
        "0": lambda image: image.resize((48, 36)),
        "1": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "2": lambda image: image.crop((3, 5, 3 + 86, 5 + 65)),
        "3": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((9, 0, 96, 65)),
    }
    for name, change in kinds.items():
        change(Image.open(root / f"{name}.jpg")).save(other / f"copy-{name}.jpg", quality=70)
    Image.open(root / "4.jpg").crop((5, 3, 92, 69)).save(root / "cropped.jpg")  # the copy has more than ours
    shutil.move(root / "4.jpg", other / "copy-cropped.jpg")
    shutil.copy(root / "5.jpg", other / "the-same.jpg")
    (other / "broken.jpg").write_bytes(b"")
    for file in other.glob("*.jpg"):
        file.with_suffix(".txt").write_text("a caption")
    fixed = tmp_path / "clean.csv"
    ours = [*(row for row in rows if row[0] != "4.jpg"), ("cropped.jpg", "more", "train")]
    options = f"--against={other}", f"--fix={fixed}", f"--out={tmp_path / 'out'}"
    status, found = check(ours, *options, "--read.max_broken=0.5")
    assert status == 1
    assert found["against"] == str(other)
    assert found["against_same"] == {"5.jpg": "the-same.jpg"}
    assert found["against_alike"] == {f"{name}.jpg": f"copy-{name}.jpg" for name in [*kinds, "cropped"]}
    assert found["errors"] == [
        "1 image byte-identical to one in the other data (leakage): 5.jpg (the-same.jpg)"
    ]
    assert found["warnings"][0].startswith(
        "5 images similar to one in the other data (leakage): 0.jpg (copy-0.jpg)"
    )
    assert found["fixed"]["without_copies"] == 6
    kept = {line["image"] for line in csv.DictReader(fixed.read_text().splitlines())}
    assert kept == {f"data/{number}.jpg" for number in range(6, 12)}
    page = (tmp_path / "out" / "check.html").read_text()
    assert page.count("<figure>") == 2 * 6 + 12 and "copy-cropped.jpg" in page
    assert "nowhere" in refused("data", "check", root, "--against", tmp_path / "nowhere")


def test_the_closest_copy_equals_that_of_a_brute_force_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "FEW", 3)
    monkeypatch.setattr(check_module, "MOST_DIFFERENT_VIEWS", 127)
    rng = np.random.default_rng(0)

    def entries(count: int) -> list[Entry]:
        views = rng.choice(np.array([-1, 1], np.int8), (count, 4, 256))
        image = CaptionedImage(Path(), ())
        return [
            Entry(image, f"{n}", "", sha256=f"{rng.random()}", looks=v[0], views=v)
            for n, v in enumerate(views)
        ]

    ours, theirs = entries(7), entries(8)
    expected = {}
    for one in ours:
        bits = [
            min([(one.looks != v).sum() for v in other.views] + [(v != other.looks).sum() for v in one.views])
            for other in theirs
        ]
        expected[one.name] = theirs[int(np.argmin(bits))].name
    assert find_copies(ours, theirs) == {"against_same": {}, "against_alike": expected}
    assert find_copies(ours, []) == {"against_same": {}, "against_alike": {}}
