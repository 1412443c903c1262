"""Pictures to validate on, out of shards: a folder like any other, written once into the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.formats import read_captions
from clip_lightning.data.shards.chunks import ChunkFolder
from clip_lightning.data.shards.manifest import Manifest, tars
from clip_lightning.data.shards.record import BrokenRecord, CaptionChoice, Record
from clip_lightning.data.shards.storage import expand, holds_tars, size_of
from clip_lightning.data.shards.tars import read_tar
from clip_lightning.data.shards.write import picture_suffix
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, whole_folder

_COPIES = 2


def held_out(source: str, split: str, choice: CaptionChoice) -> list[CaptionedImage]:
    """The pictures of `source` for a split, with all captions that might be drawn in training.

    Args:
        source: a folder of captioned pictures or of shards, a URL or a pattern of tars. Of what has splits
            that one is taken, of other data everything.
        split: `val` or `test`.
        choice: which fields captions are taken from, of shards.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    manifest = Manifest.find(source)
    if manifest is not None and split not in manifest.splits:
        return []
    if manifest is None and not holds_tars(source):
        captions = read_captions(Path(source))
        if captions.has_official_splits:
            return [image for image in captions.images if image.split == split]
        return list(captions.images)
    if manifest is None:
        content = json.dumps([(url, size_of(url)) for url in expand(source)])
    else:
        content = json.dumps([shard.sha256 for shard in manifest.splits[split]])
    key = hashlib.sha256(json.dumps([content, dict(choice.probabilities)]).encode()).hexdigest()[:32]
    folder = cache_folder("shards") / f"{split}-{key}"
    if not folder.exists():
        broken: dict[str, str] = {}
        with whole_folder(folder) as draft:
            _write(_records(source, split, manifest, broken), choice, draft, broken)
            if not (draft / "captions.jsonl").stat().st_size:
                reason = next(iter(broken.items()), ("there is none", ""))
                raise UserError(f"{source} holds no sample to validate on ({reason[0]}: {reason[1]})")
    return list(read_captions(folder).images)


def _records(source: str, split: str, manifest: Manifest | None, broken: dict[str, str]) -> Iterator[Record]:
    if manifest is not None and manifest.format == "litdata":
        chunks = ChunkFolder(source, manifest, split, _COPIES)
        for row in range(len(chunks)):
            yield chunks[row]
        return
    for url in tars(source, manifest, split):
        yield from read_tar(url, broken)


def _write(records: Iterator[Record], choice: CaptionChoice, folder: Path, broken: dict[str, str]) -> None:
    (folder / "images").mkdir()
    with (folder / "captions.jsonl").open("w") as file:
        for number, record in enumerate(records):
            try:
                captions = choice.all(record.fields)
                name = f"{number:08d}.{picture_suffix(record.image)}"
            except BrokenRecord as error:
                broken[record.name] = str(error)
                continue
            (folder / "images" / name).write_bytes(record.image)
            file.write(json.dumps({"image": f"images/{name}", "captions": captions}) + "\n")
