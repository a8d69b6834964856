"""A dataset as a config says it: its splits with the nouns they are asked by, and its check."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from tqdm import tqdm
from transformers import Sam3ImageProcessor

from helpers.checks.boxes_and_masks import check_annotations
from helpers.checks.findings import SEVERITIES, Finding, Report
from helpers.checks.images import check_images, check_leakage
from helpers.checks.words import check_categories, check_prompts, check_splits_agree
from helpers.data.coco import COCO_FILE, find_splits, read_split
from helpers.data.dataset import PromptCollator, PromptDataset, join_queries
from helpers.data.records import refuse_unknown_categories, rename_categories
from helpers.errors import InputError
from helpers.files import resolve

MIN_KEPT = 0.99  # share of the objects in the files that must reach the loss


def check_dataset(
    data_dir,
    *,
    resolution,
    mask_size,
    processor=None,
    num_queries=200,
    prompt=None,
    prompts_by_category=None,
    num_negatives=0,
    negative_prompts=(),
    layout=None,
    disable_progress=False,
):
    """Look for every fault of a dataset that makes a fine-tuned SAM3 detect nothing.

    Parameters
    ----------
    data_dir : str or os.PathLike
        A folder with one folder per split.
    resolution : int
        Side of the model's square input in pixels.
    mask_size : int
        Cells per side of its mask grid.
    processor : transformers.Sam3Processor, optional
        The one training will use. Without it images are prepared by a default image processor and
        prompts are not turned into tokens.
    num_queries : int
        Objects the model can find per prompt.
    prompt, num_negatives, negative_prompts
        As in `helpers.data.dataset.PromptDataset`.
    prompts_by_category : dict of str to str, optional
        Nouns the categories are asked by, see `helpers.data.records.rename_categories`.
    layout : {"coco", "per_image"}, optional
        As in `helpers.data.coco.read_split`.
    disable_progress : bool
        True for no progress bar on stderr.

    Returns
    -------
    Report
        Errors first. Codes, severities and the rows of the cause catalogue are in
        `helpers.checks.findings.CODES`.

    Raises
    ------
    InputError
        If the folder is missing or holds no split, or ``prompts_by_category`` names a category
        that no split has. Anything wrong inside a split is a finding.
    """
    names = find_splits(data_dir)
    splits, unreadable = _read_splits(data_dir, names, layout)
    prompts_by_category = prompts_by_category or {}
    refuse_unknown_categories(prompts_by_category, list(splits.values()))
    findings, counts, seen = _missing_splits(names, data_dir) + unreadable, {}, {}
    settings = {
        "resolution": resolution,
        "mask_size": mask_size,
        "prompt": prompt,
        "num_negatives": num_negatives,
        "negative_prompts": negative_prompts,
    }
    for name, as_read in splits.items():
        split = splits[name] = rename_categories(as_read, prompts_by_category)
        findings += check_annotations(split, mask_size=mask_size, num_queries=num_queries)
        loaded, seen[name], counts[name] = _check_loading(
            split, processor, settings, disable_progress
        )
        findings += check_categories(split) + loaded
    findings += check_splits_agree(splits) + check_leakage(splits, seen)
    return Report(resolve(data_dir), tuple(sorted(findings, key=_by_urgency)), counts)


def _read_splits(data_dir, names, layout):
    """Read every split that can be read; returns them by name, and a finding for each other one."""
    splits, findings = {}, []
    for name in names:
        try:
            splits[name] = read_split(data_dir, name, layout)
        except InputError as error:
            findings.append(
                Finding("D03_UNREADABLE", error.where or name, error.message, error.fix)
            )
    return splits, findings


def _by_urgency(finding):
    """Put errors first, and lost objects behind the errors that they follow from."""
    is_consequence = finding.code == "D02_OBJECTS_LOST"
    return SEVERITIES.index(finding.severity), is_consequence, finding.code


def _check_loading(split, processor, settings, disable_progress):
    """Return the findings of one split's images and prompts, the images seen, and its counts."""
    findings, seen, queries = _open_and_load(split, processor, settings, disable_progress)
    counts = _counts(split, queries)
    findings = findings + check_objects_arrive(split, counts)
    if queries:
        absent = counts["absent_queries"]
        nouns = settings["negative_prompts"]
        findings += check_prompts(split, absent, settings["num_negatives"], nouns)
    return findings, seen, counts


