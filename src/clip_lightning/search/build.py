"""Builds, resumes and updates embeddings and indexes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from clip_lightning.cores import cores
from clip_lightning.errors import UserError
from clip_lightning.files import complete_file, whole_folder
from clip_lightning.model.checkpoint import model_identity
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import best_device
from clip_lightning.model.export.onnx import write_text_tower
from clip_lightning.search import vectors
from clip_lightning.search.embed import Embedder, find_images
from clip_lightning.search.folder import EmbeddingsFolder, Manifest, Options, digest


def build_index(
    model: CLIP | str | Path,
    source: Path,
    out: Path,
    options: Options,
    *,
    embeddings_only: bool = False,
    helps: bool = False,
) -> dict[str, Any]:
    """Embed a data set and build its index, reusing the embeddings that are in the folder already.

    Args:
        model: a CLIP, or the folder, Hub id or artifact of one.
        source: a folder of images, or a captioned data set.
        out: folder of the embeddings.
        options: options of the embeddings and the index.
        embeddings_only: whether to skip the index.
        helps: whether this process only embeds parts for the process that builds the index.

    Returns:
        JSON values: the content of the folder, the numbers of images that were `added`, `changed`, `removed`,
        `unchanged` and `embedded`, `seconds`, and the reasons by path for images that are `broken` (they
        cannot be decoded) or `unreadable` (the next run tries again). `text_tower` is `onnx`, or the reason
        for which the index does not contain the text tower.

    Raises:
        UserError: there is no model or nothing to embed, the folder belongs to another model or another
            process is writing to it, or it cannot be written.
    """
    start = time.perf_counter()
    captions_of, broken = find_images(source)
    if not embeddings_only:
        vectors.chosen_type(options.type, len(captions_of))  # fail before hours of work
    if options.what in ("captions", "both") and not any(captions_of.values()):
        raise UserError(f"{source} has no readable captions; give --what images")
    name = "" if isinstance(model, CLIP) else _absolute(model)
    clip = (model if isinstance(model, CLIP) else CLIP.from_pretrained(model).to(best_device())).eval()
    folder, settings = EmbeddingsFolder(out), options.settings()
    width = clip.embed_images([]).shape[1]
    first = Manifest(model_identity(clip), name, str(source.resolve()), width, **settings)
    with contextlib.nullcontext() if helps else folder.writing():
        old = folder.manifest() or first
        new = replace(old, **settings, model=name or old.model, source=first.source)
        if (old.identity, old.precision) != (first.identity, new.precision):
            raise UserError(
                f"--out {out} contains embeddings of another model or precision ({old.model or 'unnamed'}, "
                f"{old.precision}); give the same, or another --out"
            )
        if old is first and not helps:
            folder.write_manifest(first)
        if not embeddings_only and new.what == "captions":
            new = replace(new, what="both")
        embedder = Embedder(clip, folder, new, options.batch_size, options.num_workers or cores())
        before = embedder.digests(old.parts)
        files = embedder.write(captions_of, wait=not helps)
        after = embedder.digests(files)
        broken |= embedder.broken
        failed = broken | embedder.unreadable
        if failed and not (after or helps or new.what == "captions"):
            path, reason = next(iter(failed.items()))
            raise UserError(f"none of {len(failed):,} images can be read ({path}: {reason})")
        captions = sum(rows for part, rows in files.items() if part.startswith("captions"))
        new = replace(new, images=len(after), captions=captions, parts=files, finished=True)
        if files != old.parts:
            new = replace(new, type="flat", faiss={})
        text_tower = ""
        if not embeddings_only:
            new = _with_faiss(folder, new, options.type)
            new, text_tower = _with_text_tower(clip, folder, new, options.onnx)
        if not helps:
            folder.publish(new, broken)
    unchanged = sum(before.get(path) == sha256 for path, sha256 in after.items())
    added = len(after.keys() - before.keys())
    return {name: getattr(new, name) for name in ("model", "type", "images", "captions", "width")} | {
        "shards": len(files),
        "added": added,
        "changed": len(after) - unchanged - added,
        "removed": len(before.keys() - after.keys()),
        "unchanged": unchanged,
        "embedded": embedder.embedded,
        "seconds": round(time.perf_counter() - start, 2),
        "text_tower": text_tower,
        "broken": broken,
        "unreadable": embedder.unreadable,
    }


def _absolute(name: str | Path) -> str:
    """Return the name of a model with its folder, if it is one, made absolute."""
    scheme, prefix, place = str(name).rpartition("open_clip:local-dir:")
    return scheme + prefix + (str(Path(place).resolve()) if Path(place).exists() else place)


def _with_faiss(folder: EmbeddingsFolder, manifest: Manifest, type: str) -> Manifest:
    """Write the FAISS file if it is missing and the index needs one."""
    if (chosen := vectors.chosen_type(type, manifest.images)) == "flat":
        return replace(manifest, type=chosen, faiss={})
    parts = [part for part in manifest.parts if part.startswith("images")]
    file = folder.root / f"images-{digest(part.encode() for part in parts)}.faiss"
    if not file.exists() or file.stat().st_size != manifest.faiss.get(file.name):
        with complete_file(file) as draft:
            vectors.write_index(vectors.build(np.concatenate([*map(folder.vectors, parts)])), draft)
    return replace(manifest, type=chosen, faiss={file.name: file.stat().st_size})


def _with_text_tower(
    clip: CLIP, folder: EmbeddingsFolder, manifest: Manifest, wanted: bool | None
) -> tuple[Manifest, str]:
    """Write the text tower as ONNX if it is missing, and return `onnx` or the reason for leaving it out."""
    if wanted is False:
        return replace(manifest, text_tower=""), "--onnx false"
    place = folder.text_tower(manifest.identity)
    if not manifest.text_tower or _tower_digest(place) != manifest.text_tower:
        try:
            with whole_folder(place) as draft:
                write_text_tower(clip, draft)
        except UserError as error:
            if wanted:
                raise UserError(f"--onnx true: {error}") from error
            return replace(manifest, text_tower=""), str(error)
    return replace(manifest, text_tower=_tower_digest(place)), "onnx"


def _tower_digest(folder: Path) -> str:
    files = sorted(folder.glob("*"))
    return digest(f"{file.name} {digest([file.read_bytes()])}".encode() for file in files)


def build_in_processes(
    model: str, source: Path, out: Path, options: Options, devices: int | None
) -> dict[str, Any] | None:
    """Embed a data set with several processes, each of which embeds different parts.

    The other arguments are those of `build_index`.

    Args:
        devices: number of processes on this machine; by default, one per GPU. If torchrun or srun started the
            processes, it is ignored.

    Returns:
        The result of `build_index`, or None in the processes of torchrun and srun with a rank above 0.
    """
    variables = os.environ
    if "RANK" in variables:
        rank, local, siblings = (int(variables[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    elif int(variables.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in variables:
        rank, local, siblings = int(variables["SLURM_PROCID"]), int(variables["SLURM_LOCALID"]), 1
    else:
        rank, local, siblings = -1, 0, devices or torch.cuda.device_count() or 1
    threads = options.num_workers or max(1, cores() // siblings)
    task = model, source, out, replace(options, num_workers=threads)
    spawn = multiprocessing.get_context("spawn")
    helpers = [
        spawn.Process(target=_help, args=(number, siblings, task), daemon=True)
        for number in (range(1, siblings) if rank < 0 else ())
    ]
    try:
        for helper in helpers:
            helper.start()
        _use_device(local, siblings)
        report = build_index(*task, embeddings_only=True, helps=rank > 0)
    finally:
        for helper in helpers:
            helper.terminate()  # all parts are written
    return report if rank <= 0 else None


def _help(local: int, siblings: int, task: tuple[str, Path, Path, Options]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops this one
    if parent := multiprocessing.parent_process():
        Thread(target=_follow, args=[parent], daemon=True).start()
    _use_device(local, siblings)
    with contextlib.suppress(UserError):  # the main process prints it
        build_index(*task, embeddings_only=True, helps=True)


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _use_device(local: int, siblings: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    elif siblings > 1:
        torch.set_num_threads(max(1, cores() // siblings))
