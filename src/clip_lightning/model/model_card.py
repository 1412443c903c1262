"""The README.md of a bundle: what the model is, how well it does, how to use it."""

from __future__ import annotations

from typing import Any

_CARD = """---
library_name: clip-lightning
pipeline_tag: zero-shot-image-classification
{license_line}tags: [clip, image-text-retrieval]
---

# {image_tower} × {text_tower}

A contrastive image-text model trained with clip-lightning.

| | |
|---|---|
| image tower | `{image_tower}` |
| text tower | `{text_tower}` |
| embedding | {embed_dim}, {head} heads |
| loss | {loss} |
| trained on | {training_data} |

{metrics}
## Use

```python
from clip_lightning import CLIP

clip = CLIP.from_pretrained("{place}")
similarity = clip.embed_texts(["a dog on the beach"]) @ clip.embed_images(["photo.jpg"]).T
```

Pictures: {height}×{width} pixels, {interpolation}. Texts: at most {max_length} tokens.
The weights of the towers keep the licences of their authors.
"""


def model_card(config: dict[str, Any], place: str = "FOLDER") -> str:
    """Markdown from a bundle's configuration; `metrics` (name → percentage or rank) become a table.

    Args:
        config: config.json of the bundle.
        place: the name that the example loads it by, on the hub for example.
    """
    data = config.get("training_data") or {}
    height, width = config["transform"]["size"]
    license_name, head = config.get("license"), config["head"]
    return _CARD.format(
        license_line=f"license: {license_name}\n" if license_name else "",
        image_tower=config["image_tower"]["name"],
        text_tower=config["text_tower"]["name"],
        embed_dim=config["embed_dim"],
        head=head
        if isinstance(head, str)
        else " and ".join(f"{kind} ({side})" for side, kind in head.items()),
        loss=config.get("loss", "not recorded"),
        training_data=", ".join(f"{key} {value}" for key, value in data.items()) or "not recorded",
        metrics=_metrics_table(config.get("metrics") or {}),
        height=height,
        width=width,
        interpolation=config["transform"]["interpolation"],
        max_length=config["text_tower"]["max_length"],
        place=place,
    )


def _metrics_table(metrics: dict[str, float]) -> str:
    if not metrics:
        return ""
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    return f"On the validation split:\n\n| metric | value |\n|---|---|\n{rows}\n"
