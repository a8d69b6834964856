"""The check of a whole dataset: every split, its files, and what of it reaches the loss."""

from collections import Counter

from helpers.checks.boxes_and_masks import check_annotations
from helpers.checks.findings import SEVERITIES, Finding, Report, finding_of
from helpers.checks.images import check_images, check_leakage
from helpers.checks.words import check_categories, check_prompts, check_splits_agree
from helpers.data.dataset import PromptCollator, PromptDataset, model_sizes
from helpers.data.images import same_shape
from helpers.data.records import refuse_unknown_categories
from helpers.errors import InputError
from helpers.files import progress_bar

NUM_QUERIES = 200  # objects that SAM3 can find per prompt
_QUERY_COUNTS = "objects_after_collate", "masks_after_collate", "present_queries", "absent_queries"
_LOST = "D02_OBJECTS_LOST"
MIN_KEPT = 0.99  # share of the objects in the files that must reach the loss


def check_dataset(dataset, model=None, processor=None):
    """Look for every fault of a dataset that makes a fine-tuned SAM3 detect nothing.

    Parameters
    ----------
    dataset : helpers.data.dataset.Dataset
        Its config says which prompts and nouns are asked. Each image is decoded once and stays
        described in its ``pictures``.
    model : helpers.model.prompted.PromptedSam3, optional
        Its base. Without it the sizes are those of a SAM3 at ``model.resolution`` of the config.
    processor : transformers.Sam3Processor, optional
        Of the base. Without it prompts are not turned into tokens.

    Returns
    -------
    Report
        Errors first. Codes and severities are in `helpers.checks.findings.CODES`.
    """
    splits, findings, counts = {}, [], {}
    for name in dataset.names:
        try:
            splits[name] = dataset.split(name)
        except InputError as error:
            findings.append(_refusal("D03_UNREADABLE", error, name))
    refuse_unknown_categories(dataset.config.data.prompts_by_category, [*dataset.read.values()])
    if "train" not in dataset.names:
        names = ", ".join(dataset.names)
        findings.append(finding_of("D04_NO_TRAIN_SPLIT", dataset.root, names=names))
    for name in (name for name in ("valid", "test") if name not in dataset.names):
        findings.append(finding_of("D05_MISSING_SPLIT", dataset.root, name=name))
    mask_size = model_sizes(dataset.config, model)[1]
    num_queries = NUM_QUERIES if model is None else model.config.detr_decoder_config.num_queries
    with progress_bar(sum(len(split.records) for split in splits.values()), "check") as bar:
        for split in splits.values():
            dataset.look(split, bar)
    for name, split in splits.items():
        findings += check_annotations(split, mask_size=mask_size, num_queries=num_queries)
        findings += check_images(split, dataset.pictures)
        findings += check_categories(split)
        loading, counts[name] = _check_loading(dataset, split, model, processor)
        findings += loading
    findings += check_splits_agree(splits) + check_leakage(splits, dataset.pictures)
    # Errors first, and lost objects behind the errors that they follow from.
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), f.code == _LOST, f.code))
    return Report(dataset.root, tuple(findings), counts)


def _check_loading(dataset, split, model, processor):
    """Return the findings of the queries that training would make of a split, and its counts."""
    data, findings, queries = dataset.config.data, [], Counter()
    try:
        prompts = PromptDataset.from_config(dataset.config, split, model)
        queries, findings = _count_queries(prompts, dataset.pictures, processor)
    except InputError as error:
        if split.records:  # without any it is reported as D06_EMPTY_SPLIT
            findings = [_refusal("D09_LOADER_REFUSES", error, split.name)]
    counts = _counts(split, queries)
    findings += _check_objects_arrive(split, counts)
    if queries:
        absent = queries["absent_queries"]
        findings += check_prompts(split, absent, data.num_negatives, data.negative_prompts)
    return findings, counts


def _refusal(code, error, where):
    return Finding(code, error.where or where, error.message, error.fix)


def _count_queries(prompts, pictures, processor):
    """Count what of a `PromptDataset` reaches the loss, without pixels; find refusals: D09."""
    counts, findings, problems = Counter(), {}, {}
    for noun in () if processor is None else prompts.nouns:
        try:
            PromptCollator(processor).tokenize([noun])
        except InputError as error:
            problems[noun] = error
    for index, record in enumerate(prompts.records):
        size = pictures[record.path].size
        if size is None or not same_shape(size, (record.width, record.height)):
            continue  # reported by the check of images
        queries = prompts.targets(index, 0)
        refused = [query["prompt"] for query in queries if query["prompt"] in problems]
        if refused:
            error, where = problems[refused[0]], f"{prompts.split.name}/{record.image_id}"
            findings.setdefault(error.message, _refusal("D09_LOADER_REFUSES", error, where))
        for query in () if refused else queries:
            counts["objects_after_collate"] += len(query["boxes_cxcywh"])
            counts["masks_after_collate"] += int(query["mask_valid"].sum())
            counts["present_queries" if query["is_positive"] else "absent_queries"] += 1
    return counts, list(findings.values())


def _counts(split, queries):
    """Count what the files of a split hold and what is left of it before the loss."""
    objects = [item for record in split.records for item in record.objects]
    names = Counter(item.category for item in objects)
    return {
        "images": len(split.records),
        "images_without_objects": sum(not record.objects for record in split.records),
        "objects_in_files": len(objects),
        "crowd_objects": sum(item.is_crowd for item in objects),
        **{key: queries[key] for key in _QUERY_COUNTS},
        "objects_per_category": {name: names[name] for name in sorted(names)},
    }


def _check_objects_arrive(split, counts):
    """Compare the objects in the files with those that reach the loss: D06, D01, D02."""
    total, arrived = counts["objects_in_files"], counts["objects_after_collate"]
    if not split.records:
        return [finding_of("D06_EMPTY_SPLIT", split.root)]
    if total == 0:
        return [finding_of("D01_NO_OBJECTS", split.root, images=len(split.records))]
    if arrived >= MIN_KEPT * total:
        return []
    values = {"total": total, "arrived": arrived, "share": arrived / total}
    return [finding_of(_LOST, split.root, crowds=counts["crowd_objects"], **values)]
