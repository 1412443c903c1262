"""Pictures with a class each from wherever they are: a folder or table, or a data set by name."""

from __future__ import annotations

from pathlib import Path

from clip_lightning.data.classes import ClassSet, read_classes
from clip_lightning.data.hub_classes import read_hub_classes
from clip_lightning.data.torchvision_sets import read_torchvision
from clip_lightning.errors import UserError


def find_classes(place: str, cache: Path | None = None) -> ClassSet:
    """Read the pictures and their classes; what is fetched by name stays on this machine.

    Args:
        place: a folder or table as for `read_classes`; `torchvision:NAME`; or `hf:OWNER/NAME[:SUBSET]`, or
            `hf:` and a local folder of the package `datasets`.
        cache: where data sets of torchvision are kept; the user's cache folder by default. Those of Hugging
            Face are kept by its own packages.

    Raises:
        UserError: there is no such data, or it cannot be fetched.
    """
    check_name(place)
    kind, colon, name = place.partition(":")
    if not colon or Path(place).exists():
        return read_classes(Path(place))
    return read_torchvision(name, cache) if kind == "torchvision" else read_hub_classes(name)


def check_name(place: str) -> None:
    """Complain of a place where there is nothing, before anything else is done.

    Raises:
        UserError: it is no file, no folder and no name.
    """
    if not Path(place).exists() and place.partition(":")[0] not in ("torchvision", "hf"):
        raise UserError(
            f"there is no folder or file {place}; give a folder of class folders, a CSV with the columns "
            "image and label, torchvision:NAME or hf:OWNER/NAME"
        )
