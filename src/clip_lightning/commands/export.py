"""`clip-lightning export MODEL --to bundle|onnx|open_clip|hub` writes a model for other programs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt
from safetensors import SafetensorError

from clip_lightning.arguments import print_result, run_functions
from clip_lightning.errors import UserError, as_user_error
from clip_lightning.terminal import note

if TYPE_CHECKING:  # not with postponed annotations: to resolve those, jsonargparse would import these
    from clip_lightning.model.clip import CLIP


def export(
    model: str,
    *,
    to: Literal["bundle", "onnx", "open_clip", "hub"],
    out: Path | None = None,
    repo: str | None = None,
    private: bool | None = None,
    dims: PositiveInt | None = None,
    json: bool = False,
) -> None:
    """Export a model to another format, or upload it to the Hugging Face hub.

    ONNX and open_clip models are run once after the export, and the export fails if their embeddings differ
    from PyTorch's by more than 1e-4.

    Args:
        model: a bundle, a run folder, a checkpoint, a Hugging Face hub id, or
            wandb:ENTITY/PROJECT/NAME:ALIAS.
        to: bundle (clip-lightning's own format), onnx (image.onnx, text.onnx, tokenizer.json, config.json),
            open_clip (a folder that open_clip loads as local-dir:FOLDER; linear heads only), or hub (a bundle
            that is uploaded).
        out: new or empty folder to write; --to bundle may also replace a bundle.
        repo: repository for --to hub, OWNER/NAME; it is created if it does not exist.
        private: whether --to hub creates a private repository; by default the owner's settings decide.
        dims: write a model whose embeddings are only the first numbers, normalized again; needs linear heads
            unless you export to onnx.
        json: print one JSON object instead.
    """
    from clip_lightning.files import whole_folder
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.export.onnx import write_onnx
    from clip_lightning.model.export.open_clip import write_open_clip

    if to == "hub":
        if repo is None or out is not None:
            raise UserError("--to hub uploads a bundle and writes no folder; give --repo, and omit --out")
        clip = _short(CLIP.from_pretrained(model), dims)
        remedy = "check the name, the connection, and that your token may write (`hf auth login`, HF_TOKEN)"
        with as_user_error(f"--repo {repo}: the upload to the Hugging Face hub failed", remedy):
            url = clip.push_to_hub(repo, private=private)
        text = f"uploaded to {repo}; load it with CLIP.from_pretrained({repo!r})"
        print_result({"to": to, "repo": repo, "url": url}, text, json)
        return
    if out is None or repo is not None or private is not None:
        raise UserError(f"--to {to} writes a folder; give --out FOLDER, and omit --repo and --private")
    if to != "bundle" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} already exists; give a new or empty folder")
    clip, difference, text = _short(CLIP.from_pretrained(model), dims), None, f"wrote {out}"
    try:
        if to == "bundle":
            clip.save_pretrained(out, metadata=clip.metadata)
        else:
            with whole_folder(out) as draft:
                if to == "onnx":
                    difference = max(write_onnx(clip, draft).values())
                else:
                    difference = write_open_clip(clip, draft, out)
            text += f"; its embeddings differ from PyTorch's by {difference:.1e} or less"
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--out {out} cannot be written ({error}); free some space there, or give another --out"
        ) from error
    print_result({"to": to, "out": str(out.resolve()), "max_difference": difference}, text, json)


def _short(clip: "CLIP", dims: int | None) -> "CLIP":
    """Return the model with so many dimensions, and report what this costs if its training measured it."""
    short = clip.with_dims(dims or clip.dims)
    all_of, left = (model.metadata.get("metrics", {}).get("rsum") for model in (clip, short))
    if short is not clip and all_of and left:
        lost = f"rsum {left:.1f} instead of {all_of:.1f} ({left / all_of:.1%}) on the validation split"
        note(f"{dims} of {clip.dims} dimensions: {lost}")
    return short


run = partial(run_functions, export)
