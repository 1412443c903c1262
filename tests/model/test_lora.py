"""Adapters in towers: what they change, what checkpoints and bundles hold of them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from small_runs import changed, data, trainer, weights
from torch import Tensor, nn

from clip_lightning.__main__ import main
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.training.module import CLIPModule
from clip_lightning.training.optim import OptimizerConfig

# Lightning's advice about towers that are frozen, and so meant to be in eval mode.
pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode:UserWarning")
MakeClip = Callable[..., CLIP]
MakeModule = Callable[..., CLIPModule]
FAST = OptimizerConfig(lr=1e-2, image_lr=1e-2, text_lr=1e-2, warmup=0.0)
BOTH = LoRAConfig("both", rank=2)
TEXTS = ["a small red circle", "two stars"]
# a transformer; batch norm; depthwise convolutions; padding by the input; standardised weights
IMAGE_TOWERS = ["test_vit", "test_resnet", "test_efficientnet", "tf_efficientnet_lite0", "test_nfnet"]
CONVOLUTIONS = "random:test_efficientnet"


def fit(module: CLIPModule, scenes: Path, folder: Path, cache: str = "off", **options: Any) -> Trainer:
    """Train one epoch of four steps, unless the options say otherwise."""
    run = trainer(folder, limit_val_batches=0, **options)
    run.fit(module, data(module, scenes, cache=cache, captions_per_image=2))
    return run


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


class TakesTheWeight(nn.Module):
    """A layer that multiplies by the weight of another without calling it, as BEiT's attention does."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def waken(clip: CLIP) -> None:
    """Let residual branches count that begin at zero."""
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim < 2 and not parameter.any():
                parameter.fill_(0.5)


def embeddings(clip: CLIP) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return clip.eval().encode_image(pixels), clip.encode_text(**clip.tokenize(TEXTS))


@pytest.mark.parametrize("image", IMAGE_TOWERS)
def test_adapters_start_at_nothing_and_are_merged(make_clip: MakeClip, tmp_path: Path, image: str) -> None:
    plain, clip = make_clip(f"random:{image}"), make_clip(f"random:{image}")
    waken(plain)
    waken(clip)
    clip.add_lora(BOTH)
    torch.testing.assert_close(embeddings(clip), embeddings(plain), rtol=0, atol=0)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if is_adapter(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    clip.train()
    pixels = torch.rand(3, 3, 32, 32)
    (clip.encode_image(pixels).sum() + clip.encode_text(**clip.tokenize(TEXTS)).sum()).backward()
    adapters = {name: p for name, p in clip.named_parameters() if is_adapter(name)}
    assert {name.split(".")[0] for name in adapters} == {"image_tower", "text_tower"}
    assert [name for name, p in adapters.items() if p.grad is None] == []  # or data-parallel training stops
    before = weights(clip)
    again = CLIP.from_pretrained(clip.save_pretrained(tmp_path / "model"))
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert not changed(clip, before)
    trained = embeddings(clip)
    torch.testing.assert_close(embeddings(again), trained, rtol=0, atol=1e-5)
    for tuned, untuned in zip(trained, embeddings(plain), strict=True):
        assert (tuned - untuned).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("towers", "freeze", "fixed", "mixed"),
    [
        ("text", "both", {"image_tower"}, False),
        ("text", "none", set(), False),
        ("both", "none", set(), False),
        ("both", "none", set(), True),
        ("image", "text", {"text_tower"}, False),
    ],
)
def test_only_adapters_of_an_adapted_tower_change(
    make_module: MakeModule, scenes: Path, tmp_path: Path, towers: Any, freeze: str, fixed: set, mixed: bool
) -> None:
    """Whatever `freeze` says of it; batch-norm statistics stay too."""
    options = {"freeze": freeze, "image_tower": CONVOLUTIONS, "optimizer": FAST}
    module = make_module(lora=LoRAConfig(towers, rank=2), **options)
    before = weights(module.clip)
    run = fit(module, scenes, tmp_path, precision="bf16-mixed" if mixed else "32-true")
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())
    names = changed(module.clip, before)
    for tower in ("image_tower", "text_tower"):
        own = {name for name in names if name.startswith(tower)}
        if towers in (tower.removesuffix("_tower"), "both"):
            assert own == {name for name in before if name.startswith(tower) and is_adapter(name)}
        else:
            assert bool(own) == (tower not in fixed)
            assert not any(map(is_adapter, own))
    groups = {group["name"] for group in run.optimizers[0].param_groups}
    parts = {name.removesuffix("_no_decay") for name in groups}
    assert parts == {"heads", "image_tower", "text_tower"} - fixed


def test_an_adapted_tower_trains_with_dropout_and_fixed_batch_norm(make_clip: MakeClip) -> None:
    clip = make_clip(CONVOLUTIONS).train()
    clip.freeze("both")
    clip.add_lora(LoRAConfig("both", dropout=0.5))
    for tower in (clip.image_tower, clip.text_tower):
        assert tower.training and not tower.frozen
        modules = list(tower.modules())
        assert {m.training for m in modules if isinstance(m, nn.Dropout)} == {True}
        assert not any(m.training for m in modules if isinstance(m, nn.BatchNorm2d))
    assert any(isinstance(m, nn.BatchNorm2d) for m in clip.image_tower.modules())
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.5 for m in clip.text_tower.modules()) == 12
    clip.eval()
    assert not any(module.training for module in clip.modules())


