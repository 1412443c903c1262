"""Exports both towers to ONNX, from pixels or tokens to unit-length embeddings, checked against PyTorch.

B images, N texts, H, W pixels, L tokens, D the width of the embeddings.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from clip_lightning.errors import UserError, as_user_error
from clip_lightning.model.clip import CLIP

TOLERANCE = 1e-4
IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE = "image.onnx", "text.onnx", "tokenizer.json"
WORDS = "a dog, two cats & the 7 birds of Zürich run over grass 🐶 unbelievably fast".split()
EXAMPLES = [["a dog"], ["two"], [" ".join(WORDS[: 1 + i]) for i in range(9)], [" ".join(WORDS * 50), "a"]]


class _Embedder(nn.Module):
    """A function of the model as a module, which torch exports."""

    def __init__(self, clip: CLIP, encode: Callable[..., Tensor]) -> None:
        super().__init__()
        self.clip = clip
        self.encode = encode

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.encode(*inputs)


def write_onnx(clip: CLIP, folder: Path) -> dict[str, float]:
    """Write `image.onnx`, `text.onnx`, `tokenizer.json` and `config.json` into the folder.

    `image.onnx` accepts `pixel_values` (B, 3, H, W) uint8 from the transform in config.json, and `text.onnx`
    accepts `input_ids` and `attention_mask` (N, L) int64 from the tokenizer. Both return unit-length
    `embeddings` (B or N, D) fp32. B, N and L are dynamic. Return the largest absolute difference from
    PyTorch's embeddings for each file. The model is in eval mode on the CPU.
    """
    chance = torch.Generator().manual_seed(0)
    size = (3, *clip.transform.size)
    noise = torch.randint(256, (5, *size), dtype=torch.uint8, generator=chance)
    flat = torch.tensor([0, 255, 128], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, *size).contiguous()
    batches = [(noise[:1],), (noise[1:3],), (noise,), (flat,)]
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    image = _export(clip, clip.encode_image, batches, shapes, folder / IMAGE_FILE)
    differences = {IMAGE_FILE: image, TEXT_FILE: write_text_tower(clip, folder)}
    config = {**clip.config(), **clip.metadata, **_logits(clip), "max_difference_to_pytorch": differences}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return differences


def write_text_tower(clip: CLIP, folder: Path) -> float:
    """Write `text.onnx` and `tokenizer.json`; return the largest difference from PyTorch's embeddings."""
    clip = (clip if clip.device.type == "cpu" else copy.deepcopy(clip).cpu()).eval()
    tokenizer = clip.tokenize.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    unsupported = UserError(f"{type(tokenizer).__name__} cannot be exported with the same tokens")
    if clip.tokenize.settings or backend is None:  # a slow tokenizer has no backend
        raise unsupported
    own = Tokenizer.from_str(backend.to_str())
    own.enable_truncation(clip.tokenize.max_length, direction=tokenizer.truncation_side)
    own.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    examples = [clip.tokenize(texts) for texts in EXAMPLES]
    for texts, tokens in zip(EXAMPLES, examples, strict=True):
        rows = own.encode_batch(texts)
        ids, masks = [row.ids for row in rows], [row.attention_mask for row in rows]
        if {"input_ids": ids, "attention_mask": masks} != {name: t.tolist() for name, t in tokens.items()}:
            raise unsupported
    own.save(str(folder / TOKENIZER_FILE))

    def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # not in the groups of `TextTower.forward`, which would fix the number of texts
        return clip.project_text(clip.text_tower.pool(input_ids, attention_mask))

    batches = [tuple(tokens.values()) for tokens in examples]
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": both, "attention_mask": both}
    return _export(clip, encode, batches, shapes, folder / TEXT_FILE)


def _export(
    clip: CLIP,
    encode: Callable[..., Tensor],
    batches: Sequence[tuple[Tensor, ...]],
    shapes: dict[str, Any],
    path: Path,
) -> float:
    """Write a tower, and return its largest difference from `encode` on batches of different shapes."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # required by torch's exporter
    except ModuleNotFoundError as error:
        raise UserError(f"ONNX needs {error.name}; pip install onnx onnxscript onnxruntime") from error
    with as_user_error(f"this tower cannot be exported to {path.name}", "try another tower"):
        # the exporter prints its progress to stdout, which is for the command's result
        with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
            program: Any = torch.onnx.export(
                _Embedder(clip, encode).eval(),
                batches[-2],
                input_names=list(shapes),
                output_names=["embeddings"],
                dynamic_shapes=(tuple(shapes.values()),),
                dynamo=True,
                verbose=False,
            )
            logits = {name: str(value) for name, value in _logits(clip).items()}
            program.model.metadata_props.update(logits)
            program.save(path)  # more than 2 GB of weights are stored in a second file
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        differences = []
        for batch in batches:
            inputs = {name: tensor.numpy() for name, tensor in zip(shapes, batch, strict=True)}
            (embeddings,) = session.run(["embeddings"], inputs)
            with torch.inference_mode():
                differences.append((torch.from_numpy(embeddings) - encode(*batch)).abs().max())
    worst = torch.stack(differences).max().item()  # NaN if any is NaN
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path.name} differs from PyTorch by {worst:.1e}, more than {TOLERANCE}; try another tower"
        )
    return worst


def _logits(clip: CLIP) -> dict[str, float]:
    """Return the scale of the similarities, and the bias if the model has one."""
    return {"scale": clip.scale.item()} | ({} if clip.bias is None else {"bias": clip.bias})
