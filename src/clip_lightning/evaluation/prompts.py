"""Templates that turn the name of a class into captions."""

from __future__ import annotations

import re
from pathlib import Path

from clip_lightning.errors import UserError

# Captions that vary number, medium, quality, light and place: a pattern, and what fills its `*`. The mean of
# their embeddings represents a class better than any single one.
_IMAGENET = {
    "* of a {}.": "a photo | a picture | an image | a snapshot | a close-up | part | a drawing | "
    "a painting | a cartoon | a sculpture | a rendering | someone took this photo",
    "* photo of a {}.": "a dim | an overexposed | a black and white | a colourful | a sharp | a blurred | "
    "a grainy | a small, coarse | a poor | a beautiful | an old",
    "* of the {}.": "a photo | a detailed close-up | a compressed photo | a professional photo | "
    "a pencil sketch",
    "a photo of * {}.": "one | my | a single | several | a big | a little | a clean | a worn | a strange | "
    "an ordinary",
    "a {} *.": "seen from far away | seen from above | seen from the side | in front of a plain background | "
    "on a white background | in its usual surroundings | outdoors | indoors | in the middle of the picture | "
    "at the edge of the picture | that is partly hidden | in bright sunlight | in the dark",
    "*.": "a toy {} | an illustration that shows a {} | there is a {} here | this is a {} | "
    "here we see the {}",
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "simple": ("a photo of a {}.",),
    "imagenet": tuple(
        pattern.replace("*", filling)
        for pattern, fillings in _IMAGENET.items()
        for filling in fillings.split(" | ")
    ),
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