def test_the_chosen_layers(make_clip: MakeClip) -> None:
    clip = make_clip()
    clip.add_lora(LoRAConfig(layers=["query", "attention.self.value"], rank=3))
    shapes = {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items() if is_adapter(name)}
    assert len(shapes) == 2 * 2 * 2
    assert {name.split(".")[-4] for name in shapes} == {"query", "value"}
    assert set(shapes.values()) == {(3, 32), (32, 3)}


def test_micro_batches_take_the_same_step(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    steps = []
    for size in (None, 3):
        module = make_module(lora=BOTH, image_tower=CONVOLUTIONS, micro_batch_size=size)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        module.__dict__["configure_optimizers"] = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.1)
        fit(module, scenes, tmp_path, max_steps=1)
        steps.append(weights(module))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-6)


def test_only_a_frozen_tower_is_cached(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    fit(make_module(lora=LoRAConfig()), scenes, tmp_path, cache=str(tmp_path / "cache"), max_steps=1)
    entries = map(Path.read_text, (tmp_path / "cache").glob("*/manifest.json"))
    assert {json.loads(entry)["key"]["kind"] for entry in entries} == {"image"}


def test_a_checkpoint_holds_the_adapters(make_module: MakeModule, scenes: Path, tmp_path: Path) -> None:
    module = make_module(lora=BOTH, image_tower=CONVOLUTIONS, optimizer=FAST)
    path = tmp_path / "one.ckpt"
    fit(module, scenes, tmp_path, max_steps=1).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "tower" in name]
    assert checkpoint["adapters"].keys() == {name for name in module.state_dict() if is_adapter(name)}
    plain, names = make_module(image_tower=CONVOLUTIONS).clip, ("image_tower", "text_tower")
    digests = {f"clip.{name}": getattr(plain, name).digest() for name in names}
    assert checkpoint["frozen_towers"] == digests

    for lora in (None, LoRAConfig("both", rank=2, alpha=4.0), LoRAConfig("text", rank=2)):
        other = make_module(lora=lora, image_tower=CONVOLUTIONS)
        with pytest.raises(UserError, match=r"trained with LoRA .*'both'.*, got "):
            other.on_load_checkpoint(torch.load(path, weights_only=True))
    other = make_module(lora=BOTH, image_tower=CONVOLUTIONS)
    with torch.no_grad():
        next(p for n, p in other.clip.text_tower.named_parameters() if ".base_layer." in n).add_(1)
    with pytest.raises(UserError, match=r"another frozen text_tower than 'random:"):
        other.on_load_checkpoint(torch.load(path, weights_only=True))


def test_a_layer_that_is_never_called_gets_none(make_clip: MakeClip) -> None:
    clip = make_clip()
    first = clip.text_tower.backbone.encoder.layer[0].intermediate
    first.dense = TakesTheWeight(first.dense)
    clip.add_lora(LoRAConfig())
    adapted = {name.rpartition(".lora_")[0] for name in clip.state_dict() if is_adapter(name)}
    assert len(adapted) == 2 * 6 - 1
    assert not [name for name in adapted if "inner" in name]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": 0.0}, r"alpha 0\.0 .*expected .* an alpha above 0"),
        ({"dropout": 1.0}, r"dropout 1\.0: expected .* a dropout of at least 0 and below 1"),
        ({"layers": ["query", "valu"]}, r"'valu'\] does not fit .* end in dense, key, query, value"),
        ({"towers": "both", "layers": ["query"]}, r"does not fit lora\.towers both.* fc1, .*qkv"),
    ],
)
def test_impossible_adapters(make_clip: MakeClip, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_clip().add_lora(LoRAConfig(**options))


def test_without_a_layer_to_adapt_and_without_peft(
    make_clip: MakeClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip()
    for module in clip.text_tower.modules():
        if type(module) is nn.Linear:
            module.__class__ = type("Special", (nn.Linear,), {})
    with pytest.raises(UserError, match=r"end in \(there are none\)"):
        clip.add_lora(LoRAConfig())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs the package peft; pip install peft"):
        make_clip().add_lora(LoRAConfig())


def test_fit_validate_and_a_bundle_that_needs_no_peft(
    command: Callable[..., list[str]], tmp_path: Path, ran: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model__optimizer__text_lr": 1e-2, "model__lora__rank": 2, "data__cache": "off"}
    _, *words = command("fit", tmp_path, **options)
    assert main(["fit", *words]) == 0
    (folder,) = tmp_path.iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"rsum {metrics['rsum']:.1f}" in ran("validate", *words, "--ckpt_path", "best").out
    said = refused("validate", *words, "--ckpt_path", "best", "--model.lora", "null")
    assert "'towers': 'text', 'rank': 2" in said

    monkeypatch.setitem(sys.modules, "peft", None)
    bundle = CLIP.from_pretrained(folder / "model")
    assert not [name for name in bundle.state_dict() if "lora" in name or "base_layer" in name]
    kept = [word for word in words if not word.startswith("--model")]
    said = ran("validate", *kept, "--model.init_from", folder / "model").out
    assert f"rsum {metrics['rsum']:.1f}" in said