def _missing_splits(names, data_dir):
    """Report the usual splits that a dataset lacks."""
    findings = []
    if "train" not in names:
        findings.append(
            Finding(
                "D04_NO_TRAIN_SPLIT",
                str(resolve(data_dir)),
                f"there is no folder 'train' with annotations, only {', '.join(names)}",
                f"put the training images with {COCO_FILE} into 'train'",
            )
        )
    for name in ("valid", "test"):
        if name not in names:
            findings.append(
                Finding(
                    "D05_MISSING_SPLIT",
                    str(resolve(data_dir)),
                    f"there is no folder '{name}' with annotations",
                    "set images of other scenes aside, or nothing can be measured on it",
                )
            )
    return findings


def _open_and_load(split, processor, settings, disable_progress):
    """Open every image by itself and then through the real dataset; one progress bar for both.

    Returns
    -------
    findings : list of Finding
        From both passes.
    images : list of helpers.checks.images.SeenImage
        From `helpers.checks.images.check_images`.
    queries : list of (dict, dict)
        From `_load_all`.
    """
    collate = PromptCollator(processor) if processor else join_queries
    processor = processor or SimpleNamespace(image_processor=Sam3ImageProcessor())
    total = 2 * len(split.records)
    with tqdm(total=total, desc=f"check {split.name}", disable=disable_progress) as bar:
        findings, images = check_images(split, bar)
        seen = {place.path for finding in findings for place in finding.places}
        dataset, refusal = _real_dataset(split, processor, **settings)
        queries, loading = _load_all(dataset, collate, seen, bar) if dataset else ([], refusal)
        bar.update(total - bar.n)
    return findings + loading, images, queries


def _real_dataset(split, processor, **settings):
    """Build the dataset training would use; None and a finding if it refuses the split."""
    try:
        return PromptDataset(split, processor, **settings), []
    except InputError as error:
        if not split.records:  # reported as D06_EMPTY_SPLIT
            return None, []
        where = error.where or split.name
        return None, [Finding("D09_LOADER_REFUSES", where, error.message, error.fix)]


def _load_all(dataset, collate, seen, bar):
    """Pass every image through the real dataset and collate.

    Parameters
    ----------
    dataset : PromptDataset
        As training would use it.
    collate : callable
        A `PromptCollator` or `helpers.data.dataset.join_queries`.
    seen : set of pathlib.Path
        Images already reported; that they fail again is no news.
    bar : tqdm.tqdm
        Advanced by one per image.

    Returns
    -------
    queries : list of (dict, dict)
        Description and target of each query that would reach the loss.
    findings : list of Finding
        ``D09_LOADER_REFUSES``, one per reason.
    """
    queries, findings = [], {}
    for index, record in enumerate(dataset.records):
        bar.update()
        try:
            batch = collate([dataset[index]])
        except InputError as error:
            if record.path not in seen:
                where = error.where or f"{dataset.split.name}/{record.image_id}"
                finding = Finding("D09_LOADER_REFUSES", where, error.message, error.fix)
                findings.setdefault(error.message, finding)
            continue
        queries += zip(batch["queries"], batch["targets"], strict=True)
    return queries, list(findings.values())


