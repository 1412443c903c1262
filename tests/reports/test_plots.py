"""The plots can be drawn of any split, and do not disturb the user's own matplotlib."""

import math
from io import BytesIO

import matplotlib
import pytest
from PIL import Image
from small_splits import noisy, perfect

from clip_lightning.evaluation.predictions import similarities
from clip_lightning.evaluation.retrieval import Embeddings
from clip_lightning.reports.plots import Plot, plots_of_split

HISTORY = {
    0: {"text_to_image_R@1": 12.0, "image_to_text_R@1": 20.0},
    3: {"text_to_image_R@1": math.nan, "text_to_image_R@5": 90.0, "text_to_image_R@10": 91.0},
}


def plots(embeddings: Embeddings, history: dict[int, dict[str, float]], epoch: int) -> dict[str, Plot]:
    return plots_of_split(embeddings, similarities(embeddings), history, epoch)


@pytest.mark.parametrize(("images", "each"), [(1, 1), (2, 1), (7, 3), (150, 2)])
def test_any_split_can_be_drawn(images: int, each: int) -> None:
    before = dict(matplotlib.rcParams)
    drawn = plots(noisy(images, each), HISTORY, epoch=3)
    assert list(drawn) == ["similarities", "recall", "recall_history"]
    for plot in drawn.values():
        with Image.open(BytesIO(plot.png)) as picture:
            assert picture.size == (1000, 700)
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert ("R@100" in drawn["recall"].words) == (images >= 100)
    assert dict(matplotlib.rcParams) == before


def test_words_say_what_the_plot_shows() -> None:
    drawn = plots(perfect([1] * 3), {0: {}}, epoch=0)
    assert list(drawn) == ["similarities", "recall"]  # one epoch is no history
    assert drawn["similarities"].words == (
        "Cosine similarity: 1.00 on average for matched pairs, 0.00 for unmatched ones; "
        "a matched pair is more similar than an unmatched one in 100.0 % of comparisons"
    )
    assert drawn["recall"].words == "text → image: R@1 100.0; image → text: R@1 100.0"
