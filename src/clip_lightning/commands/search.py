"""`clip-lightning index` makes an index of pictures, `clip-lightning search` finds pictures in one."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from clip_lightning.arguments import run_functions
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line

MOST_NAMED = 5


def run(args: list[str]) -> None:
    """Run `index` or `search` with the words of the command line, the command first."""
    if args[0] == "index":
        run_functions(index, args, positional=True)
    else:
        run_functions(search, _with_query(args), positional=True)


def _with_query(words: Sequence[str]) -> list[str]:
    """The second word that is no option and no option's value is the query."""
    found, bare, left = [], 0, iter(words)
    for word in left:
        if word.startswith("-"):
            found.append(word)
            if word.startswith("--") and "=" not in word and word not in ("--json", "--help"):
                found += [value for value in [next(left, None)] if value is not None]
            continue
        bare += 1
        found.append(f"--query={word}" if bare == 3 else word)  # command, index, query
    return found


def index(
    model: str,
    source: Path,
    *,
    out: Path,
    type: Literal["auto", "flat", "hnsw", "ivfpq"] = "auto",
    captions: bool | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    onnx: bool | None = None,
    json: bool = False,
) -> None:
    """Make an index of pictures, for `clip-lightning search`; the same command again brings it up to date.

    Pictures that have not changed are not embedded again, those that are gone leave the index, and a command
    that was stopped goes on where it was. Broken pictures are skipped and named.

    Args:
        model: the folder of a bundle, its Hugging Face hub id, or wandb:ENTITY/PROJECT/NAME:ALIAS.
        source: a folder of pictures, searched with its subfolders, or a captioned data set, as
            fit --data.root takes it; its captions are kept.
        out: folder of the index.
        type: of the FAISS index: flat (exact), hnsw (a graph), ivfpq (compressed); auto takes flat below
            100,000 pictures and ivfpq above.
        captions: embed the captions, too, so that search --captions true finds them; as it was if not given.
        batch_size: pictures that the image tower sees at once.
        num_workers: threads that read and decode pictures; one for each core if not given.
        onnx: let the index carry its text tower as ONNX, so that search answers a sentence within a second or
            two, without loading the model; where that can be if not given (it needs onnxruntime).
        json: print one JSON object instead.
    """
    from clip_lightning.search.build import Options, build_index

    report = build_index(model, source, out, Options(type, batch_size, num_workers, captions, onnx))
    for number, (path, reason) in enumerate(report.left_out.items()):
        if number < MOST_NAMED:
            print(one_line(f"left out {path}: {reason}"), file=sys.stderr)
    if report.text_tower != "onnx" and onnx is None:
        print(f"search will load the model for a sentence: {report.text_tower}", file=sys.stderr)
    if json:
        print(json_module.dumps({"index": str(out.resolve()), **asdict(report)}))
    else:
        print(f'{report.summary()}: clip-lightning search {out} "..."')


def search(
    index: Path,
    *,
    query: str | None = None,
    image: Path | None = None,
    file: Path | None = None,
    k: int = 9,
    grid: Path | None = None,
    captions: bool = False,
    model: str | None = None,
    json: bool = False,
) -> None:
    """Find pictures: clip-lightning search INDEX "a dog running on grass".

    Args:
        index: the folder that `clip-lightning index` wrote.
        query: the sentence; the word after the index is it, too.
        image: search with this picture instead.
        file: search with each line of this UTF-8 file.
        k: how many to find, the best first; scores are cosines.
        grid: write what was found as a PNG there.
        captions: find captions for --image instead; the index must have been built with --captions true.
        model: where the index's model is, if it has moved since.
        json: print one JSON object instead.
    """
    queries = _queries(query, image, file)
    if k < 1:
        raise UserError(f"--k {k}: expected 1 or more")
    if captions and (image is None or grid is not None):
        raise UserError("--captions true finds captions for a picture: give --image, and no --grid")
    from clip_lightning.search.index import ImageIndex

    loaded = ImageIndex.load(index, model)
    found = _find(loaded, queries, k, captions)
    if grid is not None:
        from clip_lightning.search.grid import draw_found

        draw_found(list(zip(queries, found, strict=True)), grid)
        print(f"drawn in {grid}", file=sys.stderr)
    if json:
        results = [
            {"query": str(query), "results": [each.as_dict() for each in hits]}
            for query, hits in zip(queries, found, strict=True)
        ]
        about = {"index": str(index.resolve()), "model": loaded.manifest.model, "type": loaded.manifest.type}
        print(json_module.dumps({**about, "pictures": len(loaded), "queries": results}))
    else:
        _show(queries, found)


def _find(index: Any, queries: list[str | Path], k: int, captions: bool) -> Sequence[Sequence[Any]]:
    """Records for each query; `index` is an ImageIndex, whose import takes seconds that --help need not."""
    if not isinstance(queries[0], Path):
        return index.search(queries, k)
    return index.captions(queries, k) if captions else index.search_by_image(queries, k)


def _queries(query: str | None, image: Path | None, file: Path | None) -> list[str | Path]:
    given = [each for each in (query, image, file) if each is not None]
    if len(given) != 1:
        raise UserError(
            'expected one thing to search for: a sentence in quotes (search INDEX "a dog"), --image FILE or '
            f"--file FILE; got {len(given) or 'none'}"
        )
    if image is not None:
        if not image.is_file():
            raise UserError(f"--image {image}: no such file")
        return [image]
    if file is None:
        lines = [query or ""]
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {file} cannot be read as UTF-8 text: {error}") from error
    sentences: list[str | Path] = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise UserError(
            f"--file {file} has no line to search for"
            if file is not None
            else "the sentence to search for is empty; give some words"
        )
    return sentences


def _show(queries: Sequence[str | Path], found: Sequence[Sequence[Any]]) -> None:
    from clip_lightning.search.index import FoundCaption

    for query, hits in zip(queries, found, strict=True):
        if len(queries) > 1:
            print(one_line(str(query)))
        for each in hits:
            if isinstance(each, FoundCaption):
                print(f"{each.score:.3f}  {one_line(each.caption)}")
            else:
                path = one_line(str(each.path)) + (" (missing)" if each.missing else "")
                first = f"  {one_line(each.captions[0])}" if each.captions else ""
                print(f"{each.score:.3f}  {path}{first}")
