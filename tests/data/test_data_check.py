"""`data check`: what is found, what is said of it, the page, and the cleaned table."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from clip_lightning.__main__ import main
from clip_lightning.data.checking.near_duplicates import MOST_DIFFERENT, alike, groups, perceptual_hash


def picture(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Soft coloured blobs, as different from each other as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two splits of pictures, whose faults the tests add."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(12):
        picture(number).save(folder / f"{number}.jpg", quality=92)
        rows.append((f"{number}.jpg", f"a picture called {number}", "val" if number > 9 else "train"))
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "split"), *rows])


def read_rows(file: Path) -> list[tuple[str, str, str]]:
    with file.open(newline="") as opened:
        return [tuple(row) for row in list(csv.reader(opened))[1:]]  # type: ignore[misc]


def check(root: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    capsys.readouterr()
    status = main(["data", "check", str(root), "--json", "--num_workers", "1", *options])
    return status, json.loads(capsys.readouterr().out)


def hash_of(image: Image.Image) -> np.ndarray:
    found = perceptual_hash(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert found is not None
    return found


def test_looks_outlive_scaling_and_encoding_but_not_another_picture(tmp_path: Path) -> None:
    for seed in range(5):
        image = picture(seed)
        image.resize((48, 36)).save(tmp_path / "small.jpg", quality=50)
        small = Image.open(tmp_path / "small.jpg")
        assert (hash_of(image) != hash_of(small)).sum() <= MOST_DIFFERENT
        assert (hash_of(image) != hash_of(picture(seed + 100))).sum() > MOST_DIFFERENT
    assert perceptual_hash(torch.full((3, 40, 40), 200, dtype=torch.uint8)) is None


def test_pairs_are_those_of_comparing_every_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_lightning.data.checking.near_duplicates.BLOCK", 7)
    rng = np.random.default_rng(0)
    hashes: list[np.ndarray | None] = [rng.random(256) < 0.5 for _ in range(30)]
    for row, changed in ((20, MOST_DIFFERENT), (21, MOST_DIFFERENT + 1), (22, 0)):
        hashes[row] = hashes[row - 15].copy()  # type: ignore[union-attr]
        hashes[row][rng.choice(256, changed, replace=False)] ^= True  # type: ignore[index]
    hashes[3] = None
    expected = [
        (a, b)
        for a in range(30)
        for b in range(a + 1, 30)
        if hashes[a] is not None and hashes[b] is not None
        if (hashes[a] != hashes[b]).sum() <= MOST_DIFFERENT  # type: ignore[union-attr]
    ]
    assert alike(hashes) == expected == [(5, 20), (7, 22)]
    assert alike([None, hashes[0]]) == []
    assert groups([(4, 9), (1, 2), (2, 4), (6, 7)]) == [[1, 2, 4, 9], [6, 7]]


def test_sound_data_has_status_0(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(root), "--num_workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "12: train 10, val 2 (official splits)" in said
    assert "72 on the short side" in said
    assert said.endswith("no errors\n")


def test_everything_that_is_wrong_is_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(root / "captions.csv")
    (root / "3.jpg").write_bytes((root / "3.jpg").read_bytes()[:400])
    shutil.copy(root / "0.jpg", root / "copy.jpg")
    Image.open(root / "1.jpg").resize((64, 48)).save(root / "smaller.jpg", quality=60)
    picture(50, (20, 20)).save(root / "tiny.png")
    rows += [
        ("copy.jpg", "the same", "val"),
        ("smaller.jpg", "nearly the same", "val"),
        ("tiny.png", "a picture called 5", "train"),
        ("tiny.png", "a picture called 5", "train"),
        ("gone.jpg", "there is none", "train"),
        ("2.jpg", "", "train"),
    ]
    write_rows(root, rows)
    status, found = check(root, capsys=capsys)
    assert status == 1
    assert list(found["broken"]) == ["3.jpg"]
    assert found["left_out"] == {"gone.jpg": "there is no such picture", "2.jpg": "row 18 has no caption"}
    assert found["leaks"] == found["same"] == [["0.jpg", "copy.jpg"]]
    assert found["alike_leaks"] == [["1.jpg", "smaller.jpg"]]
    assert (found["captions_repeated"], found["captions_shared"]) == (1, 1)
    assert found["splits"] == {
        "train": {"pictures": 10, "captions": 11},
        "val": {"pictures": 4, "captions": 4},
    }
    assert [line.split(":")[0] for line in found["errors"]] == [
        "1 picture cannot be read",
        "2 rows or pictures cannot be used",
        "leakage",
    ]
    assert [line for line in found["warnings"] if "tiny.png" in line] == [
        "1 picture with less than 32 pixels a side: tiny.png"
    ]


def test_fix_writes_a_table_that_has_no_errors(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(root / "captions.csv")
    (root / "3.jpg").write_bytes(b"")
    shutil.copy(root / "0.jpg", root / "copy.jpg")
    Image.open(root / "1.jpg").resize((64, 48)).save(root / "smaller.jpg", quality=60)
    rows += [("copy.jpg", 'with "quotes", a comma', "val"), ("smaller.jpg", "s", "test"), rows[5]]
    write_rows(root, rows)
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    fixed = root.parent / "elsewhere" / "clean.csv"
    status, found = check(root, f"--fix={fixed}", capsys=capsys)
    assert status == 1, "of what was checked"
    assert found["fixed"] == {
        "path": str(fixed), "pictures": 11, "captions": 11,
        "without_broken": 1, "without_leaks": 2, "without_repeats": 1,
    }  # fmt: skip
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before
    status, found = check(fixed, capsys=capsys)
    assert (status, found["errors"], found["warnings"]) == (0, [], [])
    assert {name: split["pictures"] for name, split in found["splits"].items()} == {
        "train": 7, "val": 3, "test": 1
    }  # fmt: skip
    assert main(["data", "check", str(root), f"--fix={fixed}"]) == 2
    assert "exists; give the name of a new file" in capsys.readouterr().err


def test_drawn_splits_leak_nothing_after_fix(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name, _, _ in read_rows(root / "captions.csv")]
    for name in names[:9]:  # so many that some must lie on both sides
        Image.open(root / name).resize((64, 48)).save(root / f"again-{name}", quality=60)
    rows = [(name, f"caption of {name}") for file in names[:9] for name in (file, f"again-{file}")]
    with (root / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    shares = ["--splits.val_fraction=0.3", "--splits.test_fraction=0.3"]
    _, found = check(root, *shares, f"--fix={root / 'clean.csv'}", capsys=capsys)
    assert found["alike_leaks"]
    assert not found["official_splits"]
    status, found = check(root / "clean.csv", capsys=capsys)
    assert (status, found["alike_leaks"], found["official_splits"]) == (0, [], True)


def test_the_page_escapes_and_shows(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(root / "captions.csv")
    evil = "<script>alert(1)</script>"
    shutil.copy(root / "0.jpg", root / "<b>.jpg")
    rows += [("<b>.jpg", evil, "val"), ("1.jpg", evil, "train")]
    write_rows(root, rows)
    out = tmp_path / "report"
    status, found = check(root, f"--out={out}", capsys=capsys)
    assert status == 1
    page = (out / "check.html").read_text()
    assert evil not in page
    assert "<b>.jpg" not in page
    assert "&lt;script&gt;" in page
    assert json.loads((out / "check.json").read_text()) == found
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.width > 1000


def test_captions_that_a_tokenizer_cuts(root: Path, bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(root / "captions.csv")
    write_rows(root, [*rows, ("0.jpg", "red square " * 10, "train")])
    _, found = check(root, f"--text_tower=random:{bert}", "--max_length=16", capsys=capsys)
    assert found["captions_cut"] == {"text_tower": f"random:{bert}", "max_length": 16, "count": 1}
    assert any("would be cut" in line for line in found["warnings"])


def test_too_few_pictures_to_split_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(0).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("one")
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "too few to hold out" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path), "--num_workers=0"]) == 2
    assert main(["data", "check", str(tmp_path), f"--out={tmp_path / 'a.txt'}"]) == 2
    assert main(["data", "check", str(tmp_path), f"--fix={tmp_path / 'a.txt'}"]) == 2


def pairs(folder: Path, count: int = 4) -> None:
    for number in range(count):
        picture(number).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"caption {number}")


def test_a_fixed_table_that_takes_the_folders_place_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs(tmp_path)
    assert main(["data", "check", str(tmp_path), f"--fix={tmp_path.parent / 'outside.csv'}"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path), f"--fix={tmp_path / 'clean.csv'}"]) == 0
    assert "do not go before it" in capsys.readouterr().err


def test_a_name_that_is_no_utf8_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs(tmp_path)
    try:
        (tmp_path / "3.jpg").rename(tmp_path / os.fsdecode(b"3\xff.jpg"))
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    status, found = check(tmp_path, capsys=capsys)
    assert (status, found["pictures"]) == (1, 3)
    assert found["left_out"] == {"3\ufffd.jpg": "its name is not UTF-8; rename it"}


def test_many_copies_are_one_group_without_all_their_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clip_lightning.data.checking import findings

    pairs(tmp_path, 6)
    for number in range(1, 5):
        shutil.copy(tmp_path / "0.jpg", tmp_path / f"{number}.jpg")
    compared: list[int] = []
    real = findings.alike
    monkeypatch.setattr(
        findings, "alike", lambda looks: compared.append(sum(one is not None for one in looks)) or real(looks)
    )
    _, found = check(tmp_path, capsys=capsys)
    assert found["same"] == found["alike"] == [[f"{number}.jpg" for number in range(5)]]
    assert compared == [2]
