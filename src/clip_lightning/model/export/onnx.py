"""Both towers as ONNX: pixels or tokens in, unit-length embeddings out, checked against PyTorch.

B pictures, N texts, H, W pixels, L tokens, D the width of the embeddings.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.model.towers.base import first_line

TOLERANCE = 1e-4
IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE = "image.onnx", "text.onnx", "tokenizer.json"
# A protobuf holds no more than 2 GB; the weights of larger towers go into a file beside it.
MOST_BYTES_INSIDE = 1_900_000_000
WORDS = "a dog, two cats & the 7 birds of Zürich run over grass 🐶 unbelievably fast".split()
EXAMPLES = [["a dog"], ["two"], [" ".join(WORDS[: 1 + i]) for i in range(9)], [" ".join(WORDS * 50), "a"]]


class _ImageEmbedder(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.clip.encode_image(pixel_values)


class _TextEmbedder(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # all texts at once: the tower's own groups by length would fix the number of texts
        return self.clip.project_text(self.clip.text_tower.pool(input_ids, attention_mask))


def write_onnx(clip: CLIP, folder: Path) -> dict[str, float]:
    """Write `image.onnx`, `text.onnx`, `tokenizer.json` and `config.json` into the folder.

    `image.onnx` takes `pixel_values` (B, 3, H, W) uint8, as the transform in config.json makes them, and
    `text.onnx` takes `input_ids` and `attention_mask` (N, L) int64, as the tokenizer gives them; both give
    `embeddings` (rows, D) fp32 of unit length. Rows and L are free.

    Returns:
        For each file the largest absolute difference to PyTorch's embeddings.

    Raises:
        UserError: packages are missing, or a tower cannot be exported, or not exactly.
    """
    clip = _on_cpu(clip)
    differences = {IMAGE_FILE: _write_image(clip, folder / IMAGE_FILE)}
    differences |= {TEXT_FILE: write_text_tower(clip, folder)}
    config = {**clip.config(), **clip.metadata, **_logits(clip), "max_difference_to_pytorch": differences}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return differences


def write_text_tower(clip: CLIP, folder: Path) -> float:
    """Write `text.onnx` and `tokenizer.json`, which cuts and pads by itself, into the folder.

    Returns:
        The largest absolute difference to PyTorch's embeddings.

    Raises:
        UserError: packages are missing, or the tower cannot be exported, or not exactly.
    """
    clip = _on_cpu(clip)
    _write_tokenizer(clip, folder / TOKENIZER_FILE)  # first: a refusal here is quick
    batches = [_tokens(clip, texts) for texts in EXAMPLES]
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": both, "attention_mask": both}
    path = folder / TEXT_FILE
    _export(_TextEmbedder(clip), batches[2], shapes, path, _logits(clip))
    return _check(path, clip.encode_text, batches, list(shapes))


def _write_image(clip: CLIP, path: Path) -> float:
    chance = torch.Generator().manual_seed(0)
    size = (3, *clip.transform.size)
    noise = torch.randint(256, (5, *size), dtype=torch.uint8, generator=chance)
    flat = torch.tensor([0, 255, 128], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, *size).contiguous()
    batches = [(noise[:1],), (noise[1:3],), (noise,), (flat,)]
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    _export(_ImageEmbedder(clip), batches[1], shapes, path, _logits(clip))
    return _check(path, clip.encode_image, batches, ["pixel_values"])


def _export(
    embedder: nn.Module,
    example: tuple[Tensor, ...],
    shapes: dict[str, Any],
    path: Path,
    metadata: dict[str, float],
) -> None:
    try:
        import onnxruntime  # noqa: F401  # the check needs it; say so before the work
        import onnxscript  # noqa: F401  # torch's exporter is written in it
    except ModuleNotFoundError as error:
        raise UserError(
            f"ONNX needs the package {error.name}: pip install onnx onnxscript onnxruntime"
        ) from error
    size = sum(tensor.numel() * tensor.element_size() for tensor in embedder.state_dict().values())
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                embedder.eval(),
                example,
                input_names=list(shapes),
                output_names=["embeddings"],
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
            program.model.metadata_props.update({name: str(value) for name, value in metadata.items()})
            program.save(path, external_data=size > MOST_BYTES_INSIDE)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        cause = error.__cause__ or error  # what torch itself raises is advice to developers, in colours
        reason = f"{type(cause).__name__}: {first_line(Exception(str(cause)))[:200]}"
        raise UserError(f"torch cannot write {path.name} of this tower ({reason})") from error


def _check(path: Path, encode: Any, batches: Sequence[tuple[Tensor, ...]], names: list[str]) -> float:
    """The largest difference between what onnxruntime and PyTorch make of the batches."""
    import onnxruntime

    worst = 0.0
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for batch in batches:
            inputs = {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
            (found,) = session.run(["embeddings"], inputs)
            with torch.inference_mode():
                expected = encode(*batch)
            difference = (torch.from_numpy(found) - expected).abs().max().item()
            worst = max(worst, difference) if difference == difference else float("inf")
    except Exception as error:  # onnxruntime's errors have no class of their own
        raise UserError(
            f"{path.name} does not run with another number of rows or tokens ({first_line(error)[:200]}); "
            "this tower cannot be exported to ONNX"
        ) from error
    if worst > TOLERANCE:
        raise UserError(
            f"{path.name} differs from PyTorch by {worst:.1e}, more than {TOLERANCE}; this tower cannot be "
            "exported to ONNX"
        )
    return worst


def _write_tokenizer(clip: CLIP, path: Path) -> None:
    """Write the tokenizer with its cutting and padding, checked against the one of transformers."""
    from tokenizers import Tokenizer

    tokenizer = clip.tokenize.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if clip.tokenize.settings:
        raise UserError(f"{path.name} cannot say that texts are prepared with {dict(clip.tokenize.settings)}")
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__} cannot be written as {path.name}: it is a slow tokenizer"
        )
    own = Tokenizer.from_str(backend.to_str())
    own.enable_truncation(clip.tokenize.max_length, direction=tokenizer.truncation_side)
    own.enable_padding(
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    for texts in EXAMPLES:
        expected = clip.tokenize(texts)
        found = own.encode_batch(texts)
        same = [each.ids for each in found] == expected["input_ids"].tolist()
        if not same or [each.attention_mask for each in found] != expected["attention_mask"].tolist():
            raise UserError(f"{path.name} would make other tokens than {type(tokenizer).__name__} does")
    own.save(str(path))


def _tokens(clip: CLIP, texts: list[str]) -> tuple[Tensor, ...]:
    tokens = clip.tokenize(texts)
    return tokens["input_ids"], tokens["attention_mask"]


def _logits(clip: CLIP) -> dict[str, float]:
    """What similarities are multiplied by, and what is added where there is a bias."""
    return {"scale": clip.scale.item()} | ({} if clip.bias is None else {"bias": clip.bias})


def _on_cpu(clip: CLIP) -> CLIP:
    on_cpu = clip if clip.logit_scale.device.type == "cpu" else copy.deepcopy(clip).cpu()
    return on_cpu.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its progress on stdout, which belongs to the command's answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
