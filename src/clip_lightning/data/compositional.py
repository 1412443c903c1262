"""Read benchmarks of compositional understanding: captions that differ in a word or in their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from clip_lightning.data.formats import Finder
from clip_lightning.data.readers import file_head, read_lines, suffix_of
from clip_lightning.errors import UserError, as_user_error

LAYOUTS = {  # from the keys of the images to those of the captions
    ("filename",): ("caption", "negative_caption"),  # SugarCrepe, with a file per category
    ("image_0", "image_1"): ("caption_0", "caption_1"),  # Winoground, whose names have no suffix
}
EXPECTED = "expected JSON or JSON lines in the layout of SugarCrepe or Winoground"


class Choice(NamedTuple):
    """One or two images, and two captions: one for the first image, one for the second image or wrong."""

    images: list[Path]
    captions: list[str]
    category: str


def read_choices(root: Path, image_folder: Path | None) -> tuple[list[Choice], dict[str, str]]:
    """Read a file of SugarCrepe or Winoground, or those in a folder or its subfolder `data`.

    They are recognized by their content. Return the choices, and the reason by name for missing images.
    """
    choices: list[Choice] = []
    missing: dict[str, str] = {}
    for path in [root] if root.is_file() else sorted([*root.glob("*.json*"), *root.glob("data/*.json*")]):
        head = file_head(path)
        if not (keys := next((k for k in LAYOUTS if all(f'"{key}"' in head for key in k + LAYOUTS[k])), ())):
            continue
        finder = Finder([path.parent, root, image_folder or root], root)
        with as_user_error(f"{path} cannot be read", EXPECTED):
            lines = [line for line in read_lines(path) if line.strip()]
            content = json.loads(f"[{','.join(lines)}]" if suffix_of(path) != ".json" else "".join(lines))
        for number, entry in enumerate(content.values() if isinstance(content, dict) else content, start=1):
            with as_user_error(f"entry {number} of {path} cannot be read", EXPECTED):
                captions = [" ".join(entry[key].split()) for key in LAYOUTS[keys]]
                "".join(captions).encode()  # fails for characters that a tokenizer refuses
                names = [entry[key] for key in keys]
                places = [finder.find(name) or finder.find(f"{name}.png") for name in names]
            category = str(entry.get("collapsed_tag") or entry.get("tag") or path.name.split(".")[0])
            missing |= {n: "there is no such image" for n, p in zip(names, places, strict=True) if p is None}
            if None not in places:
                choices.append(Choice([place for place in places if place], captions, category))
    if not choices:
        first = "".join(f" (first {name}: {reason})" for name, reason in list(missing.items())[:1])
        raise UserError(f"{root} has no entry with its images{first}; {EXPECTED}, and the images in --images")
    return choices, missing
