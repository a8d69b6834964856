"""The picture in the README, drawn from a finished course: ``python -m helpers.result_picture``.

One test image three times: as annotated, as the failing run of notebook 02 answers, and as the fixed
run of notebook 04 answers. The image is not chosen by hand: it is the first of the test split that
shows an object and, where the annotations say so, something else as well.
"""

from __future__ import annotations

import argparse
import io
import sys

from PIL import Image

from helpers.config_data import read_config_split
from helpers.errors import InputError
from helpers.overlays import annotate_detections
from helpers.paths import ROOT, RUNS, resolve
from helpers.plots import gallery_figure
from helpers.prediction import Predictor
from helpers.run_folder import load_run

FAILING_RUN = "02_reproduce_zero_detections/failing_run"
FIXED_RUN = "04_train/adapter"
PICTURE = ROOT / "notebooks" / "figures" / "failure_and_remedy.png"
MAX_BYTES = 200_000
_DPI = 100
_NUM_COLOURS = (256, 128, 64, 32)


def choose_record(split):
    """Return the image to show.

    Parameters
    ----------
    split : helpers.records.Split

    Returns
    -------
    helpers.records.ImageRecord
        The first with an object and ``contents``, else the first with an object.

    Raises
    ------
    InputError
        If no image has an object.
    """
    with_objects = [record for record in split.records if record.objects]
    if not with_objects:
        raise InputError("no image has an object", where=split.root, fix="use another dataset")
    return next((record for record in with_objects if record.contents), with_objects[0])


def result_figure(record, runs, score_threshold):
    """Draw the annotation of an image and the answer of each run.

    Parameters
    ----------
    record : helpers.records.ImageRecord
        With at least one object; the category of the first one is the prompt.
    runs : dict of str to helpers.run_folder.RunResult
        By the name to show.
    score_threshold : float
        In [0, 1].

    Returns
    -------
    matplotlib.figure.Figure
        One row.
    """
    prompt = record.objects[0].category
    wanted = tuple(item for item in record.objects if item.category == prompt)
    panels = [(record.path, wanted, f'annotated: {len(wanted)} × "{prompt}"')]
    for name, run in runs.items():
        predictor = Predictor(run.model, run.processor)
        [answer] = predictor.predict(record.path, prompt, score_threshold)
        caption = f"{name}: {len(answer.detections)} found, max score {answer.max_score:.3f}"
        panels.append((annotate_detections(record.path, answer.detections), (), caption))
    return gallery_figure(panels, columns=len(panels))


def save_small_png(figure, path, max_bytes=MAX_BYTES):
    """Write a figure as PNG with a palette, with fewer colours until it is small enough.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : pathlib.Path
        Its folder is made if need be.
    max_bytes : int
        Largest size of the file.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    InputError
        If 32 colours are still too large.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    picture = Image.open(stream).convert("RGB")
    for colours in _NUM_COLOURS:
        encoded = io.BytesIO()
        reduced = picture.quantize(colours, dither=Image.Dither.NONE)
        reduced.save(encoded, format="png", optimize=True)
        if encoded.tell() <= max_bytes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded.getvalue())
            return encoded.tell()
    raise InputError(
        f"the picture takes {encoded.tell()} bytes, {max_bytes} are allowed", where=path
    )


def main(arguments=None):
    """Draw the picture of a finished course.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program name.

    Returns
    -------
    int
        0 done, 2 unusable input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.result_picture", description="Draw the picture in the README."
    )
    parser.add_argument(
        "--course", type=resolve, default=RUNS / "course", help="folder (default runs/course)"
    )
    parser.add_argument("--output", type=resolve, default=PICTURE, help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        runs = {
            "failing run": load_run(options.course / FAILING_RUN),
            "fixed run": load_run(options.course / FIXED_RUN),
        }
        config = runs["fixed run"].config
        record = choose_record(read_config_split(config, "test"))
        figure = result_figure(record, runs, config.evaluation.score_threshold)
        size = save_small_png(figure, options.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {record.image_id}, {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
