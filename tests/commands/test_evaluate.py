"""`evaluate` and `classify` on tiny bundles and drawn scenes, as a user calls them."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_splits import write_classes
from wandb_server import WandbServer

from clip_lightning import CLIP, retrieval_metrics
from clip_lightning.__main__ import main
from clip_lightning.commands import MODEL
from clip_lightning.data.formats import read_captions
from clip_lightning.evaluation.compositional import compositional_metrics
from clip_lightning.reports.tables import markdown

Patch = pytest.MonkeyPatch
Printed = pytest.CaptureFixture[str]
Refused = Callable[..., str]
Make = Callable[..., CLIP]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of plain colours, four pictures each; and one file that is no picture."""
    colours = {"red_square": (255, 0, 0), "blue_circle": (0, 0, 255), "green": (0, 200, 0)}
    root = write_classes(tmp_path / "pictures", colours, 4)
    (root / "green" / "broken.jpg").write_bytes(b"nothing")
    return root


def printed_json(capsys: Printed, *words: str | Path) -> tuple[dict, str]:
    assert main([*map(str, words), "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    return json.loads(out), err


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_zero_shot(bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed):
    words = ("evaluate", "zero-shot", bundle, pictures, "--templates", "imagenet")
    found, err = printed_json(capsys, *words, "--out", tmp_path / "out")
    assert found["images"] == 12 and found["classes"] == 3 and found["broken"] == 1
    assert found["split"] == "all" and found["probabilities"] == "softmax"
    assert "broken.jpg: not an image" in err
    assert not any(isinstance(value, (dict, list)) for value in found.values())
    assert 0 <= found["zero_shot_top1_low"] <= found["zero_shot_top1"] <= found["zero_shot_top1_high"]
    assert found["zero_shot_top5"] == 100  # there are but three classes
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("results.md", "results.csv", "results.json"),
        *("classes.csv", "confused.csv", "confusion.png", "calibration.csv", "reliability.png"),
    }
    classes = table(out / "classes.csv")
    assert [row["class"] for row in classes] == ["blue circle", "green", "red square"]
    right = sum(int(row["right"]) for row in classes)
    assert found["zero_shot_top1"] == pytest.approx(100 * right / 12)
    wrong = sum(int(row["images"]) for row in table(out / "confused.csv"))
    assert wrong == 12 - right
    with Image.open(out / "confusion.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert json.loads((out / "results.json").read_text()) == [found]


def test_a_model_with_nan_is_refused(make_clip: Make, scenes: Path, tmp_path: Path, refused: Refused):
    clip = make_clip()
    clip.heads.text[1].weight.data[0, 0] = torch.nan
    folder = clip.save_pretrained(tmp_path / "failed")
    said = refused("evaluate", "retrieval", folder, scenes)
    assert "has weights that are not finite (heads.text.1.weight)" in said


def test_zero_shot_of_several(bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed):
    other = shutil.copytree(bundle, tmp_path / "two")
    table = pictures / "mine.csv"
    table.write_text("image,label\nred_square/0.png,red\ngreen/1.png,green\n")
    words = ("evaluate", "zero-shot", f"{bundle},{other}", f"{pictures},{table}")
    found, _ = printed_json(capsys, *words, "--out", tmp_path / "out")
    assert [(row["model"], row["data"]) for row in found] == [
        (str(model), str(data)) for model in (bundle, other) for data in (pictures, table)
    ]
    assert len(list((tmp_path / "out").glob("*/confusion.png"))) == 4
    assert main([*words]) == 0
    assert "worst classes" in capsys.readouterr().out


def test_runs_in_wandb(
    wandb_server: WandbServer, bundle: Path, pictures: Path, scenes: Path, tmp_path: Path, capsys: Printed
):
    options = ("--out", tmp_path / "out", "--wandb", "p")
    found, err = printed_json(capsys, "evaluate", "zero-shot", bundle, pictures, *options)
    assert "W&B run: http" in err
    (run,) = wandb_server.runs.values()
    assert run.job_type == "evaluate" and run.display_name == f"{bundle} on {pictures}"[:120]
    assert run.config["templates"] == "simple" and run.config["model"] == str(bundle)
    assert run.config["images"] == 12
    assert run.summary["zero_shot_top1"] == pytest.approx(found["zero_shot_top1"])
    assert run.summary["zero_shot_classes"]["nrows"] == 3
    assert run.summary["zero_shot_reliability"]["_type"] == "image-file"
    words = ("evaluate", "retrieval", bundle, scenes, *options)
    found, _ = printed_json(capsys, *words)
    assert found["split"] == "test" and found["images"] == 4, "the data's own split is the default"
    other = next(each for each in wandb_server.runs.values() if "rsum" in each.summary)
    assert other.summary["rsum"] == pytest.approx(found["rsum"]) and len(wandb_server.runs) == 2


def test_a_run_without_an_account_stays_here(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed, monkeypatch: Patch
):
    monkeypatch.chdir(tmp_path)
    _, err = printed_json(capsys, "evaluate", "zero-shot", bundle, pictures, "--wandb", "me/p")
    assert "W&B run: offline; `wandb sync runs/wandb/offline-run-" in err
    assert len(list(tmp_path.glob("runs/wandb/offline-run-*/*.wandb"))) == 1
    assert main(["evaluate", "zero-shot", str(bundle), str(pictures), "--wandb", "a/b/c"]) == 2
    out, err = capsys.readouterr()
    assert "expected PROJECT or ENTITY/PROJECT" in err
    assert "top1" in out, "what was computed is not lost"


def test_retrieval_of_two_models(
    bundle: Path, make_clip: Make, scenes: Path, tmp_path: Path, capsys: Printed, monkeypatch: Patch
):
    other = make_clip(embed_dim=8).save_pretrained(tmp_path / "two")
    words = ("evaluate", "retrieval", f"{bundle},{other}", scenes, "--out", tmp_path / "out")
    (first, second), _ = printed_json(capsys, *words, "--split", "all")
    images = read_captions(scenes).images
    clip = CLIP.from_pretrained(bundle)
    expected = retrieval_metrics(
        clip.embed_images([image.path for image in images]),
        clip.embed_texts([caption for image in images for caption in image.captions]),
        torch.arange(len(images)).repeat_interleave(5),
    )
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert first["images"] == 40 and first["captions"] == 200 and "compared_with" not in first
    assert first["rsum_low"] <= first["rsum"] <= first["rsum_high"]
    assert second["compared_with"] == str(bundle)
    assert second["rsum_difference"] == pytest.approx(second["rsum"] - first["rsum"])
    assert 0 < second["rsum_difference_p"] <= 1
    assert "fold1000_rsum" not in first
    rows = table(tmp_path / "out" / "results.csv")
    assert float(rows[1]["rsum"]) == second["rsum"]
    monkeypatch.delenv("COLUMNS", raising=False)
    for narrow in (False, True):
        if narrow:
            monkeypatch.setenv("COLUMNS", "80")
        assert main([*map(str, words), "--split", "all"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any("rsum difference" in line for line in lines)
        assert any(str(bundle) in line for line in lines) != narrow
        assert (max(map(len, lines)) <= 80) == narrow


def test_retrieval_with_short_vectors(bundle: Path, scenes: Path, tmp_path: Path, capsys: Printed):
    cut = CLIP.from_pretrained(bundle).with_dims(4).save_pretrained(tmp_path / "cut")
    words = ("evaluate", "retrieval", f"{bundle},{cut}", scenes, "--split", "all", "--dims", "4")
    (first, second), _ = printed_json(capsys, *words)
    assert first["dims"] == 4 and second["rsum_difference"] == 0 and second["rsum_difference_p"] == 1
    whole, _ = printed_json(capsys, "evaluate", "retrieval", bundle, scenes, "--split", "all")
    assert "dims" not in whole and whole["rsum"] != first["rsum"]


def write_images(folder: Path, names: list[str]) -> None:
    """Pictures that differ in their colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        Image.new("RGB", (32, 32), (8 * n % 256, 255 - 9 * n % 256, 31 * n % 256)).save(folder / name)


NOUNS = {"swap_att": ("red", "blue"), "replace_obj": ("circle", "square")}


@pytest.fixture
def sugarcrepe(tmp_path: Path) -> Path:
    """Files in SugarCrepe's layout, and the images of COCO, of which one is broken and one is missing."""
    root, names = tmp_path / "crepe", [f"{n:012d}.jpg" for n in range(8)]
    write_images(root / "val2017", names[:6])
    (root / "val2017" / names[6]).write_bytes(b"nothing")
    (root / "data").mkdir()
    for file, (right, wrong) in NOUNS.items():
        entries = {
            str(n): {"filename": name, "caption": f"a {right} {n}", "negative_caption": f"a  {wrong}\n{n}"}
            for n, name in enumerate(names)
        }
        (root / "data" / f"{file}.json").write_text(json.dumps(entries))
    (root / "data" / "other.json").write_text(json.dumps([{"filename": "a.jpg", "caption": "no benchmark"}]))
    return root


def test_sugarcrepe(bundle: Path, make_clip: Make, sugarcrepe: Path, tmp_path: Path, capsys: Printed):
    other = make_clip(embed_dim=8).save_pretrained(tmp_path / "two")
    words = ("evaluate", "compositional", f"{bundle},{other}", sugarcrepe, "--out", tmp_path / "out")
    (found, second), err = printed_json(capsys, *words)
    assert second["model"] == str(other)
    assert (found["entries"], found["missing"], found["broken"]) == (12, 1, 1)
    assert "left out 000000000007.jpg: there is no such image" in err
    assert "000000000006.jpg: not an image" in err
    clip = CLIP.from_pretrained(bundle)
    images = clip.embed_images([sugarcrepe / "val2017" / f"{n:012d}.jpg" for n in range(6)])
    texts = [f"a {noun} {n}" for nouns in NOUNS.values() for n in range(6) for noun in nouns]
    pairs = images.repeat(2, 1)[:, None], clip.embed_texts(texts).view(12, 2, -1)
    expected = compositional_metrics(*pairs, ["swap_att"] * 6 + ["replace_obj"] * 6)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "other_accuracy" not in found
    names = {"results.md", "results.csv", "results.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    (sugarcrepe / "val2017").rename(tmp_path / "elsewhere")
    words = ("evaluate", "compositional", bundle, sugarcrepe / "data" / "swap_att.json")
    one, _ = printed_json(capsys, *words, "--images", tmp_path / "elsewhere")
    assert one["swap_att_accuracy"] == one["accuracy"] == one["mean_accuracy"] == found["swap_att_accuracy"]


def test_winoground(bundle: Path, tmp_path: Path, capsys: Printed):
    names = [f"ex_{n}_img_{i}" for n in range(3) for i in (0, 1)]  # without a suffix, as in the original
    write_images(tmp_path / "wino" / "images", [f"{name}.png" for name in names])
    captions = ["a red circle left of a blue square", "a blue circle left of a red square"]
    tags = ["Object", "Relation", "Object"]
    entries = [
        {"id": n, "image_0": names[2 * n], "image_1": names[2 * n + 1], "tag": "Adjective"}
        | {"caption_0": captions[0], "caption_1": captions[1], "collapsed_tag": tag}
        for n, tag in enumerate(tags)
    ]
    lines = "\n".join(map(json.dumps, entries))
    (tmp_path / "wino" / "examples.jsonl").write_text(f"{lines}\n\n")
    found, _ = printed_json(capsys, "evaluate", "compositional", bundle, tmp_path / "wino")
    assert (found["entries"], found["missing"], found["broken"]) == (3, 0, 0)
    clip = CLIP.from_pretrained(bundle)
    images = clip.embed_images([tmp_path / "wino" / "images" / f"{name}.png" for name in names])
    texts = clip.embed_texts(captions).expand(3, 2, -1)
    expected = compositional_metrics(images.view(3, 2, -1), texts, tags)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    (tmp_path / "wino" / "examples.jsonl").unlink()
    (tmp_path / "wino" / "examples.json").write_text(json.dumps(entries))
    again, _ = printed_json(capsys, "evaluate", "compositional", bundle, tmp_path / "wino")
    assert again == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no entry with its images; expected JSON or JSON lines"),
        ('[{"filename": "a", "caption": "b"', "has no entry with its images; expected"),
        ('[{"filename": "a", "caption": "b", "negative_caption": "c"', "bad.json cannot be read"),
        ('{"filename": "a", "caption": "b", "negative_caption": "c"}', "entry 1 of "),
        ('[{"filename": "a", "caption": 1, "negative_caption": "c"}]', "entry 1 of "),
        ('[{"filename": "a", "caption": "\\ud800", "negative_caption": "c"}]', "entry 1 of "),
        ('[{"filename": "a", "caption": "b", "negative_caption": "c"}]', "first a: there is no such image"),
    ],
)
def test_a_broken_benchmark_is_one_line(
    bundle: Path, tmp_path: Path, refused: Refused, content: str | None, message: str
):
    (tmp_path / "bad").mkdir()
    if content:
        (tmp_path / "bad" / "bad.json").write_text(content)
    assert message in refused("evaluate", "compositional", bundle, tmp_path / "bad")


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_retrieval_by_the_protocol_of_papers(bundle: Path, tmp_path: Path, capsys: Printed, name: str):
    """Karpathy's test split, beside other annotations, and five captions of images that have more."""
    root, parts = tmp_path / name, ["train", "restval", "val", "test", "test", "test"]
    folder = "val2014" if name == "coco" else "flickr30k-images"
    files = [f"{n}.jpg" for n in range(6)]
    write_images(root / folder, files)
    entries = [
        {
            "filename": file,
            "split": part,
            "sentences": [{"raw": f"a {part} {n} {c}"} for c in range(5 + n % 3)],
        }
        | ({"filepath": folder} if name == "coco" else {})
        for n, (file, part) in enumerate(zip(files, parts, strict=True))
    ]
    (root / f"dataset_{name}.json").write_text(json.dumps({"images": entries, "dataset": name}))
    (root / "results.csv").write_text("image_name| comment_number| comment\n0.jpg| 0| one\n")
    found, _ = printed_json(capsys, "evaluate", "retrieval", bundle, f"{name}:{root}")
    assert [found[k] for k in ("data", "split", "images", "captions")] == [f"{name}:{root}", "test", 3, 15]
    clip = CLIP.from_pretrained(bundle)
    expected = retrieval_metrics(
        clip.embed_images([root / folder / file for file in files[3:]]),
        clip.embed_texts([f"a test {n} {c}" for n in (3, 4, 5) for c in range(5)]),
        torch.arange(3).repeat_interleave(5),
    )
    assert {metric: found[metric] for metric in expected} == pytest.approx(expected)
    every, _ = printed_json(capsys, "evaluate", "retrieval", bundle, root / f"dataset_{name}.json")
    assert every["captions"] == 5 + 6 + 7
    (root / folder / files[5]).unlink()
    fewer, err = printed_json(capsys, "evaluate", "retrieval", bundle, f"{name}:{root}")
    assert fewer["images"] == 2 and "5.jpg: there is no such image" in err


def test_linear_probe(bundle: Path, pictures: Path, capsys: Printed):
    found, _ = printed_json(capsys, "evaluate", "linear-probe", bundle, pictures, "--shots", "1,2,16")
    assert found["train_images"] == 6 and found["test_images"] == 6
    assert 0 <= found["linear_probe_top1"] <= 100
    assert [name for name in found if "few_shot" in name] == ["few_shot_1", "few_shot_1_sd", "few_shot_2"]


@pytest.mark.parametrize("bias", [None, -3.0])
def test_classify(make_clip: Make, pictures: Path, tmp_path: Path, capsys: Printed, bias: float | None):
    clip = make_clip(init_bias=bias)
    bundle = clip.save_pretrained(tmp_path / "model")
    paths = [str(pictures / "green" / "0.png"), str(pictures / "red_square" / "1.png")]
    broken = str(pictures / "green" / "broken.jpg")
    words = ("classify", bundle, *paths, broken, "--labels", "red square, green ,blue")
    found, err = printed_json(capsys, *words)
    assert list(found["broken"]) == [broken] and broken in err
    texts = clip.embed_texts([f"a photo of a {name}." for name in ("red square", "green", "blue")])
    logits = clip.scale.item() * clip.embed_images(paths) @ texts.T
    expected = logits.softmax(1) if bias is None else (logits + bias).sigmoid()
    assert found["reading"] == ("softmax" if bias is None else "sigmoid")
    for result, path, row in zip(found["results"], paths, expected, strict=True):
        shares = dict(zip(("red square", "green", "blue"), row.tolist(), strict=True))
        assert result["image"] == path
        assert result["probabilities"] == pytest.approx(shares, abs=1e-5)
        assert result["label"] == next(iter(result["probabilities"])) == max(shares, key=shares.get)
    labels = tmp_path / "labels.txt"
    labels.write_text("red square\ngreen\nclip-\x1b[2Jlightning\n")
    assert main(["classify", str(bundle), "--labels", str(labels), "--templates", "none", paths[0]]) == 0
    out = capsys.readouterr().out
    assert "%  green" in out and ("add up to 100 %" in out) == (bias is None)
    assert "\x1b" not in out
    words = ("classify", bundle, paths[0], "--labels", "a red square,the green")
    found = printed_json(capsys, *words)[0]["results"][0]["probabilities"]
    assert found.keys() == {"a red square", "the green"}
    if bias is None:  # the captions are not 'a photo of a a red square.'
        assert found["a red square"] == pytest.approx(logits[0, :2].softmax(0)[0].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("zero-shot M D --split test", "has no such split; expected all"),
        ("zero-shot M nothing", "the folder or file nothing does not exist"),
        ("zero-shot M torchvision:CIFAR10", "or hf:OWNER/NAME, such as hf:uoft-cs/cifar10"),
        ("zero-shot M hf:some/where", "hf:some/where cannot be loaded"),
        ("zero-shot M D --out FILE", "is a file"),
        ("retrieval M coco:D", "dataset_coco.json does not exist"),
        ("compositional M nothing", "nothing has no entry with its images"),
        ("retrieval , D", "has no model"),
        ("linear-probe M D --test_share 1", "--test_share: expected a fraction above 0 and below 1, got 1"),
        ("classify M P --labels ,", "has no label"),
        ("classify M nothing.jpg --labels a", "nothing.jpg does not exist; give image files"),
        ("classify M P", "labels"),
        ("classify M --labels a", "images"),
        ("zero-shot M", "data"),
    ],
)
def test_mistakes_are_one_line(
    bundle: Path, pictures: Path, tmp_path: Path, refused: Refused, args: str, message: str
):
    (tmp_path / "file").touch()
    places = {"M": bundle, "D": pictures, "P": pictures / "green" / "0.png", "FILE": tmp_path / "file"}
    given = [str(places.get(arg, arg)) for arg in args.split()]
    assert message in refused(*given if given[0] == "classify" else ["evaluate", *given])


@pytest.mark.parametrize(
    "command",
    ["classify", "export", "index", "app"]
    + [f"evaluate {kind}" for kind in ("retrieval", "compositional", "zero-shot", "linear-probe")],
)
def test_help_describes_the_model_in_the_same_way(command: str, capsys: Printed):
    assert main([*command.split(), "--help"]) == 0
    assert MODEL in " ".join(capsys.readouterr().out.split())


def test_markdown_has_a_table_for_each_data_set():
    rows = [
        {"model": "a|b", "data": "x", "images": 1000, "top1": 50.0, "top1_low": 40.0, "top1_high": 60.0},
        {"model": "c", "data": "y", "gain": -1.25, "gain_p": 0.04},
    ]
    assert markdown(rows) == (
        "## x\n\n|  | a\\|b |\n| :-- | --: |\n| images | 1,000 |\n| top1 | 50.0 (40.0 to 60.0) |\n"
        "\n## y\n\n|  | c |\n| :-- | --: |\n| gain | -1.2, p = 0.040 |\n"
    )
