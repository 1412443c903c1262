"""`merge`: averages computed by hand, curves as `evaluate` measures them, and models that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_splits import write_classes

import clip_lightning.experiments.merge as experiment
from clip_lightning import CLIP
from clip_lightning.experiments.merge import choose
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.model.merge import RIDGE, average, average_linear, load_for_merge

Make = Callable[..., CLIP]
Pair = tuple[Path, Path]
Patch = pytest.MonkeyPatch
Run = Callable[..., dict]
Refused = Callable[..., str]


def changed(clip: CLIP, seed: int, parts: str = "heads") -> CLIP:
    """The model with other weights in these parts."""
    torch.manual_seed(seed)
    for name, weight in clip.named_parameters():
        if name.startswith(parts):
            weight.data += 0.3 * torch.randn_like(weight)
    return clip


@pytest.fixture
def pair(make_clip: Make, tmp_path: Path) -> Pair:
    """A model, and one with the same towers and other heads."""
    base = make_clip().save_pretrained(tmp_path / "base")
    return base, changed(make_clip(), 1).save_pretrained(tmp_path / "tuned")


def test_the_average_of_every_kind_of_tensor() -> None:
    count, third = torch.tensor(3), torch.tensor([0.1, 1 / 3])
    one = {"weight": torch.tensor([0.0, 4.0]), "same": third, "count": count}
    other = {"weight": torch.tensor([1.0, 8.0]), "same": third.clone(), "count": torch.tensor(9)}
    mean = average([one, other, other], [0.4, 0.3, 0.3])
    torch.testing.assert_close(mean["weight"], torch.tensor([0.6, 6.4]))
    assert torch.equal(mean["same"], third) and mean["count"] == 3
    mean["count"] += 1
    assert count == 3, "the models are not changed"
    for fractions, same in (([1.0, 0.0], one), ([0.0, 1.0], other)):
        assert torch.equal(average([one, other], fractions)["weight"], same["weight"])


def test_the_regression_mean_is_found_by_least_squares() -> None:
    torch.manual_seed(0)
    layers = [torch.randn(5, 4) for _ in range(2)]
    inputs = [torch.randn(n, 4).double() * torch.tensor([1, 1, scale, 0]) for n, scale in ((9, 3), (7, 0.1))]
    rows = [torch.cat([x / x.square().sum().div(4).sqrt(), RIDGE**0.5 * torch.eye(4)]) for x in inputs]
    rows = [0.3**0.5 * rows[0], 0.7**0.5 * rows[1]]
    targets = torch.cat([x @ layer.double().T for x, layer in zip(rows, layers, strict=True)])
    found = average_linear(layers, [0.3, 0.7], [x.T @ x for x in inputs])
    torch.testing.assert_close(found, torch.linalg.lstsq(torch.cat(rows), targets).solution.T)
    unknown = 0.3 * layers[0] + 0.7 * layers[1]
    torch.testing.assert_close(found[:, 3].float(), unknown[:, 3])


def test_a_fixed_alpha_and_several_models(pair: Pair, make_clip: Make, tmp_path: Path, printed: Run) -> None:
    third = changed(make_clip(), 2, "").save_pretrained(tmp_path / "third")
    found = printed("merge", *pair, third, "--alpha", "0.25", "--out", tmp_path / "out")
    assert found["alpha"] == 0.25 and found["curve"] == []
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == found
    first, second, last, result = map(CLIP.from_pretrained, (*pair, third, found["out"]))
    assert result.metadata == {"base": str(pair[0]), "tuned": [str(pair[1]), str(third)], "alpha": 0.25}
    states = [clip.state_dict() for clip in (first, second, last)]
    for name, weight in result.state_dict().items():
        parts = [f * state[name] for f, state in zip((0.75, 0.125, 0.125), states, strict=True)]
        torch.testing.assert_close(weight, sum(parts))
    assert first.scale < result.scale != last.scale or first.scale > result.scale


def test_a_bundle_is_replaced_and_nothing_else(
    pair: Pair, scenes: Path, tmp_path: Path, refused: Refused, printed: Run
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    found = printed("merge", *pair, "--alpha", "auto", "--data", scenes, "--out", out)
    best = max(point["data"] for point in found["curve"])
    assert found["scores"]["data"] == best and f"{best:.1f}" in found["reason"]
    (out / "notes.txt").write_text("mine")
    with Image.open(out / "merge.png") as picture:
        assert picture.width > 500
    found = printed("merge", *pair, "--alpha", "1", "--out", out)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "merge.png").exists(), "it would show another model"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for place in (other, other / "notes.txt"):
        assert "is a file, or contains" in refused("merge", *pair, "--out", place)
    assert [*other.iterdir()] == [other / "notes.txt"]


@pytest.mark.parametrize("parts", ["heads", ""], ids=["frozen towers", "trained towers"])
def test_the_curve_is_what_evaluate_measures(
    make_clip: Make, scenes: Path, tmp_path: Path, printed: Run, monkeypatch: Patch, parts: str
) -> None:
    base = make_clip().save_pretrained(tmp_path / "base")
    tuned = changed(make_clip(), 1, parts).save_pretrained(tmp_path / "tuned")
    colours = {"red": (200, 0, 0), "blue": (0, 0, 200), "green": (0, 200, 0)}
    for folder in write_classes(tmp_path / "classes", colours, 4).iterdir():
        (folder / "broken.png").write_bytes(b"nothing")
    calls: list[tuple] = []
    encode = experiment.encode_images
    monkeypatch.setattr(experiment, "encode_images", lambda *a, **k: (calls.append(a), encode(*a, **k))[1])
    options = ("--data", scenes, "--keep", tmp_path / "classes", "--out", tmp_path / "out")
    found = printed("merge", base, tuned, "--alpha", "auto", *options)
    assert len(calls) == (2 if parts else 22), "a frozen tower runs once for each data set"
    assert [point["alpha"] for point in found["curve"]] == [step / 10 for step in range(11)]
    assert found["scores"]["alpha"] == found["alpha"]
    points = found["curve"][0], found["curve"][10], found["scores"]
    for point, model in zip(points, (base, tuned, tmp_path / "out"), strict=True):
        measured = printed("evaluate", "retrieval", model, scenes, "--split", "val")
        assert point["data"] == pytest.approx(measured["rsum"])
        measured = printed("evaluate", "zero-shot", model, tmp_path / "classes")
        assert point["keep"] == pytest.approx(measured["zero_shot_top1"])
    plain = printed("merge", base, tuned, "--alpha", "0.5", "--out", tmp_path / "plain")["out"]
    fitted = printed("merge", base, tuned, "--alpha", "0.5", *options)["out"]
    heads = [CLIP.from_pretrained(name).heads["text"][1].weight for name in (plain, fitted)]
    assert torch.equal(*heads) == (parts == ""), "the heads of frozen towers are fitted to both data"


def test_models_that_differ(pair: Pair, make_clip: Make, tmp_path: Path, refused: Refused) -> None:
    transformed, tokenized = make_clip(), make_clip()
    transformed.transform = type(transformed.transform)((32, 32), "bilinear", (0, 0, 0), (1, 1, 1))
    tokenized.tokenize.tokenizer.add_tokens(["unheard"])
    for clip, difference in (
        (make_clip(embed_dim=8), "embed_dim 8, but"),
        (make_clip(head="mlp"), "head mlp, but"),
        (make_clip("random:test_resnet"), "image_tower.architecture test_resnet, but"),
        (transformed, "transform.interpolation bilinear, but"),
        (tokenized, "tokenizer "),
    ):
        other = clip.save_pretrained(tmp_path / "other")
        assert f"{other} has {difference}" in refused("merge", *pair, other, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_are_merged_first(pair: Pair, monkeypatch: Patch) -> None:
    adapted = CLIP.from_pretrained(pair[1])
    adapted.add_lora(LoRAConfig("text", rank=2))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    texts = ["a large red circle", "a star"]
    expected, load = adapted.eval().embed_texts(texts), CLIP.from_pretrained
    monkeypatch.setattr(CLIP, "from_pretrained", lambda name: adapted if name == "run" else load(name))
    clip, _, tuned = load_for_merge(str(pair[0]), ["run"])
    clip.load_state_dict(tuned)
    torch.testing.assert_close(clip.embed_texts(texts), expected)


def test_wrong_arguments(pair: Pair, tmp_path: Path, refused: Refused) -> None:
    for words, problem in (
        ("--alpha auto", "give --data ROOT as well"),
        ("--keep scenes", "give --data ROOT as well"),
        ("--alpha 1.5", "--alpha 1.5: expected auto, or a fraction from 0 to 1"),
        ("--alpha half", "--alpha: expected"),
        ("--alpha auto --data nowhere", "nowhere does not exist"),
    ):
        assert problem in refused("merge", *pair, "--out", tmp_path / "out", *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "keep", "expected"),
    [
        ([10, 70, 110], None, 1.0),
        ([10, 120, 110], None, 0.5),
        ([10, 70, 110], [200, 190, 100], 0.5),  # 0.6 + 0.9 > 1
        ([10, 40, 110], [200, 160, 100], 0.0),  # 0.3 + 0.6 < 1; the first of equals
        ([10, 70, 110], [200, 201, 199], 1.0),  # less than one per cent: nothing was lost
        ([100, 105, 100], [200, 150, 100], 0.0),  # nothing was won
    ],
)
def test_the_choice(data: list[float], keep: list[float] | None, expected: float) -> None:
    scores = {"data": data} | ({"keep": keep} if keep else {})
    points = [{"alpha": n / 2} | {name: scores[name][n] for name in scores} for n in range(3)]
    alpha, reason = choose(points)
    assert alpha == expected and reason.startswith(f"alpha {expected:g} ")
