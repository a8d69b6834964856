"""What single lessons need besides the pipeline: broken copies, a silent detector, tables, lines."""

import math
import re
import shutil
import textwrap
import zlib
from collections import Counter
from copy import copy
from dataclasses import replace
from itertools import count
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas.io.formats.style import Styler
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader

from helpers.convert.conversion import convert, read_source
from helpers.data.coco import SPLIT_FOLDERS
from helpers.data.images import open_upright, upright_size
from helpers.data.masks import mask_to_rle, rle_box_xyxy
from helpers.data.records import ImageRecord, true_objects
from helpers.detect.detections import reaches
from helpers.detect.queries import as_query_list, query_of
from helpers.errors import InputError, check_probability
from helpers.files import resolve, write_json
from helpers.lab.spoil import JPEG_QUALITY, SPOIL_DATA
from helpers.model.audit import prompt_embeddings
from helpers.model.losses import WEIGHTS, sam3_losses
from helpers.model.prompted import (
    PRESENCE_LOGIT_CLAMP,
    SCORE_LOGIT_CLAMP,
    base_of,
    loss_inputs,
    model_inputs,
)
from helpers.show.charts import BESIDE, COLOURS, draw_lines, dress, mark_threshold
from helpers.train.report import VERDICTS, checklist, epoch_means

NUM_IMAGES = 8  # of a copy
LINE_WIDTH = 100  # characters that fit beside the prompt of a cell


