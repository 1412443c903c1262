"""`clip-lightning export MODEL --to bundle|onnx|open_clip|hub`: a model for other programs and places."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clip_lightning.arguments import run_functions
from clip_lightning.errors import UserError

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP


def run(args: list[str]) -> None:
    """Run `export` with the words of the command line."""
    run_functions(export, args, positional=True)


def export(
    model: str,
    *,
    to: Literal["bundle", "onnx", "open_clip", "hub"],
    out: Path | None = None,
    repo: str | None = None,
    private: bool | None = None,
    json: bool = False,
) -> None:
    """Write a model in another format, or to the Hugging Face hub.

    What is written for other programs is run by them once, and refused if their embeddings differ from
    PyTorch's by more than 1e-4.

    Args:
        model: a bundle's folder, a hub id, wandb:NAME, or a checkpoint RUN/checkpoints/best.ckpt.
        to: bundle (our own format), onnx (image.onnx, text.onnx, tokenizer.json, config.json), open_clip (a
            folder to load as local-dir:FOLDER; linear heads only), or hub (a bundle, uploaded).
        out: new or empty folder to write; a bundle may also replace one.
        repo: with --to hub, OWNER/NAME; it is made if it is not there.
        private: with --to hub, whether a new repository is private; as the owner's settings say if not given.
        json: print one JSON object instead.
    """
    if to == "hub":
        if repo is None or out is not None:
            raise UserError("--to hub uploads and writes no folder: give --repo OWNER/NAME, and no --out")
        answer: dict[str, Any] = {"repo": repo, "url": _push(model, repo, private)}
        said = f"uploaded to {repo}: CLIP.from_pretrained({repo!r})"
    else:
        if out is None or repo is not None or private is not None:
            raise UserError(f"--to {to} writes a folder: give --out FOLDER, and no --repo or --private")
        try:
            difference = _write(model, to, out)
        except OSError as error:
            raise UserError(
                f"--out {out} cannot be written ({error}); free some space there, or give another --out"
            ) from error
        answer = {"out": str(out.resolve()), "max_difference": difference}
        close = "" if difference is None else f", embeddings within {difference:.1e} of PyTorch's"
        said = f"written to {out}{close}"
    print(json_module.dumps({"to": to, **answer}) if json else said)


def _write(model: str, to: str, out: Path) -> float | None:
    """Write the folder; the largest difference to PyTorch's embeddings where another program runs it."""
    from clip_lightning.files import whole_folder

    if to == "bundle":
        clip = _load(model)
        clip.save_pretrained(out, metadata=clip.metadata)
        return None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; give a new or an empty folder")
    with whole_folder(out) as draft:
        clip = _load(model)
        if to == "onnx":
            from clip_lightning.model.export.onnx import write_onnx

            return max(write_onnx(clip, draft).values())
        from clip_lightning.model.export.open_clip import write_open_clip

        return write_open_clip(clip, draft, out)


def _load(model: str) -> CLIP:
    if Path(model).is_file():
        from clip_lightning.training.trained_model import load_checkpoint

        return load_checkpoint(Path(model))
    from clip_lightning.model.clip import CLIP

    return CLIP.from_pretrained(model)


def _push(model: str, repo: str, private: bool | None) -> str:
    """Upload the bundle; the address of the commit."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("--to hub needs a Hugging Face token: `hf auth login` once, or set HF_TOKEN")
    clip = _load(model)
    try:
        url = clip.push_to_hub(
            repo,
            config=clip.metadata,
            model_card_kwargs={"place": repo},
            private=private,
            commit_message="Upload a clip-lightning bundle",
        )
    except UserError:
        raise
    except Exception as error:  # those of the HTTP client have no class that huggingface_hub names
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--repo {repo}: the Hugging Face hub did not take it ({reason}); check the name, whether the "
            "token may write, and the connection"
        ) from error
    return str(url)
