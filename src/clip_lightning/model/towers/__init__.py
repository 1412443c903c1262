"""Image and text towers: any timm image model and any Hugging Face text model."""

from clip_lightning.model.towers.base import Tower
from clip_lightning.model.towers.image import ImageTower
from clip_lightning.model.towers.text import TextTower, Tokenize

__all__ = ["ImageTower", "TextTower", "Tokenize", "Tower"]
