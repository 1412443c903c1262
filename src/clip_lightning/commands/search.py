"""`clip-lightning search` finds images in an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clip_lightning.arguments import Parser, print_result
from clip_lightning.errors import UserError, as_user_error
from clip_lightning.terminal import note, one_line


def run(args: list[str]) -> None:
    """Run `search` with the arguments of the command line, the command first."""
    parser = Parser.of_function("search", search, skip={"index", "sentence"})
    folder = "the folder that `clip-lightning index` or `clip-lightning embed` wrote"
    parser.add_argument("index", type=Path, help=folder)
    parser.add_argument("sentence", type=str, nargs="?", help="the sentence to search for")
    search(**vars(parser.parse_args(args[1:])))


def search(
    index: Path,
    sentence: str | None = None,
    *,
    query: str | None = None,
    image: Path | None = None,
    file: Path | None = None,
    k: int = 9,
    grid: Path | None = None,
    model: str | None = None,
    json: bool = False,
) -> None:
    """Find images in an index: clip-lightning search INDEX "a dog running on grass".

    Args:
        query: the sentence, if you do not give it after the index.
        image: search with this image instead of a sentence.
        file: search with each line of this UTF-8 file.
        k: number of results, the best first; scores are cosine similarities.
        grid: PNG file to which the results are drawn as a grid.
        model: location of the index's model if it has moved since the index was built.
        json: print one JSON object instead.
    """
    queries = _queries(sentence, query, image, file)
    if grid is not None and grid.suffix.lower() != ".png":  # it may be a photograph
        raise UserError(f"--grid {grid}: expected the name of a .png file")
    from clip_lightning.search.index import ImageIndex

    loaded = ImageIndex.load(index, model)
    find: Any = loaded.search if image is None else loaded.search_by_image
    try:
        results = list(zip(queries, find(queries, k), strict=True))
    except ValueError as error:  # an image that cannot be read
        raise UserError(str(error)) from error
    if grid is not None:
        from clip_lightning.search.grid import draw_found

        draw_found(results, grid)
        note(f"grid: {grid}")
    lines = []
    for title, hits in results:
        if len(queries) > 1:
            lines.append(one_line(str(title)))
        for hit in hits:
            texts = [f"{hit.path}{' (missing)' * hit.missing}", *hit.captions[:1]]
            lines.append("  ".join([f"{hit.score:.3f}", *map(one_line, texts)]))
    answers = [{"query": query, "results": [asdict(hit) for hit in hits]} for query, hits in results]
    about = {"index": index.resolve(), "model": loaded.manifest.model, "type": loaded.manifest.type}
    print_result({**about, "images": len(loaded), "queries": answers}, "\n".join(lines), json)


def _queries(sentence: str | None, query: str | None, image: Path | None, file: Path | None) -> Sequence[Any]:
    given: list[Any] = [value for value in (sentence, query, image, file) if value is not None]
    if len(given) != 1:
        raise UserError(
            'expected one query: a sentence in quotes (search INDEX "a dog"), --image FILE or --file FILE; '
            f"got {len(given) or 'none'}"
        )
    if image is not None:
        return given
    with as_user_error(f"--file {file} cannot be read as text", "give a UTF-8 file"):
        lines = file.read_text(encoding="utf-8-sig").splitlines() if file else given
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise UserError(f"{f'--file {file}' if file else 'the sentence'} is empty; give a sentence")
    return sentences
