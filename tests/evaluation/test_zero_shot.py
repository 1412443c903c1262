"""Zero-shot classification against loops and values computed by hand; templates; names of classes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clip_lightning import CLIP, zero_shot_classifier
from clip_lightning.data.classes import class_names, clean_name, find_classes
from clip_lightning.errors import UserError
from clip_lightning.evaluation.prompts import TEMPLATES, read_templates
from clip_lightning.evaluation.zero_shot import calibration, classify
from clip_lightning.model.clip import probabilities
from clip_lightning.reports.plots import plot_calibration
from clip_lightning.reports.tables import ClassReport

Printed = pytest.CaptureFixture[str]


def test_a_class_is_the_normalised_mean_of_its_captions(make_clip: Callable[..., CLIP]):
    clip = make_clip().eval()
    templates = ("a {}", "the {} here")
    found = zero_shot_classifier(clip, ["circle", ["square", "blue square"]], templates)
    squares = ["a square", "the square here", "a blue square", "the blue square here"]
    for row, captions in enumerate((["a circle", "the circle here"], squares)):
        mean = torch.stack([clip.embed_texts([caption])[0] for caption in captions]).mean(0)
        torch.testing.assert_close(found[row], mean / mean.norm(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    alone = zero_shot_classifier(clip, "circle", templates[0])
    torch.testing.assert_close(alone, clip.embed_texts("a circle"))


@pytest.mark.parametrize(("names", "templates"), [([], ["{}"]), (["a", []], ["{}"]), (["a"], [])])
def test_nothing_to_make_a_classifier_of(make_clip: Callable[..., CLIP], names, templates):
    with pytest.raises(ValueError, match="expected one or more classes"):
        zero_shot_classifier(make_clip(), names, templates)


def test_scores_by_hand():
    # cosines with three classes; the last image's class ties with another, which counts against the model
    image = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    result = classify(image, torch.eye(3), torch.tensor([0, 2, 0, 2]), scale=1.0)
    assert result.metrics["zero_shot_top1"] == 50.0  # the first and the last
    assert result.metrics["zero_shot_top5"] == 100.0
    assert result.confusion.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]
    report = ClassReport("", "abc", result)
    assert report.classes() == [("a", 2, 1, 50.0), ("b", 0, 0, None), ("c", 2, 1, 50.0)]
    assert report.confused() == [("a", "b", 1), ("c", "b", 1)]
    assert result.metrics["mean_per_class_accuracy"] == 50.0
    tied = classify(torch.tensor([[0.0, 0.0, 1.0]]), torch.eye(3)[[0, 2, 2]], torch.tensor([2]), scale=1.0)
    assert tied.metrics["zero_shot_top1"] == 0.0
    assert ClassReport("", "abc", tied).confused() == [("c", "b", 1)]


def test_an_embedding_that_is_not_finite_is_not_scored():
    axes, labels = torch.eye(3), torch.tensor([0, 1])
    broken = axes / torch.tensor([[0.0], [1.0], [1.0]])
    with pytest.raises(ValueError, match="1 of 2 image embeddings contain NaN"):
        classify(broken[:2], axes, labels, scale=1.0)
    with pytest.raises(ValueError, match="1 of 3 class embeddings contain NaN"):
        classify(axes[:2], broken, labels, scale=1.0)


def test_scores_equal_a_loop():
    generator = torch.Generator().manual_seed(3)
    image = F.normalize(torch.randn(200, 8, generator=generator), dim=1)
    classifier = F.normalize(torch.randn(11, 8, generator=generator), dim=1)
    labels = torch.randint(11, (200,), generator=generator)
    result = classify(image, classifier, labels, scale=20.0)
    right = {1: 0, 5: 0}
    for row, label in zip(image, labels.tolist(), strict=True):
        order = sorted(range(11), key=lambda c: -float(row @ classifier[c]))
        for k in right:
            right[k] += label in order[:k]
    for k, count in right.items():
        assert result.metrics[f"zero_shot_top{k}"] == pytest.approx(count / 2)
        assert result.metrics[f"zero_shot_top{k}_low"] < count / 2 < result.metrics[f"zero_shot_top{k}_high"]
    assert int(result.confusion.sum()) == 200
    assert int(result.confusion.diag().sum()) == right[1]


def test_probabilities_are_read_as_the_model_was_trained():
    similarity = torch.tensor([[0.2, -0.1]])
    softmax = probabilities(similarity, 10.0, None)
    assert softmax[0, 0].item() == pytest.approx(1 / (1 + 2.718281828**-3))
    assert softmax.sum().item() == pytest.approx(1)
    sigmoid = probabilities(similarity, 10.0, -1.0)
    assert sigmoid[0].tolist() == pytest.approx([1 / (1 + 2.718281828**-1), 1 / (1 + 2.718281828**2)])


def test_calibration_by_hand():
    # two bins of the ten: (0.95, 0.95 → one right of two) and (0.25 → wrong)
    found = calibration(torch.tensor([0.95, 0.95, 0.25]), torch.tensor([True, False, False]), bins=10)
    assert found.error == pytest.approx(100 * (2 * 0.45 + 0.25) / 3)
    assert found.images.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 2]
    assert found.confidence[[2, 9]].tolist() == pytest.approx([0.25, 0.95])
    assert found.accuracy[[2, 9]].tolist() == [0.0, 0.5]
    assert plot_calibration(found, "costs $5").startswith(b"\x89PNG")
    assert calibration(torch.tensor([0.0, 1.0]), torch.tensor([False, True])).error == 0.0


def test_templates_by_name_and_of_a_file(tmp_path: Path):
    assert read_templates("simple") == ("a photo of a {}.",) and read_templates("none") == ("{}",)
    many = read_templates("imagenet")
    assert 40 <= len(many) <= 80 and len(set(many)) == len(many)
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)
    file = tmp_path / "mine.txt"
    file.write_text("\ufeffa {}\n\n  the {} \na {}\n'pasted {}.',\n", encoding="utf-8")
    assert read_templates(str(file)) == ("a {}", "the {}", "pasted {}.")
    for text in ("a cat\n", "\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"has no \{\}"):
            read_templates(str(file))
    file.write_bytes(b"\xff {}")
    with pytest.raises(UserError, match="UTF-8 file"):
        read_templates(str(file))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("laptop_computer", "laptop computer"),
        ("n02123045_tabby", "tabby"),
        ("n02085620-Chihuahua", "Chihuahua"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("AnnualCrop", "annual crop"),
        ("wire-haired_fox_terrier", "wire-haired fox terrier"),
        ("n02123045", "n02123045"),
        ("7", "7"),
        ("_", "_"),
        ("BMW", "BMW"),
        ("苹果_1", "苹果 1"),
    ],
)
def test_names_of_folders(folder: str, name: str):
    assert clean_name(folder) == name


def touch(root: Path, names: str) -> None:
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folders_of_classes(tmp_path: Path):
    touch(tmp_path, "b/2.JPG b/deep/1.png a/x.jpg BACKGROUND_Google/z.jpg a/notes.txt .hidden/y.jpg")
    found = find_classes(tmp_path)
    assert found.classes == ("a", "b") and found.labels == (0, 1, 1)
    assert [path.name for path in found.images] == ["x.jpg", "2.JPG", "1.png"]
    background = {"BACKGROUND_Google": "it is not a class"}
    assert found.left_out == background | {"1 .hidden folders": "they are skipped"}
    assert found.rows("all") == [0, 1, 2] and found.rows("test") == []


def test_folders_of_splits(tmp_path: Path):
    touch(tmp_path, "train/a/1.jpg train/b/1.jpg validation/a/1.jpg validation/b/1.jpg")
    found = find_classes(tmp_path)
    assert found.classes == ("a", "b") and found.splits == ("train", "train", "val", "val")
    touch(tmp_path, "annotations/list.txt")  # else the splits would be taken for classes
    assert find_classes(tmp_path) == found
    assert found.rows("val") == [2, 3]


def test_a_table(tmp_path: Path):
    touch(tmp_path, "pictures/0.jpg pictures/1.jpg pictures/2.jpg")
    table = tmp_path / "mine.csv"
    table.write_text(
        "filename,Class,split\npictures/0.jpg,10,dev\npictures/1.jpg,9,\n"
        'pictures/2.jpg,,\nno.jpg,9,\n"pictures/2.jpg","9",test\n'
    )
    found = find_classes(table)
    assert found.classes == ("9", "10") and found.labels == (1, 0, 0)  # numbers in their order
    assert found.splits == ("val", None, "test")
    nothing = {"pictures/2.jpg": "row 3 has no label"}
    assert found.left_out == nothing | {"no.jpg": "there is no such image"}
    table.write_text("\ufeffImage;Label\npictures/0.jpg;x\npictures/1.jpg;y\n", encoding="utf-8")
    assert find_classes(table).classes == ("x", "y")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,caption\na.jpg,b\n", "begins with .image,caption.; expected the columns image and label"),
        ("", "begins with ..; expected"),
        ("image,label,split\na.jpg,b,later\n", "split 'later'"),
        ("image,label\na.jpg,b\n", "has 0 classes"),
        ("image,label\nthere.jpg,b\n", "has 1 classes"),
        (None, "does not exist"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str | None, said: str):
    touch(tmp_path, "there.jpg")
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        find_classes(tmp_path / "t.csv")


def test_names_by_line_follow_the_natural_order_and_are_printed(tmp_path: Path, capsys: Printed):
    touch(tmp_path, " ".join(f"data/class_{number}/1.jpg" for number in range(12)))
    (tmp_path / "names.txt").write_text("\n".join(f"name {number}" for number in range(12)))
    found = find_classes(tmp_path / "data")
    assert class_names(found.classes, tmp_path / "names.txt")[10] == ["name 10"]
    assert found.classes[10] == "class_10"
    assert "class_1 = name 1, class_2 = name 2, " in capsys.readouterr().err


def test_names_as_imagenet_writes_them(tmp_path: Path, capsys: Printed):
    classes = ["n01440764", "n02123045"]
    assert class_names(classes) == [[name] for name in classes]
    assert "the class names are numbers (n01440764, n02123045, ...)" in capsys.readouterr().err
    index = {"0": ["n01440764", "tench"], "1": ["n02123045", "tabby"], "2": ["n3", "other"]}
    (tmp_path / "imagenet_class_index.json").write_text(json.dumps(index))
    (tmp_path / "map.txt").write_text("n01440764 tench, Tinca tinca\nn02123045 tabby\nn3 other\n")
    assert class_names(classes, tmp_path / "imagenet_class_index.json") == [["tench"], ["tabby"]]
    assert class_names(classes, tmp_path / "map.txt") == [["tench", "Tinca tinca"], ["tabby"]]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("n.json", '{"cat_x": ["cat", "kitty"]}', [["cat", "kitty"], ["dog y"]]),
        ("n.json", '["cat", ["dog", "hound"]]', [["cat"], ["dog", "hound"]]),
        ("n.txt", "cat, kitty\ndog\n", [["cat", "kitty"], ["dog"]]),
        ("n.json", "{", "expected a JSON object"),
        ("n.json", "3", "expected a JSON object"),
        ("n.json", '{"cat_x": []}', r"got .*\[\]"),
        ("n.json", '{"other": "x"}', r"1 entries \(first: other\) that do not match the 2 classes"),
        ("n.csv", "cat_x,cat\ndog_y,dog\n", "is a table; give a JSON file"),
        ("n.txt", "cat\n", "1 entries .* do not match the 2 classes"),
        ("n.txt", None, "does not exist; give a JSON file"),
    ],
)
def test_names_of_a_file(
    tmp_path: Path, name: str, text: str | None, expected: list[list[str]] | str, capsys: Printed
):
    if text is not None:
        (tmp_path / name).write_text(text)
    if isinstance(expected, list):
        assert class_names(["cat_x", "dog_y"], tmp_path / name) == expected
        kept = "has no names for 1 of 2 classes (dog_y), which keep the names of their folders"
        assert (kept in capsys.readouterr().err) == ("dog y" in str(expected))
    else:
        with pytest.raises(UserError, match=expected):
            class_names(["cat_x", "dog_y"], tmp_path / name)
