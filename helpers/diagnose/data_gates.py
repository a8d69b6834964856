"""Gates on the data of a run: annotation files, images, what the loader makes of them, and words."""

from collections import Counter
from itertools import combinations

import numpy as np
import torch
from scipy.stats import binomtest
from torchvision.ops import box_convert, box_iou

from helpers.checks.boxes_and_masks import check_annotations
from helpers.checks.images import check_images, contrast_per_turn
from helpers.checks.words import check_categories, similar_names
from helpers.data.coco import entries_of
from helpers.data.masks import tight_boxes
from helpers.data.records import has_mask
from helpers.detect.predictor import untrained_prompts
from helpers.diagnose.patient import SLIP, Evidence, Inapplicable, evidence_if, gate
from helpers.errors import InputError

CAUSE_OF = {
    **dict.fromkeys(("D08", "D43", "D44", "D70"), "unreadable_data"),
    **dict.fromkeys(("D20", "D21", "D22"), "boxes_off_masks"),
    **dict.fromkeys(("D40", "D41", "D42"), "not_finite"),
    **{"D10": "objects_filtered", "D50": "tiny_objects", "D71": "annotations_off_image"},
}
"""Finding of a data check to the cause that it speaks for; the others speak for none."""
MIN_SHARE = 0.05  # of objects or images; a fault below it is a slip and explains no detector
MIN_SHARES = {"D08": 0.0, "D70": 0.0, "D50": 0.5}
"""One image that cannot be opened stops the loader; many small objects are normal."""
MIN_READ = 0.99  # share of the objects in the files that the reader must find
MIN_KEPT = 0.95  # share of the objects that reach the loss; below it, lost ones explain a detector
MIN_MASK_SHARE = 0.5  # of the objects; with fewer, hardly any outline is taught
MAX_EMPTY_SHARE = 0.7  # of the training images; healthy: 0.19 (walls), 0.00 (masonry, potholes)
TURNED_BY = 2.0  # times the contrast of the upright images; healthy turns have 0.05 to 0.35 of it
MIN_TURNED_CONTRAST = 0.25  # standard deviations of the rim; healthy turns reach 0.08 to 0.21
MIN_IMAGES = 4  # of fewer, nothing is said
IN_PICTURE = 0.9
"""Score from which the base is believed that a word is in the picture: it gives it to 62 % of those
that are, and of the others to 0.0 % on walls and 1.1 % on photographs, which it never saw."""
MAX_PRESENT_SHARE = 0.02
"""Of the absent prompts, that the base may see in the pictures, as the lower end of a Wilson interval.
Healthy: 0 of 192 (walls), 2 of 189 (masonry), 0 of 162 and 3 of 64 (potholes: stains, a hole)."""
OUTSIDE = 0.05  # of the image, by which a box may leave it
MAX_OUTSIDE = 0.2  # of the boxes; corners read as centres leave the image in half of all cases
BETTER_IOU = 0.2  # by which another reading of the numbers must fit the masks better
BOX_FORMS = {"cxcywh": "(centre, size)", "xyxy": "corners", "xywh": "(corner, size)"}
BASE_SAMPLE = 48  # images, evenly spaced
DATA_GATES, PROMPT_GATES = [], []


@gate(DATA_GATES, "annotation files", "every split can be read, and the reader finds every object")
def _annotation_files(examination):
    texts, evidence = [], []
    for name in examination.split_names:
        try:
            split = examination.split(name)
        except InputError as error:
            evidence.append(Evidence("unreadable_data", 1.0, str(error)))
            texts.append(f"{name}: {error.message}")
            continue
        in_files = sum(len(objects) for _, _, objects, _ in entries_of(split.root, split.layout))
        texts.append(f"{name}: {len(split.records)} images, {in_files} objects in the files")
        if not in_files or split.num_objects < MIN_READ * in_files:
            text = f"the reader finds {split.num_objects} of the {in_files} objects of '{name}'"
            evidence.append(Evidence("no_objects", 1.0, text))
    return "; ".join(texts), evidence


@gate(DATA_GATES, "annotations", "no error of boxes, masks and crowd flags")
def _annotations_alone(examination):
    mask_size, num_queries = examination.sizes
    return _judged(
        (check_annotations(split, mask_size=mask_size, num_queries=num_queries), split.num_objects)
        for split in map(examination.split, examination.split_names)
    )


