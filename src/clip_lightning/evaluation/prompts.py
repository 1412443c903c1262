"""Templates that turn the name of a class into captions."""

from __future__ import annotations

import re
from pathlib import Path

from clip_lightning.errors import UserError

# Captions that vary distance, light, quality, medium and number. The mean of their embeddings represents a
# class better than any single one.
_IMAGENET = """
a photo of a {}.
a photo of the {}.
a photo of one {}.
a photo of my {}.
a photo of a single {}.
a photo of several {}.
a picture of a {}.
an image of a {}.
a snapshot of a {}.
a close-up of a {}.
a detailed close-up of the {}.
a {} seen from far away.
a {} seen from above.
a {} seen from the side.
a {} in front of a plain background.
a {} on a white background.
a {} in its usual surroundings.
a {} outdoors.
a {} indoors.
a {} in the middle of the picture.
a {} at the edge of the picture.
part of a {}.
a {} that is partly hidden.
a {} in bright sunlight.
a {} in the dark.
a dim photo of a {}.
an overexposed photo of a {}.
a black and white photo of a {}.
a colourful photo of a {}.
a sharp photo of a {}.
a blurred photo of a {}.
a grainy photo of a {}.
a small, coarse photo of a {}.
a compressed photo of the {}.
a poor photo of a {}.
a beautiful photo of a {}.
a professional photo of the {}.
an old photo of a {}.
a photo of a big {}.
a photo of a little {}.
a photo of a clean {}.
a photo of a worn {}.
a photo of a strange {}.
a photo of an ordinary {}.
a drawing of a {}.
a pencil sketch of the {}.
a painting of a {}.
a cartoon of a {}.
a toy {}.
a sculpture of a {}.
a rendering of a {}.
an illustration that shows a {}.
there is a {} here.
this is a {}.
here we see the {}.
someone took this photo of a {}.
"""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "simple": ("a photo of a {}.",),
    "imagenet": tuple(_IMAGENET.strip().splitlines()),
    "none": ("{}",),
}


def read_templates(name: str) -> tuple[str, ...]:
    """Return the templates of a set (`simple`, `imagenet`, `none`), or those of a file with one per line.

    Quotes around a line and a comma after it, as in a list pasted from code, are removed.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--templates {name}: expected {', '.join(TEMPLATES)}, or a UTF-8 file with one template per line"
        ) from error
    quoted = r"""^\w{0,2}(["'])(.*)\1,?$"""
    templates = tuple(dict.fromkeys(filter(None, (re.sub(quoted, r"\2", line.strip()) for line in lines))))
    if wrong := [template for template in templates or ("",) if "{}" not in template]:
        raise UserError(
            f"--templates {name}: {wrong[0][:80]!r} has no {{}} for the name of a class; write one "
            "template per line, as `a photo of a {}.`"
        )
    return templates
