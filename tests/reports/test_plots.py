"""The plots can be drawn of any split, and do not disturb the user's own matplotlib."""

from __future__ import annotations

import math
from io import BytesIO

import matplotlib
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from clip_lightning.evaluation.retrieval import Embeddings
from clip_lightning.reports.plots import plots_of_split


def random_embeddings(images: int, each: int) -> Embeddings:
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(each)
    image = normalize(torch.randn(images, 16, generator=generator))
    text = normalize(image[owner] + torch.randn(len(owner), 16, generator=generator))
    return Embeddings(image, text, torch.arange(images), owner, torch.arange(len(owner)))


HISTORY = {
    0: {"text_to_image_R@1": 12.0, "image_to_text_R@1": 20.0},
    3: {"text_to_image_R@1": math.nan, "text_to_image_R@5": 90.0, "text_to_image_R@10": 91.0},
}


@pytest.mark.parametrize(("images", "each"), [(1, 1), (2, 1), (7, 3), (150, 2)])
def test_any_split_can_be_drawn(images: int, each: int) -> None:
    before = dict(matplotlib.rcParams)
    plots = plots_of_split(random_embeddings(images, each), range(images), HISTORY, epoch=3)
    assert list(plots) == ["similarities", "recall", "recall_history"]
    for plot in plots.values():
        with Image.open(BytesIO(plot.png)) as picture:
            assert picture.size == (1000, 700)
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert ("R@100" in plots["recall"].words) == (images >= 100)
    assert dict(matplotlib.rcParams) == before


def test_words_say_what_the_plot_shows() -> None:
    axes = torch.eye(3)
    perfect = Embeddings(axes, axes, torch.arange(3), torch.arange(3), torch.arange(3))
    plots = plots_of_split(perfect, range(3), {0: {}}, epoch=0)
    assert list(plots) == ["similarities", "recall"]  # one epoch is no history
    assert plots["similarities"].words == (
        "Cosine similarity: 1.00 on average for matched pairs, 0.00 for unmatched ones; "
        "a matched pair is more similar than an unmatched one in 100.0 % of comparisons"
    )
    assert plots["recall"].words == "text → image: R@1 100.0; image → text: R@1 100.0"


def test_what_cannot_be_scored_is_an_error() -> None:
    embeddings = random_embeddings(3, 1)
    embeddings.image[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        plots_of_split(embeddings, range(3), {}, epoch=0)