@gate(DATA_GATES, "image files", "every image opens and has the stated shape")
def _image_files(examination):
    return _judged(
        (check_images(split, examination.dataset.look(split)), len(split.records))
        for split in map(examination.split, examination.split_names)
    )


def _judged(checked):
    """Return text and evidence of pairs, one per split: findings, and the total looked at."""
    texts, evidence = [], []
    for findings, total in checked:
        texts += [f"{one.code[:3]} {one.message}" for one in findings]
        evidence += evidence_of(findings, total)
    return "; ".join(texts) or "nothing found", evidence


def evidence_of(findings, total):
    """Turn findings about one split into evidence, by their share of the total looked at."""
    places_of = [{(place.image_id, place.annotation_id) for place in f.places} for f in findings]
    causes = [CAUSE_OF.get(finding.code[:3]) for finding in findings]
    pairs = zip(causes, places_of, strict=True)
    degenerate = set().union(*(places for cause, places in pairs if cause == "not_finite"))
    evidence = []
    for finding, cause, places in zip(findings, causes, places_of, strict=True):
        if cause != "not_finite":
            places -= degenerate  # a degenerate box does not fit its mask either
        if cause and places:
            share = len(places) / total
            speaks = share >= MIN_SHARES.get(finding.code[:3], MIN_SHARE)
            text = f"{finding.message}: {finding.where}"
            evidence.append(Evidence(cause, 0.9 + 0.1 * share if speaks else SLIP, text))
    return evidence


