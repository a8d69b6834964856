"""The report of a run as one page: numbers, pictures behind a slider, mistakes, what was kept."""

import sys
from dataclasses import replace

import numpy as np

from helpers.detect.metrics import coco_ap, evaluate_queries, threshold_sweep
from helpers.detect.mistakes import KINDS, content_matrix, mistake_table, reliability_table
from helpers.detect.thresholds import TAILS, choose_thresholds, read_thresholds
from helpers.errors import InputError
from helpers.files import progress_bar
from helpers.show.explorer import explorer_panel
from helpers.show.page import data_uri, render_page
from helpers.show.pictures import TRUTH_COLOUR, annotate
from helpers.train.report import VERDICTS, checklist

NUM_RESAMPLES = 200
NUM_SUSPECTS = 12  # labels to look at
SUSPECT_SIDE = 260  # of their pictures, in pixels
FROM_SWEEP = {"precision": "precision", "recall": "recall", "f1": "F1"}


def report_page(run, split, answers, *, validation, commands, retention=None, diagnosis=None):
    """Return a page about a run that needs no other file and no network.

    Parameters
    ----------
    run : helpers.train.run.RunFiles
    split : helpers.data.Split
        Pictures that the run was not trained on.
    answers : dict of str to dict of float to list of Query
        Name of a model to its answers, see `explorer_panel`; the run itself comes first.
    validation : list of Query
        Of the run on its validation split, where thresholds are chosen.
    commands : list of str
        How the page was made.
    retention : dict, optional
        From `helpers.detect.retention`, with ``why`` of its words.
    diagnosis : dict, optional
        ``Diagnosis.parts()``.
    """
    settings = run.config.evaluation
    threshold, mask = settings.score_threshold, settings.mask_threshold
    queries = {name: by_mask[mask] for name, by_mask in answers.items()}
    contents = {record.image_id: record.contents for record in split.records}
    own = next(iter(queries.values()))
    marks = {"validation": validation, "calibrated": read_thresholds(run.folder, is_needed=False)}
    panel = explorer_panel(answers, split, score_threshold=threshold, **marks)
    mistakes = mistake_table(own, threshold)
    try:
        thresholds, no_thresholds = choose_thresholds(validation), None
    except InputError as error:
        thresholds, no_thresholds = None, str(error)
    matrices = {name: content_matrix(q, threshold, contents) for name, q in queries.items()}
    return render_page(
        "report",
        run=run,
        split=split,
        threshold=threshold,
        headlines={name: headline(q, threshold) for name, q in queries.items()},
        thresholds=thresholds,
        no_thresholds=no_thresholds,
        matrices=matrices,
        kinds=KINDS,
        counts=mistakes["kind"].value_counts(),
        suspects=_suspects(mistakes, split),
        reliability=reliability_table(mistake_table(own, 0.0)),
        retention=retention,
        checklist=checklist(run),
        verdicts=VERDICTS,
        diagnosis=diagnosis,
        commands=commands,
        config=run.config.to_yaml(),
        **panel.parts(),
    )


def headline(queries, score_threshold, num_resamples=NUM_RESAMPLES):
    """Return metric to (value, low, high): 95 % bootstrap intervals over pictures; None where undefined."""
    by_image = {}
    for query in queries:
        by_image.setdefault(query.image_id, []).append(query)
    rng, names = np.random.default_rng(0), list(by_image)
    samples = []
    bar = {"disable": not sys.stderr.isatty()}
    with progress_bar(num_resamples, "intervals", **bar) as bar:
        for _ in range(num_resamples):
            drawn = enumerate(rng.choice(len(names), len(names)))
            sample = [
                replace(query, image_id=(copy, query.image_id))
                for copy, number in drawn
                for query in by_image[names[number]]
            ]
            samples.append(_numbers(sample, score_threshold))
            bar.update()
    metrics = evaluate_queries(queries, score_threshold)
    result = {"AP50": metrics["AP50"], "cgF1": metrics["cgF1"]} | _numbers(queries, score_threshold)
    intervals = {}
    for name, value in result.items():
        known = [sample[name] for sample in samples if sample.get(name) is not None]
        intervals[name] = (value, *(np.quantile(known, TAILS) if known else (None, None)))
    return intervals


def _numbers(queries, score_threshold):
    row = threshold_sweep(queries, [score_threshold]).iloc[0]
    numbers = {title: row[name] for name, title in FROM_SWEEP.items()}
    numbers = {name: None if np.isnan(value) else float(value) for name, value in numbers.items()}
    return numbers | {"AP50": coco_ap(queries)["AP50"]}


def _suspects(mistakes, split):
    """Show what the model disagrees most with: labels that may be missing, off, or of another word."""
    records = {record.image_id: record for record in split.records}
    unlabelled = mistakes[mistakes["kind"].isin(["background", "wrong word", "place", "mask"])]
    unseen = mistakes[mistakes["kind"] == "missed"].iloc[::-1]
    suspects = []
    for row in [*unlabelled.itertuples(), *unseen.itertuples()][:NUM_SUSPECTS]:
        record = records[row.image_id]
        truth = [item.box_xyxy for item in record.objects]
        picture = annotate(record.path, truth, colour=TRUTH_COLOUR)
        scale = picture.width / record.width
        picture = annotate(picture, [np.array(row.box_xyxy) * scale])
        picture.thumbnail((SUSPECT_SIDE, SUSPECT_SIDE))
        suspects.append({"row": row, "source": data_uri(picture)})
    return suspects
