"""`clip-lightning embed` writes embeddings, and `clip-lightning index` builds an index to search them."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from clip_lightning.arguments import Parser, print_result
from clip_lightning.commands import MODEL
from clip_lightning.search.folder import Options
from clip_lightning.terminal import note

EMBED = """Write embeddings of images, captions or both as float32 vectors of unit length.

If you run the same command again, it resumes, or embeds only what is new or has changed. Images that cannot
be decoded are left out and listed in broken.json. `clip-lightning search` can search the folder."""
INDEX = """Build an index of images for `clip-lightning search`. Run the same command again to update it.

An update embeds only images that are new or have changed, and removes images that no longer exist. A command
that was interrupted resumes. Images that cannot be read are skipped and listed. Embeddings that
`clip-lightning embed` wrote to the folder are reused."""


def run(args: list[str]) -> None:
    """Run `embed` or `index` with the arguments of the command line, the command first."""
    embeds = args[0] == "embed"
    parser = Parser(prog=f"clip-lightning {args[0]}", description=EMBED if embeds else INDEX)
    source = "a folder of images (with its subfolders), or the folder or annotation file of a data set"
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write or update")
    skipped = {"type", "onnx"} if embeds else {"what", "shard_size", "precision"}
    parser.add_class_arguments(Options, as_group=False, skip=skipped)
    parser.add_argument("--json", type=bool, default=False, help="print one JSON object instead")
    given = parser.parse_args(args[1:])
    options = Options(**{name: value for name, value in vars(given).items() if name in vars(Options())})
    from clip_lightning.search.build import build_index

    done = build_index(given.model, given.source, given.out, options, embeddings_only=embeds)
    result = f'{done["type"]}: clip-lightning search {quote(str(given.out))} "..."'
    if embeds:
        result = f"in {done['shards']} shards: {given.out}"
    elif done["text_tower"] != "onnx" and options.onnx is None:
        note(f"search must load the model to embed a sentence: {done['text_tower']}")
    for kind, hint in (("broken", ""), ("unreadable", "; the next run retries it")):
        for path, reason in list(done[kind].items())[:5]:
            note(f"left out {path}: {reason}{hint}")
    record = {"out": str(given.out.resolve()), **done}
    print_result(record, f"{summary(done)}, {result}", given.json)


def summary(done: dict[str, Any]) -> str:
    """Summarize the result of `build_index` in one line."""
    made = ", ".join(f"{done[kind]:,} {kind}" for kind in ("images", "captions") if done[kind]) or "nothing"
    counts = {name: done[name] for name in ("added", "changed", "unchanged", "removed")}
    counts |= {kind: len(done[kind]) for kind in ("broken", "unreadable")}
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "no images"
    return f"{made} ({listed}) in {done['seconds']:.1f} s"