@gate(DATA_GATES, "annotations on pixels", "marked pixels stand out most on images as they are")
def _annotations_on_pixels(examination):
    records = [record for record in examination.split("train").records if record.objects]
    per_turn = contrast_per_turn(records[:: max(1, len(records) // 32)])
    medians = {
        name: float(np.nanmedian(values)) for name, values in per_turn.items() if len(values)
    }
    if len(records) < MIN_IMAGES or not medians:
        raise Inapplicable(f"fewer than {MIN_IMAGES} images with masks", where=examination.data_dir)
    upright, *turned = medians
    best = max(turned, key=medians.get)
    text = (
        f"marked pixels differ from their rim by {medians[upright]:.2f} standard deviations, on "
        f"images {best} by {medians[best]:.2f}"
    )
    is_turned = medians[best] > max(TURNED_BY * medians[upright], MIN_TURNED_CONTRAST)
    return text, evidence_if(is_turned, "annotations_off_image", 0.95, text)


@gate(DATA_GATES, "images without objects", f"at most {MAX_EMPTY_SHARE:.0%} of those to train on")
def _empty_images(examination):
    records = examination.split("train").records
    empty = sum(not record.objects for record in records)
    text = f"{empty} of {len(records)} training images have no object"
    is_fault = MAX_EMPTY_SHARE * len(records) < empty < len(records)
    return text, evidence_if(is_fault, "mostly_empty", 0.9, text)


@gate(DATA_GATES, "objects after the loader", f"at least {MIN_KEPT:.0%}, each under its prompt")
def objects_after_loader(examination):
    """Count objects in the records against objects in the batches, prompt by prompt."""
    queries = examination.train_queries
    records = _records(queries)
    objects = [item for record in records for item in record.objects]
    crowd = sum(item.is_crowd for item in objects)
    kept = sum(len(target["boxes_cxcywh"]) for _, _, target in queries)
    text = f"{kept} of {len(objects)} objects of {len(records)} images reach the loss"
    if not records:
        text = f"{kept} objects reach the loss in {len(queries)} prompts"
        return text, evidence_if(not kept, "no_objects", 1.0, text)
    denied = Counter()
    for record, query, target in queries:
        items = record.objects if record else ()
        shown = {item.category for item in items if not item.is_crowd}
        if shown:
            shown.add(examination.config.data.prompt)  # what every object is asked by, if set
        if query["prompt"] in shown and not len(target["boxes_cxcywh"]):
            denied[query["prompt"]] += 1
    if crowd < len(objects) and not kept:
        return text, [Evidence("no_objects", 1.0, text)]
    if denied:
        words = ", ".join(f"'{prompt}' on {count} images" for prompt, count in denied.items())
        text = f"{text}; annotated, yet asked without objects: {words}"
        cause = "objects_filtered" if kept < len(objects) - crowd else "merged_categories"
        return text, [Evidence(cause, 1.0, text)]
    if crowd > (1 - MIN_KEPT) * len(objects):
        text = f"{text}; {crowd} are marked as crowd regions and dropped"
        return text, [Evidence("objects_filtered", 1.0, text)]
    return text, evidence_if(kept < MIN_KEPT * len(objects), "objects_filtered", 0.7, text)


def _records(queries):
    """Return the images of some queries, each once, as far as they are known."""
    return {record.image_id: record for record, _, _ in queries if record is not None}.values()


@gate(DATA_GATES, "masks after the loader", "as many as the files hold")
def _masks_after_loader(examination):
    queries = [query for query in examination.train_queries if len(query[2]["boxes_cxcywh"])]
    if not queries:
        raise InputError("no object reaches the loss", where=examination.data_dir)
    if examination.is_live and not examination.trains_masks:
        raise Inapplicable("the targets have no masks, so only boxes and scores are trained")
    total = sum(len(target["boxes_cxcywh"]) for _, _, target in queries)
    masks = sum(int(target["mask_valid"].sum()) for _, _, target in queries)
    items = [(record, item) for record in _records(queries) for item in record.objects]
    in_files = sum(item.rle is not None or item.mask_problem is not None for _, item in items)
    readable = sum(has_mask(record, item) for record, item in items)
    text = f"{masks} of {total} objects reach the loss with a mask"
    if not items:
        has_masks = any(target["masks"].numel() for _, _, target in queries)
        return text, evidence_if(has_masks and masks < MIN_KEPT * total, "masks_lost", 0.9, text)
    text += f"; {readable} have a readable one in the files"
    if masks < MIN_KEPT * min(readable, total):
        return text, [Evidence("masks_lost", 1.0, text)]
    # Unreadable masks are the business of another gate.
    return text, evidence_if(in_files < MIN_MASK_SHARE * total, "masks_lost", 0.8, text)


@gate(DATA_GATES, "box targets", "(centre, size) as fractions of the image, on the masks")
def box_targets(examination):
    """Look at the numbers of the boxes that reach the loss, and lay them on their masks."""
    queries = [query for query in examination.train_queries if len(query[2]["boxes_cxcywh"])]
    if not queries:
        raise InputError("no object reaches the loss", where="batches")
    boxes = torch.cat([target["boxes_cxcywh"] for _, _, target in queries])
    text = f"{len(boxes)} boxes reach from {boxes.min():.3g} to {boxes.max():.3g}"
    if not boxes.isfinite().all():
        return text, [Evidence("not_finite", 1.0, text)]
    if boxes.max() > 1 + OUTSIDE:
        text += ": they are pixels, not fractions"
        return text, [Evidence("wrong_box_targets", 1.0, text)]
    masked = [target for _, _, target in queries if target["mask_valid"].any()]
    if masked:
        written = torch.cat([target["boxes_cxcywh"][target["mask_valid"]] for target in masked])
        tight = torch.cat([tight_boxes(target["masks"][target["mask_valid"]]) for target in masked])
        medians = {
            name: float(box_iou(box_convert(written, form, "xyxy"), tight).diagonal().median())
            for form, name in BOX_FORMS.items()
        }
        best = max(medians, key=medians.get)
        ious = ", ".join(f"as {name} {value:.2f}" for name, value in medians.items())
        text += f"; IoU with their masks (median): {ious}"
        is_fault = medians[best] > medians[BOX_FORMS["cxcywh"]] + BETTER_IOU
        return text, evidence_if(is_fault, "wrong_box_targets", 1.0, text)
    corners = box_convert(boxes, "cxcywh", "xyxy")
    outside = float(((corners < -OUTSIDE) | (corners > 1 + OUTSIDE)).any(1).float().mean())
    text += f"; {outside:.0%} leave the image if the first two numbers are the centre"
    return text, evidence_if(outside > MAX_OUTSIDE, "wrong_box_targets", 0.9, text)


@gate(DATA_GATES, "objects of each prompt", "those of its own category")
def objects_of_prompts(examination):
    """Count prompts that are given objects of other categories, too."""
    texts, total = [], 0
    for record, query, target in examination.train_queries:
        items = record.objects if record else ()
        own = [item for item in items if item.category == query["prompt"]]
        total += bool(own)
        if own and len(own) < len(target["boxes_cxcywh"]):
            texts.append(f"'{query['prompt']}' on {record.image_id}")
    if not total:
        raise Inapplicable("the batches name no picture and category of the dataset")
    text = f"{len(texts)} of {total} prompts are given objects of other categories"
    reason = f"{text}, for example {', '.join(texts[:2])}"
    return text, evidence_if(len(texts) > MIN_SHARE * total, "merged_categories", 1.0, reason)


@gate(PROMPT_GATES, "names", "no category is nearly another, or the parent of one")
def _nearly_the_same_names(examination):
    split = examination.split("train")
    pairs = [
        f"'{first}' and '{second}' share the objects"
        for first, second in combinations(split.used_categories, 2)
        if similar_names(first, second)
    ]
    if pairs:
        return "; ".join(pairs), [Evidence("category_names", 0.9, "; ".join(pairs))]
    # Where both have objects, each is taught to leave those of the other out. A name without objects
    # is never asked beside the other by `helpers.data.records`, and is no cause.
    codes = ("D30_ROOT_CATEGORY", "D31_SIMILAR_NAMES")
    remarks = [finding.message for finding in check_categories(split) if finding.code in codes]
    evidence = [Evidence("category_names", SLIP, remark) for remark in remarks]
    return "; ".join(remarks) or "no category is nearly another", evidence


@gate(PROMPT_GATES, "absent prompts", "each image is asked for other words too")
def _absent_prompts_asked(examination):
    queries = [query for _, query, _ in examination.train_queries]
    absent = [query["prompt"] for query in queries if not query["is_positive"]]
    own = set(examination.own_names)
    others = sum(prompt not in own for prompt in absent)
    text = (
        f"{len(absent)} of {len(queries)} prompts of an epoch are absent ones, {others} of them "
        "other words than the dataset's own"
    )
    is_fault = not absent or (not others and len(own) == 1)
    return text, evidence_if(is_fault, "only_positive_prompts", 0.9 if absent else 1.0, text)


@gate(PROMPT_GATES, "words of the training", "the words asked now were trained")
def trained_and_asked(examination):
    """Compare the words of the training with those asked now."""
    trained = examination.trained_words
    words = [examination.prompt]
    if not examination.prompt:
        words = examination.split("valid").used_categories
    text = f"trained with objects: {', '.join(sorted(trained))}; asked: {', '.join(words)}"
    unknown = untrained_prompts(words, trained)
    if unknown:
        text = f"{text}; never trained with objects: {', '.join(unknown)}"
    return text, evidence_if(unknown, "other_training_prompt", 0.95, text)


@gate(PROMPT_GATES, "absent prompts in pictures", f"the base sees up to {MAX_PRESENT_SHARE:.0%}")
def _absent_prompts_in_pictures(examination):
    by_image = {}
    for record, query, _ in examination.train_queries:
        if not query["is_positive"]:
            name = record and record.image_id
            by_image.setdefault(name, (record, []))[1].append(query["prompt"])
    if not by_image:
        raise Inapplicable("no absent prompt was asked")
    if None in by_image:
        raise Inapplicable("the batches do not name their pictures")
    sample = list(by_image.values())[:: max(1, len(by_image) // BASE_SAMPLE)]
    predictor, seen = examination.predictor(adapted=False), Counter()
    for record, prompts in sample:
        for raw in predictor.raw(record.path, prompts):
            seen[raw.prompt] += raw.max_score > IN_PICTURE
    total = sum(len(prompts) for _, prompts in sample)
    words = ", ".join(f"{word} ({count})" for word, count in seen.most_common(5) if count)
    text = (
        f"the base sees {seen.total()} of {total} absent prompts in {len(sample)} pictures"
        f"{': ' if words else ''}{words}"
    )
    low, _ = binomtest(seen.total(), total).proportion_ci(method="wilson")
    return text, evidence_if(low > MAX_PRESENT_SHARE, "present_negatives", 0.9, text)
