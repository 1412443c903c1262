"""`data audit`: what is accused, at which precision, and what is written."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_lightning.data.scenes import write_scenes
from clip_lightning.experiments import audit as auditing
from clip_lightning.experiments.audit import choose_threshold, evidence, fit_heads, suspicions

Features = tuple[Tensor, Tensor, Tensor]


def features(images: int, captions: int, seed: int = 0, kinds: int | None = None) -> Features:
    """Features of images, of so many kinds, and of captions by eight hidden causes; the captions' images."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(images, 8, generator=generator)[torch.arange(images) % (kinds or images)]
    to_image, to_text = (torch.randn(8, width, generator=generator) for width in (40, 30))
    owner = torch.arange(images).repeat_interleave(captions)
    image = causes @ to_image + 0.7 * torch.randn(images, 40, generator=generator)
    text = causes[owner] @ to_text + 0.7 * torch.randn(len(owner), 30, generator=generator)
    return image, text, owner


def swapped(owner: Tensor, fraction: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The images after a fraction of the captions changed places, and which captions are at wrong ones."""
    chosen = torch.randperm(len(owner), generator=torch.Generator().manual_seed(seed))
    chosen = chosen[: int(fraction * len(owner))]
    given = owner.clone()
    given[chosen] = owner[chosen.roll(1)]
    return given, given != owner


@pytest.mark.parametrize(("captions", "least"), [(1, 0.5), (4, 0.85)])
def test_swapped_captions_are_found_at_the_promised_precision(captions: int, least: float) -> None:
    image, text, owner = features(1500 if captions == 1 else 500, captions)
    given, wrong = swapped(owner, 0.1)
    (log_odds, mismatched, _), _ = suspicions(image, text, given)
    fraction, threshold = choose_threshold(log_odds, mismatched)
    accused = log_odds >= threshold
    assert (accused & wrong).sum() >= least * wrong.sum()
    assert wrong[accused].float().mean() >= 0.88
    assert fraction == pytest.approx(float(wrong.float().mean()), abs=0.02)


def test_single_captions_among_several_are_judged_too() -> None:
    image, text, owner = features(800, 3)
    kept = (owner >= 400) | (torch.arange(len(owner)) % 3 == 0)  # one caption for each of the first half
    given, wrong = swapped(owner[kept], 0.1)
    (log_odds, mismatched, _), _ = suspicions(image, text[kept], given)
    accused = log_odds >= choose_threshold(log_odds, mismatched)[1]
    single = given < 400
    assert wrong[accused].float().mean() >= 0.85
    assert (accused & wrong & single).sum() >= 0.3 * (wrong & single).sum()


def test_clean_and_unrelated_captions_are_not_accused() -> None:
    image, text, owner = features(500, 4)
    (log_odds, mismatched, nearest), _ = suspicions(image, text, owner)
    assert not auditing.find_false_negatives(nearest, owner)
    assert (log_odds >= choose_threshold(log_odds, mismatched)[1]).float().mean() <= 0.01
    (log_odds, mismatched, _), _ = suspicions(torch.ones(500, 40), text, owner)
    assert choose_threshold(log_odds, mismatched)[1] == float("inf")
    noise = torch.randn(500, 30, generator=torch.Generator().manual_seed(3))
    (log_odds, mismatched, _), _ = suspicions(image, noise, torch.arange(500))
    assert choose_threshold(log_odds, mismatched)[1] == float("inf")


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_captions_that_fit_other_images_are_found(fraction: float) -> None:
    image, text, owner = features(500, 4, kinds=100)
    given, _ = swapped(owner, fraction)
    log_odds, nearest = suspicions(image, text, given)
    found = auditing.find_false_negatives(log_odds[2], given)
    scores = [score for _, score in found]
    assert len(found) >= 50 and scores == sorted(scores, reverse=True) and scores[-1] >= 0.5
    assert np.mean([owner[nearest[row]] % 100 == row % 100 for row, _ in found]) >= 0.95
    assert all(given[nearest[row]] != row for row, _ in found)


def test_images_are_judged_by_heads_that_did_not_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    judged: list[set[int]] = []
    image, text, owner = features(100, 2)
    image[:, 0] = torch.arange(100)  # names the image

    def fit(images: Tensor, texts: Tensor, position: Tensor) -> Any:
        names = {int(name) for name in images[:, 0]}
        assert [int(name) for name in images[position, 0]] == [int(i) for i in owner if int(i) in names]
        seen.append(names)
        return (
            lambda rows: judged.append({int(name) for name in rows[:, 0]}) or rows[:, :8],
            lambda rows: rows[:, :8],
        )

    monkeypatch.setattr(auditing, "fit_heads", fit)
    monkeypatch.setattr(auditing, "GROUP", 12)
    suspicions(image, text, owner)
    assert len(seen) == 5 and len(judged) == 10
    assert sorted(name for group in judged for name in group) == list(range(100))
    assert all(seen[i // 2].isdisjoint(group) for i, group in enumerate(judged))


def test_evidence_equals_that_of_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text, raw = (F.normalize(torch.randn(n, 6, generator=generator), dim=-1) for n in (3, 5, 5))
    owner, placed = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([3, 1, 4, 0, 4])
    found = evidence(image, text, 2 * raw, owner, placed)
    for row, (at, caption) in enumerate(zip(owner.tolist(), placed.tolist(), strict=True)):
        match = 20 * image[at] @ text[caption]
        images = [other for other in range(3) if other not in (owner[caption], at)]
        of_caption = match - (20 * image @ text[caption])[images].logsumexp(0)
        captions = [other for other in range(5) if owner[other] != at and other != caption]
        of_image = match - (20 * text @ image[at])[captions].logsumexp(0)
        rest = [other for other in range(5) if owner[other] == at and other != row]
        cosines = [
            float(F.cosine_similarity(side[caption], side[rest].mean(0), dim=0)) if rest else 0.0
            for side in (text, raw)
        ]
        expected = [float(of_caption), float(of_image), *cosines]
        assert found[row].tolist() == pytest.approx(expected, rel=5e-3)


def test_heads_are_those_of_canonical_correlation_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare cosines with those of the QR method (Björck and Golub 1973), as dimensions may change signs."""
    monkeypatch.setattr(auditing, "RIDGE", 0.0)
    image, text, owner = features(200, 2)
    heads = fit_heads(image, text, owner)
    sides = [F.normalize(side, dim=-1).double().numpy() for side in (image[owner], text)]
    q, other_q = (np.linalg.qr(side - side.mean(0))[0] for side in sides)
    left, correlations, right = np.linalg.svd(q.T @ other_q, full_matrices=False)
    ours, theirs = q @ left * correlations, other_q @ right.T * correlations
    for rows in (ours, theirs):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = heads[0](image[owner]) @ heads[1](text).T
    np.testing.assert_allclose(cosines.numpy(), ours @ theirs.T, atol=2e-3)


def test_the_threshold_follows_from_both_distributions() -> None:
    rng = np.random.default_rng(0)
    right, wrong, mismatched = (
        torch.from_numpy(rng.normal(m, 1, n)) for m, n in ((-3, 16000), (3, 4000), (3, 20000))
    )
    fraction, threshold = choose_threshold(torch.cat([right, wrong]), mismatched)
    assert fraction == pytest.approx(0.2, abs=0.01)
    precision = (wrong >= threshold).sum() / (torch.cat([right, wrong]) >= threshold).sum()
    assert 0.88 <= precision <= 1
    assert choose_threshold(mismatched, mismatched)[1] == float("inf")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 scenes, enough to judge captions."""
    folder = tmp_path_factory.mktemp("audit") / "scenes"
    write_scenes(folder, count=120, size=32, seed=0)
    return folder


def test_command_prints_and_writes_what_it_accuses(
    table: Path, bundle: Path, tmp_path: Path, ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Accuse every fiftieth caption, the later the surer."""
        rows = torch.arange(len(text), dtype=torch.float32)
        given = torch.where(rows % 50 == 0, 7 + rows / 100, -9.0)
        alike = torch.where(owner == 7, -2.0, 3.0)  # image 7 with the last caption
        return torch.stack([given, torch.linspace(5, 6, len(text)), alike]), torch.full((120,), len(text) - 1)

    monkeypatch.setattr(auditing, "suspicions", judged)
    options = ["data", "audit", str(table), f"--model={bundle}", f"--cache={tmp_path / 'cache'}"]
    fixed = tmp_path / "clean.csv"
    found = json.loads(ran(*options, "--json", f"--out={tmp_path / 'out'}", f"--fix={fixed}").out)
    scores = [suspect["score"] for suspect in found["suspects"]]
    assert found["accused"] == len(scores) == -(-found["captions"] // 50)
    assert scores == sorted(scores, reverse=True) and 0 < scores[-1] <= scores[0] <= 1
    assert {*found["suspects"][0]} == {"image", "caption", "score"}
    (alike,) = found["false_negatives"]
    assert alike["score"] == pytest.approx(0.8808, abs=1e-4) and alike["image"] != alike["of"]
    assert all((table / suspect["image"]).is_file() for suspect in found["suspects"])
    with fixed.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    kept = {((fixed.parent / row["image"]).resolve(), row["caption"]) for row in rows}
    assert not kept & {((table / s["image"]).resolve(), s["caption"]) for s in found["suspects"]}
    assert found["fixed"]["captions"] == len(rows) == found["captions"] - found["accused"]
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    page = (tmp_path / "out" / "audit.html").read_text()
    assert page.count("<article>") == found["accused"] + 1 and found["suspects"][0]["caption"] in page
    assert f"a caption of {alike['of']}" in page
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert written["suspects"] == found["suspects"]
    assert f"accused   {found['accused']} captions" in ran(*options).out


def test_wrong_input_is_one_line(table: Path, scenes: Path, tmp_path: Path, refused: Any) -> None:
    existing = tmp_path / "a.csv"
    existing.write_text("")
    for arguments, expected in (
        ([str(scenes)], "has 40 images that can be read, too few to judge captions by others; expected 100"),
        ([str(table), f"--fix={existing}"], "expected the name of a new .csv file"),
        ([str(table), "--model=nothing/here"], "no model 'nothing/here'"),
        ([str(table), f"--out={table}"], "is the folder of the data"),
    ):
        assert expected in refused("data", "audit", *arguments)