def _counts(split, queries):
    """Count what the files of a split hold and what is left of it before the loss."""
    objects = [item for record in split.records for item in record.objects]
    names = Counter(item.category for item in objects)
    return {
        "images": len(split.records),
        "images_without_objects": sum(not record.objects for record in split.records),
        "objects_in_files": len(objects),
        "crowd_objects": sum(item.is_crowd for item in objects),
        "objects_after_collate": sum(len(target["boxes_cxcywh"]) for _, target in queries),
        "masks_after_collate": sum(int(target["mask_valid"].sum()) for _, target in queries),
        "present_queries": sum(query["is_positive"] for query, _ in queries),
        "absent_queries": sum(not query["is_positive"] for query, _ in queries),
        "objects_per_category": {name: names[name] for name in sorted(names)},
    }


def check_objects_arrive(split, counts):
    """Compare the objects in the files with the objects that reach the loss.

    Parameters
    ----------
    split : Split
        For the places.
    counts : dict
        ``objects_in_files``, ``objects_after_collate`` and ``crowd_objects`` of the split.

    Returns
    -------
    list of Finding
        ``D06_EMPTY_SPLIT``, ``D01_NO_OBJECTS``, ``D02_OBJECTS_LOST``.
    """
    total, kept = counts["objects_in_files"], counts["objects_after_collate"]
    if not split.records:
        return [
            Finding(
                "D06_EMPTY_SPLIT",
                str(split.root),
                "the annotations list no image",
                "export the split again, or remove its folder",
            )
        ]
    if total == 0:
        return [
            Finding(
                "D01_NO_OBJECTS",
                str(split.root),
                f"{len(split.records)} images are listed and no object in any of them",
                "look at 'annotations' in the file; training on it teaches to detect nothing",
            )
        ]
    if kept >= MIN_KEPT * total:
        return []
    return [
        Finding(
            "D02_OBJECTS_LOST",
            str(split.root),
            f"{total} objects are in the files, {kept} reach the loss ({kept / total:.1%}); lost "
            f"are {counts['crowd_objects']} crowd regions, boxes without area in the image, and "
            "what is in images that cannot be loaded",
            "mend the other errors of this split; training on it teaches to detect less",
        )
    ]


def read_config_split(config, name, data_dir=None):
    """Read a split with the nouns that its categories are asked by.

    Parameters
    ----------
    config : helpers.config.Config
        For ``data.data_dir`` and ``data.prompts_by_category``.
    name : str
        Name of the split.
    data_dir : os.PathLike, optional
        Another dataset.

    Returns
    -------
    helpers.data.records.Split
        See `helpers.data.records.rename_categories`.

    Raises
    ------
    InputError
        See `helpers.data.coco.read_split`.
    """
    data = config.data
    split = read_split(data.data_dir if data_dir is None else data_dir, name)
    return rename_categories(split, data.prompts_by_category)


def check_config_data(config, model=None, processor=None, *, data_dir=None, disable_progress=False):
    """Check the dataset of a config with the prompts, nouns and sizes that its training uses.

    Parameters
    ----------
    config : helpers.config.Config
    model : helpers.model.prompted.PromptedSam3, optional
        Its base. Without it the sizes are those of a SAM3 at ``model.resolution``.
    processor : transformers.Sam3Processor, optional
        Of the base, see `helpers.checks.dataset.check_dataset`.
    data_dir : os.PathLike, optional
        Another dataset.
    disable_progress : bool
        True for no progress bar on stderr.

    Returns
    -------
    helpers.checks.findings.Report

    Raises
    ------
    InputError
        See `helpers.checks.dataset.check_dataset`.
    """
    data = config.data
    sizes = {
        "resolution": config.model.resolution,
        "mask_size": config.model.resolution // 14 * 4,
    }
    if model is not None:
        num_queries = model.config.detr_decoder_config.num_queries
        sizes = {"resolution": model.resolution, "mask_size": model.mask_size}
        sizes |= {"num_queries": num_queries}
    return check_dataset(
        data.data_dir if data_dir is None else data_dir,
        **sizes,
        processor=processor,
        prompt=data.prompt,
        prompts_by_category=data.prompts_by_category,
        num_negatives=data.num_negatives,
        negative_prompts=data.negative_prompts,
        disable_progress=disable_progress,
    )
