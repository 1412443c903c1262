"""`clip-lightning export MODEL --to bundle|onnx|open_clip|hub` writes a model for other programs."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any, Literal

from clip_lightning.arguments import run_functions
from clip_lightning.errors import UserError, reason_of


def run(args: list[str]) -> None:
    """Run `export` with the arguments of the command line."""
    run_functions(export, args)


def export(
    model: str,
    *,
    to: Literal["bundle", "onnx", "open_clip", "hub"],
    out: Path | None = None,
    repo: str | None = None,
    private: bool | None = None,
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
        json: print one JSON object instead.
    """
    if to == "hub":
        if repo is None or out is not None:
            raise UserError("--to hub uploads a bundle and writes no folder; give --repo, and omit --out")
        answer: dict[str, Any] = {"repo": repo, "url": _push(model, repo, private)}
        message = f"uploaded to {repo}; load it with CLIP.from_pretrained({repo!r})"
    else:
        if out is None or repo is not None or private is not None:
            raise UserError(f"--to {to} writes a folder; give --out FOLDER, and omit --repo and --private")
        try:
            difference = _write(model, to, out)
        except OSError as error:
            raise UserError(
                f"--out {out} cannot be written ({error}); free some space there, or give another --out"
            ) from error
        answer = {"out": str(out.resolve()), "max_difference": difference}
        message = f"wrote {out}"
        if difference is not None:
            message += f"; its embeddings differ from PyTorch's by at most {difference:.1e}"
    print(json_module.dumps({"to": to, **answer}) if json else message)


def _write(model: str, to: str, out: Path) -> float | None:
    """Write the folder, and return the largest difference to PyTorch's embeddings (None for a bundle)."""
    from clip_lightning.files import whole_folder
    from clip_lightning.model.clip import CLIP

    if to == "bundle":
        clip = CLIP.from_pretrained(model)
        clip.save_pretrained(out, metadata=clip.metadata)
        return None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} already exists; give a new or empty folder")
    with whole_folder(out) as draft:
        clip = CLIP.from_pretrained(model)
        if to == "onnx":
            from clip_lightning.model.export.onnx import write_onnx

            return max(write_onnx(clip, draft).values())
        from clip_lightning.model.export.open_clip import write_open_clip

        return write_open_clip(clip, draft, out)


def _push(model: str, repo: str, private: bool | None) -> str:
    """Upload the bundle; return the address of the commit."""
    from huggingface_hub import get_token

    from clip_lightning.model.clip import CLIP

    if get_token() is None:
        raise UserError("--to hub needs a Hugging Face token; run `hf auth login` or set HF_TOKEN")
    clip = CLIP.from_pretrained(model)
    try:
        return clip.push_to_hub(repo, private=private)
    except UserError:
        raise
    except Exception as error:  # huggingface_hub exports no base class for errors of its HTTP client
        raise UserError(
            f"--repo {repo}: the upload to the Hugging Face hub failed ({reason_of(error)}); check the name, "
            "the token's write permission, and the connection"
        ) from error
