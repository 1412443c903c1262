"""`clip-lightning merge BASE TUNED... --alpha auto` averages a model and what was trained from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clip_lightning.arguments import Parser, print_result
from clip_lightning.commands import MODEL
from clip_lightning.errors import UserError


def run(args: list[str]) -> None:
    """Run `merge` with the arguments of the command line."""
    usage = "%(prog)s BASE TUNED [TUNED ...] --out FOLDER [options]"
    parser = Parser.of_function("merge", merge, skip={"base", "tuned"}, usage=usage)
    parser.add_argument("base", type=str, metavar="BASE", help=MODEL)
    parser.add_argument("tuned", type=str, nargs="+", metavar="TUNED", help="models trained from it")
    merge(**vars(parser.parse_args(args[1:])))


def merge(
    base: str,
    tuned: list[str],
    *,
    out: Path,
    alpha: float | Literal["auto"] = 0.5,
    data: str | None = None,
    keep: str | None = None,
    json: bool = False,
) -> None:
    """Average the weights of a model and of models that were trained from it.

    The result is (1 - alpha) * BASE + alpha * TUNED (WiSE-FT), where several TUNED are averaged first (a
    model soup). It often keeps most of what was learned, and forgets less of what BASE could do. With --data
    and --keep, linear heads on towers that are the same are merged by regression (RegMean), which forgets
    less still. All models need the same architecture, transform and tokenizer.

    Args:
        out: new or empty folder for the result, or a bundle, which is replaced.
        alpha: fraction of TUNED from 0 to 1, or auto to choose it by the scores on --data and --keep.
        data: captioned images that TUNED was trained on, as for `fit --data.root`. The val split that `fit`
            uses or draws is scored by rsum; a fixed alpha is compared with 0 and 1.
        keep: data on which BASE should stay good: captioned images, scored in the same way, or images with
            classes as for `evaluate zero-shot`, scored by top-1 accuracy on the val split (if there is none,
            on all images that are not in the test split).
        json: print one JSON object instead.
    """
    if data is None and (alpha == "auto" or keep):
        raise UserError("--alpha auto and --keep score models on held-out images; give --data ROOT as well")
    if alpha != "auto" and not 0 <= alpha <= 1:
        raise UserError(f"--alpha {alpha}: expected auto, or a fraction from 0 to 1")
    from clip_lightning.experiments.merge import ALPHAS, Merger, choose, held_out
    from clip_lightning.files import write_atomically, write_json
    from clip_lightning.model.bundle import files_to_keep
    from clip_lightning.model.encode import best_device
    from clip_lightning.model.merge import load_for_merge
    from clip_lightning.reports.plots import plot_merge

    files_to_keep(out)  # refuse a folder before anything is computed
    places = {name: place for name, place in (("data", data), ("keep", keep)) if place}
    sets = {name: held_out(place, classes=name == "keep") for name, place in places.items()}
    clip, first, last = load_for_merge(base, tuned)
    alphas = ALPHAS if alpha == "auto" else sorted({0, alpha, 1})
    merger = Merger(clip.to(best_device()), first, last, sets)
    points = [merger.score(alpha) for alpha in alphas] if sets else []
    alpha, reason = choose(points) if alpha == "auto" else (alpha, f"alpha {alpha:g}, as given")
    merger.load(alpha)
    record = {"base": base, "tuned": tuned, "alpha": alpha, **places}
    clip.save_pretrained(out, metadata=record)
    scores = next((point for point in points if point["alpha"] == alpha), {})
    record |= {"out": str(out.resolve()), "reason": reason, "scores": scores, "curve": points}
    write_json(out / "merge.json", record)
    (out / "merge.png").unlink(missing_ok=True)
    if points:
        write_atomically(out / "merge.png", plot_merge(points, {n: s.metric for n, s in sets.items()}, alpha))
    print_result(record, f"{reason}\nwrote {out}", json)
