"""Comparisons for people: tables, pictures, and a web page that stands alone with all of it."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from clip_lightning.experiments.charts import heatmap, recall_latency
from clip_lightning.experiments.compare import Comparison, data_name
from clip_lightning.experiments.tables import cells, csv_table, header, markdown, notes
from clip_lightning.files import write_atomically
from clip_lightning.reports.pages import template

ABOUT = {
    "heatmap.png": "rsum of each image tower with each text tower",
    "recall_latency.png": "recall against image latency, with the Pareto front",
}


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the table as comparison.md, .csv and .json, the pictures, and index.html with all of it.

    A picture for which there is nothing to draw is not written, and none from before stays.
    """
    pictures = {}
    for name, draw in {"heatmap.png": heatmap, "recall_latency.png": recall_latency}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks: boxes say so
            png = draw(comparison)
        if png is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_atomically(folder / name, png)
            pictures[ABOUT[name]] = png
    record = json.dumps(comparison.as_dict(), indent=2, ensure_ascii=False, default=str)
    texts = {
        "comparison.md": markdown(comparison),
        "comparison.csv": csv_table(comparison),
        "comparison.json": record + "\n",
        "index.html": page(comparison, pictures),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode(errors="replace"))


def page(comparison: Comparison, pictures: Mapping[str, bytes]) -> str:
    """One HTML file whose tables are sorted by a click; inside, the PNGs by what they show."""
    tables = [
        {"name": data_name(rows[0].digest), "rows": cells(comparison, rows)} for rows in comparison.data_sets
    ]
    return template("comparison.html.j2", Path(__file__).parent).render(
        comparison=comparison,
        header=header(comparison),
        tables=tables,
        notes=notes(comparison),
        pictures=[
            (about, "data:image/png;base64," + base64.b64encode(png).decode())
            for about, png in pictures.items()
        ],
    )