def write_copy(split, folder, num_images=NUM_IMAGES):
    """Write the first images with objects of a `Split` as a dataset with one split ``train``.

    Returns the folder, replaced if it exists, with one annotation file per image.
    """
    records = [record for record in split.records if record.objects][:num_images]
    if not records:
        fix = "choose a split with annotations"
        raise InputError("no image has an object", where=split.root, fix=fix)
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "annotations"):
        (folder / "train" / name).mkdir(parents=True)
    ids = {entry.name: entry.category_id for entry in split.category_table}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    object_ids = count(1)
    for number, record in enumerate(records, start=1):
        stem = PurePosixPath(record.image_id).with_suffix("").as_posix().replace("/", "_")
        file_name = f"images/{stem}.jpg"
        open_upright(record.path).save(folder / "train" / file_name, quality=JPEG_QUALITY)
        image = {"id": number, "file_name": file_name, "contents": sorted(record.contents)}
        image |= {"width": record.width, "height": record.height}
        entries = []
        for item in record.objects:
            x0, y0, x1, y1 = item.box_xyxy
            entry = {"id": next(object_ids), "image_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            entry |= {"category_id": ids[item.category], "iscrowd": int(item.is_crowd)}
            entries.append(entry if item.rle is None else entry | {"segmentation": dict(item.rle)})
        content = {"images": [image], "categories": categories, "annotations": entries}
        write_json(folder / "train" / "annotations" / f"{stem}.json", content)
    return folder


def write_broken_copy(split, folder, name):
    """Write a copy as `write_copy` does, plant a fault of `SPOIL_DATA` in it, and return the folder."""
    if name not in SPOIL_DATA:
        raise InputError(f"there is no fault {name!r}", fix=f"use one of {', '.join(SPOIL_DATA)}")
    folder = write_copy(split, folder)
    SPOIL_DATA[name](folder)
    return folder


def import_dataset(source, output, *, shares, seed, category=None, tile=None):
    """Convert a dataset into a folder, which is replaced, and divide it unless it has three splits.

    The arguments are those of `helpers.convert.convert`; `shares` of train, valid and test.
    """
    source, output = resolve(source).resolve(), Path(output).resolve()
    if source == output or output in source.parents:
        message = "the source lies in the folder that its conversion replaces"
        raise InputError(message, where=source, fix="copy it to another place")
    splits = read_source(source, category=category).splits
    split = None if set(SPLIT_FOLDERS) <= set(splits) else shares
    shutil.rmtree(output, ignore_errors=True)
    return convert(source, output, category=category, split=split, seed=seed, tile=tile)


def lay_out(records, path, columns=3):
    """Lay pictures side by side as one PNG, and return its `ImageRecord` with all their masks.

    Takes pictures of the most frequent size, those with objects first: at most `columns` squared.
    """
    size, _ = Counter((record.width, record.height) for record in records).most_common(1)[0]
    fitting = [record for record in records if (record.width, record.height) == size]
    fitting.sort(key=lambda record: not record.objects)
    columns = min(columns, math.isqrt(len(fitting)))
    chosen, (width, height) = fitting[: columns**2], size
    photograph, objects = Image.new("RGB", (width * columns, height * columns)), []
    for index, record in enumerate(chosen):
        x, y = index % columns * width, index // columns * height
        photograph.paste(open_upright(record.path), (x, y))
        for item in record.objects:
            if item.rle is not None:
                mask = np.zeros(photograph.size[::-1], dtype=bool)
                mask[y : y + height, x : x + width] = coco_mask.decode(item.rle)
                rle = mask_to_rle(mask)
                objects.append(replace(item, rle=rle, box_xyxy=rle_box_xyxy(rle)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph.save(path)
    contents = frozenset().union(*(record.contents for record in chosen))
    return ImageRecord(path.name, path, *photograph.size, tuple(objects), contents)


def open_photograph(path):
    """Return the `ImageRecord` of a photograph of which no annotation is known."""
    path = resolve(path)
    (width, height), _ = upright_size(path)
    return ImageRecord(path.name, path, width, height, ())


def queries_by_category(predictions, record):
    """Set predictions on one image beside the objects of the category that each asked for."""
    queries = []
    for prediction in predictions:
        objects = tuple(item for item in record.objects if item.category == prediction.prompt)
        queries += as_queries([prediction], [replace(record, objects=objects)])
    return queries


@torch.no_grad()
def losses_beside_silence(model, dataset, collator, batch_size=1):
    """Compute the mean loss of a model, put into eval mode, and of one with all scores at the bottom.

    Returns a DataFrame with rows ``model`` and ``silent``, whose highest score is below 1e-9, and columns
    ``native`` and ``early``: the mean of the weighted total over the images of a `PromptDataset`, in
    batches of `batch_size` as the trainer makes them: a batch counts by its images.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = pd.DataFrame(0.0, index=["model", "silent"], columns=list(WEIGHTS))
    for batch in DataLoader(dataset, batch_size, collate_fn=collator):
        num_images = int(batch["image_index"][-1]) + 1
        outputs = loss_inputs(model(**model_inputs(batch, device)))
        for name, detector in (("model", outputs), ("silent", silenced(outputs))):
            for variant in WEIGHTS:
                total = sam3_losses(detector, batch["targets"], variant)["total"]
                sums.loc[name, variant] += total.item() * num_images
    return sums / len(dataset)


def silenced(outputs):
    """Return outputs, a dict for the losses, with all scores at the lowest the model can give."""
    lowest = {"pred_logits": -SCORE_LOGIT_CLAMP, "presence_logits": -PRESENCE_LOGIT_CLAMP}

    def silent(layer):
        return layer | {name: torch.full_like(layer[name], value) for name, value in lowest.items()}

    return silent(outputs) | {"aux": [silent(layer) for layer in outputs["aux"]]}


def logit_heatmap_figure(logits, *, rows="image", limits=None):
    """Draw logits, (n, Q) with n and Q at least 1, as a map of images or steps by queries.

    The colour scale ends at `limits`, by default the smallest and the largest logit.
    """
    logits = np.asarray(logits, dtype=float)
    if logits.ndim != 2 or logits.size == 0:
        raise InputError(f"logits of shape {logits.shape} are no map", fix="pass (n, Q), not empty")
    figure = Figure(figsize=(8, min(1.6 + 0.25 * len(logits), 9)), layout="constrained")
    ax = figure.subplots()
    low, high = limits or (logits.min(), logits.max())
    look = {"cmap": "cividis", "aspect": "auto", "interpolation": "nearest"}
    heatmap = ax.imshow(logits, vmin=low, vmax=high, **look)
    figure.colorbar(heatmap, ax=ax, label=f"logit ({logits.min():.1f} to {logits.max():.1f})")
    ax.set(xlabel="query", ylabel=rows)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return figure


def schedule_frame(configs, num_images, num_processes=1):
    """Compute the optimiser steps of some configs, and how far their warm-up gets.

    Parameters
    ----------
    configs : dict of str to helpers.config.Config
    num_images : int
        Training images with a query.
    num_processes : int

    Returns
    -------
    pandas.DataFrame
        A row per config; ``reached`` is the share of the ``peak`` that the warm-up attains.
    """
    rows = {}
    for name, config in configs.items():
        training = config.training
        per_step = training.batch_size * training.gradient_accumulation_steps * num_processes
        per_epoch = math.ceil(num_images / per_step)
        steps, warmup = per_epoch * config.effective_num_epochs, config.effective_warmup_steps
        rows[name] = {
            "images per step": per_step,
            "epochs": config.effective_num_epochs,
            "steps": steps,
            "warm-up steps": warmup,
            "peak": config.effective_learning_rate,
            "reached": min(steps / warmup, 1.0) if warmup else 1.0,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("config")


@torch.no_grad()
def query_logit_bounds(model, processor, prompts):
    """Compute the range of logits that the frozen scoring head lets each prompt get.

    A data frame with index ``prompt``: ``lowest_dot_product`` and ``highest_dot_product`` over all
    outputs of the decoder's layer norm, and ``lowest_logit`` and ``highest_logit``, the same after
    the model's clamp at -12 and 12. The logit ``a . h + b`` is affine in the decoder state
    ``h = gamma * n + beta``, where ``n`` has mean 0 and a length below ``sqrt(d)``. So LoRA moves
    it only between ``a . beta + b -/+ sqrt(d) |v - mean(v)|`` with ``v = a * gamma``. A native prompt's
    token, which depends on the image, is left out.
    """
    base = base_of(model).eval()
    norm = base.detr_decoder.output_layer_norm
    head = copy(base.dot_product_scoring)
    head.clamp_logits = False
    tokens = processor(text=list(prompts), return_tensors="pt").to(base.device)
    mask = tokens["attention_mask"].bool()
    features = base.text_states(tokens["input_ids"], tokens["attention_mask"]).float()
    width = norm.normalized_shape[0]
    probes = torch.cat([torch.zeros(1, width), torch.eye(width)]).to(features)
    offset, *rows = head(probes.expand(1, len(prompts), -1, -1), features, mask)[0, ..., 0].T
    slope = torch.stack(rows) - offset
    tilted = slope * norm.weight[:, None]
    reach = width**0.5 * (tilted - tilted.mean(0)).norm(dim=0)
    middle = norm.bias @ slope + offset
    bounds = {"lowest": (middle - reach).float().cpu(), "highest": (middle + reach).float().cpu()}
    columns = {f"{name}_dot_product": value.tolist() for name, value in bounds.items()}
    for name, value in bounds.items():
        columns[f"{name}_logit"] = value.clamp(-SCORE_LOGIT_CLAMP, SCORE_LOGIT_CLAMP).tolist()
    return pd.DataFrame(columns, index=pd.Index(list(prompts), name="prompt"))


def checklist_frame(run, words=None):
    """Return the `checklist` as a table to show.

    Parameters
    ----------
    run, words
        See `checklist`.

    Returns
    -------
    pandas.DataFrame
        Index ``item``; columns ``document says``, ``measured`` and ``verdict``, of `VERDICTS`.
    """
    table = pd.DataFrame(checklist(run, words)).set_index("item")
    table["passed"] = [VERDICTS[passed] for passed in table["passed"]]
    return table.rename(columns={"expected": "document says", "passed": "verdict"})


def prompt_embedding_change(model, processor, prompts):
    """Compare the embeddings of prompts with the adapter of a `peft.PeftModel` on and off.

    A data frame with index ``prompt``: ``relative_change``, the length of the difference over the
    length without adapter; ``cosine`` of the two; ``nearest`` and ``nearest_cosine``, the most
    similar other prompt with the adapter on.
    """
    tuned = prompt_embeddings(model, processor, prompts)
    with model.disable_adapter():
        plain = prompt_embeddings(model, processor, prompts)
    cosines = cosine_similarity(tuned[:, None], tuned[None], dim=-1)
    cosines.fill_diagonal_(-torch.inf)
    nearest_cosine, nearest = cosines.max(1)
    has_other = len(prompts) > 1
    return pd.DataFrame(
        {
            "relative_change": ((tuned - plain).norm(dim=1) / plain.norm(dim=1)).tolist(),
            "cosine": cosine_similarity(tuned, plain).tolist(),
            "nearest": [prompts[i] if has_other else None for i in nearest.tolist()],
            "nearest_cosine": nearest_cosine.tolist() if has_other else [float("nan")],
        },
        index=pd.Index(list(prompts), name="prompt"),
    )


def as_queries(predictions, records):
    """Set predictions on the files of some records beside their objects: list of `Query`.

    Every annotated object counts as what the prompt asked for, whatever its category.
    """
    by_path = {str(record.path): record for record in records}
    queries = []
    for prediction in predictions:
        record = by_path.get(prediction.image)
        if record is None:
            fix = "pass the records of its split"
            raise InputError("no record of this image", where=prediction.image, fix=fix)
        queries.append(query_of(prediction, prediction.detections, record, true_objects(record)))
    return queries


def prompt_scores(queries, score_threshold):
    """Summarise the highest score of every query, by prompt and by whether it is present.

    A data frame with index ``prompt`` and ``shown`` ("present" or "absent"): ``images``, the means
    ``presence``, ``max query`` and ``max score``, and ``reached``, the share of the images whose
    highest score reaches the threshold.
    """
    check_probability(score_threshold, "score_threshold")
    rows = []
    for query in as_query_list(queries):
        shown = "present" if query.is_positive else "absent"
        reached = float(reaches(query.max_score, score_threshold))
        highest = (query.presence_prob, query.max_query_prob, query.max_score)
        rows.append((query.prompt, shown, *highest, reached))
    names = ["prompt", "shown", "presence", "max query", "max score", "reached"]
    groups = pd.DataFrame(rows, columns=names).groupby(["prompt", "shown"])
    summary = groups.mean()
    summary.insert(0, "images", groups.size())
    return summary.sort_index(level=["shown", "prompt"], ascending=[False, True])


def score_histogram_figure(present, absent, score_threshold=None):
    """Draw the highest scores in [0, 1], (n,) each, of present and of absent prompts."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    ax = figure.subplots()
    for name, scores, colour, hatch, alpha in (
        ("present", present, COLOURS[0], "", 0.35),
        ("absent", absent, COLOURS[1], "..", 0),
    ):
        label = f"prompt {name} ({len(scores)} questions)"
        look = {"edgecolor": colour, "facecolor": (colour, alpha), "hatch": hatch, "linewidth": 1.8}
        ax.hist(scores, np.linspace(0, 1, 21), histtype="stepfilled", label=label, **look)
    mark_threshold(ax, score_threshold)
    dress(ax, "highest score", "questions")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(**BESIDE)
    return figure


def runs_figure(histories, names):
    """Draw logged numbers of several runs by epoch; losses on a logarithmic axis.

    Parameters
    ----------
    histories : dict of str to list of dict
        Name of a run to its ``trainer.state.log_history``.
    names : dict of str to str
        Logged name, for example ``"eval_AP50"``, to the label of its axis; one panel each.
    """
    figure = Figure(figsize=(1 + 3.4 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        means = {run: pd.Series(epoch_means(log, name)) for run, log in histories.items()}
        log = name.endswith("loss")
        draw_lines(ax, pd.DataFrame(means), list(means), xlabel="epoch", ylabel=label, log=log)
        if len(histories) == 1:
            ax.get_legend().remove()
    return figure


def absent_words(words, split):
    """Return words to ask as absent: list of str; say so if nothing tells what a picture shows."""
    if not any(record.contents for record in split.records):
        print_wrapped(
            f"The annotations of {split.name} do not say what else is in a picture, so look whether "
            f"these are really absent: {', '.join(words)}. What is in it counts as a false alarm."
        )
    return list(words)


def print_wrapped(*lines):
    """Print lines of at most `LINE_WIDTH` characters.

    Parameters
    ----------
    *lines : str
        The rest of a longer one goes below it, indented.
    """
    for line in lines:
        indent = re.match(r"\s*(?:- |\d+\. )?", line).end() or 3
        settings = {"subsequent_indent": " " * indent, "break_on_hyphens": False}
        print(textwrap.fill(line, LINE_WIDTH, **settings))


def show_table(table, digits=2):
    """Show a table in which long texts wrap and stand at the left.

    Parameters
    ----------
    table : pandas.DataFrame
    digits : int
        Decimals of the numbers that are not integers.
    """
    plain = table.to_string(float_format=f"{{:.{digits}f}}".format, na_rep="-")
    uuid = f"{zlib.crc32(plain.encode()):08x}"  # the same in every run, unlike that of pandas
    styled = Styler(table, precision=digits, na_rep="-", escape="html", uuid=uuid, cell_ids=False)
    for axis in (0, 1):
        styled.format_index(escape="html", axis=axis)
    kinds = enumerate(table.dtypes)
    texts = [f".col{place}" for place, kind in kinds if not pd.api.types.is_numeric_dtype(kind)]
    look = "text-align: left; white-space: pre-wrap; vertical-align: top"
    selectors = [".row_heading", ".index_name", *texts]
    styled.set_table_styles([{"selector": ", ".join(selectors), "props": look}])
    styled.set_table_attributes('class="dataframe"')
    display({"text/html": styled.to_html(), "text/plain": plain}, raw=True)
