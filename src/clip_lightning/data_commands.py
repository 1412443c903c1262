"""`clip-lightning data upload`: captioned pictures as a W&B artifact."""

from __future__ import annotations

import json as json_module
import sys
from collections import Counter
from pathlib import Path

from clip_lightning.arguments import run_functions


def run(args: list[str]) -> None:
    """Run `data` with the words of the command line."""
    run_functions({"upload": upload}, args, positional=True)


def upload(
    root: Path,
    *,
    artifact: str,
    dataset: str = "auto",
    project: str = "clip-lightning",
    entity: str | None = None,
    reference: bool = False,
    json: bool = False,
) -> None:
    """Log captioned pictures as a W&B artifact, for `fit --data.artifact` on any machine.

    Args:
        root: the data set's folder; all of it is uploaded, in its layout.
        artifact: name of the artifact.
        dataset: how to read it: auto, flickr8k, flickr30k, captions or folder.
        project: W&B project.
        entity: W&B user or team; your default one if not given.
        reference: upload where the files lie and their checksums instead of the files; for machines that
            share the file system.
        json: print one JSON object instead.
    """
    from clip_lightning.data.formats import read_captions
    from clip_lightning.errors import UserError
    from clip_lightning.tracking.artifacts import check_upload, upload_data

    check_upload(artifact)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the data set's folder")
    captions = read_captions(root, dataset)
    about = {
        "captions_digest": captions.digest(),
        "pictures": len(captions.images),
        "captions": sum(len(image.captions) for image in captions.images),
        "splits": dict(Counter(image.split or "none" for image in captions.images)),
        "left_out": len(captions.left_out),
    }
    print(f"uploading {about['pictures']:,} pictures with {about['captions']:,} captions", file=sys.stderr)
    name = upload_data(artifact, root, project=project, entity=entity, by_reference=reference, metadata=about)
    if json:
        print(json_module.dumps({"artifact": name, **about}))
    else:
        print(f"{name}: clip-lightning fit --data.artifact {name}")
