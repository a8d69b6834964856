"""One item per image with all its queries, one query per (image, category), ready for the model."""

from __future__ import annotations

import hashlib
import json

import pandas as pd
import torch
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from helpers.data.images import load_pixels
from helpers.data.masks import clip_box, masks_on_grid, rle_area
from helpers.data.prompts import absent_candidates, absent_prompts, nouns_overlap, present_prompts
from helpers.errors import InputError


def object_targets(objects, record, mask_size):
    """Build what the loss compares n objects of one image with.

    Parameters
    ----------
    objects : list of ObjectAnnotation
        Each with a box that keeps an area inside the image.
    record : ImageRecord
        The image; its size normalises the boxes.
    mask_size : int
        Cells per side of the mask grid.

    Returns
    -------
    dict
        ``boxes_cxcywh`` float32 ``(n, 4)`` in [0, 1], clipped to the image; ``masks`` uint8
        ``(n, mask_size, mask_size)``; ``mask_valid`` bool ``(n,)``, False for an object without a
        mask of this image's size that has a pixel in it, whose ``masks`` are zero.
    """
    boxes_xyxy = [clip_box(item.box_xyxy, record.width, record.height) for item in objects]
    scale = torch.tensor([record.width, record.height, record.width, record.height])
    boxes_cxcywh = box_convert(
        torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4) / scale, "xyxy", "cxcywh"
    )
    valid = [mask_fits_image(record, item) and rle_area(item.rle) > 0 for item in objects]
    masks = torch.zeros((len(objects), mask_size, mask_size), dtype=torch.uint8)
    rles = [item.rle for item, usable in zip(objects, valid, strict=True) if usable]
    mask_valid = torch.tensor(valid, dtype=torch.bool)
    masks[mask_valid] = masks_on_grid(rles, mask_size)
    return {"boxes_cxcywh": boxes_cxcywh, "masks": masks, "mask_valid": mask_valid}


def mask_fits_image(record, item):
    """Tell whether an object has a mask of the size of its image.

    Parameters
    ----------
    record : ImageRecord
        The image.
    item : ObjectAnnotation
        An object in it.

    Returns
    -------
    bool
        False without a readable mask.
    """
    return item.rle is not None and list(item.rle["size"]) == [record.height, record.width]


def data_fingerprint(split):
    """Return 16 hex digits of the SHA-256 of a split's images and annotations.

    Parameters
    ----------
    split : helpers.data.records.Split

    Returns
    -------
    str
        The same wherever the split's folder lies and in either layout. It changes with any byte of
        an image, any box, mask, category or known content, and with the name of a file. The cost
        is that of reading the files once.

    Raises
    ------
    OSError
        If an image cannot be read.
    """
    digest = hashlib.sha256()
    for record in split.records:
        objects = [
            [
                item.category,
                item.box_xyxy,
                item.is_crowd,
                None if item.rle is None else dict(item.rle),
            ]
            for item in record.objects
        ]
        size = [record.width, record.height]
        described = [record.image_id, size, sorted(record.contents), objects]
        digest.update(json.dumps(described, sort_keys=True).encode("utf-8"))
        with record.path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


MAX_TOKENS = 32  # context of SAM3's text encoder; its processor would cut or fail beyond it


class PromptDataset(Dataset):
    """The images of a split with their prompts and targets.

    Parameters
    ----------
    split : Split
        From `helpers.data.coco.read_split`.
    processor : transformers.Sam3Processor
        Its ``image_processor`` resizes to a square, rescales and normalises.
    resolution : int
        Side of the square input in pixels.
    mask_size : int
        Cells per side of the grid the model predicts masks on.
    prompt : str, optional
        Replaces every category name; one query then gets all objects of the image.
    num_negatives : int
        Absent prompts per image, see `helpers.data.prompts.absent_prompts`.
    negative_prompts : sequence of str
        Nouns to draw absent prompts from, beside the dataset's own absent categories. One that is
        annotated in the image or listed in its ``contents`` is never drawn.
    seed : int
        For the draw.
    resample_negatives : bool
        True draws anew in each epoch (`set_epoch`), False always draws the same.
    backbone_cache : helpers.model.cache.BackboneCache, optional
        Filled with the images of the split; its features then take the place of the pixels.

    Attributes
    ----------
    records : list of ImageRecord
        The images that have at least one query.
    skipped : list of ImageRecord
        The images left out: all their objects are crowd regions or lie outside, and no absent
        prompt is asked.

    Raises
    ------
    InputError
        If no image has a query, or absent prompts are wanted and there is none to draw.
    """

    def __init__(
        self,
        split,
        processor,
        *,
        resolution,
        mask_size,
        prompt=None,
        num_negatives=0,
        negative_prompts=(),
        seed=42,
        resample_negatives=True,
        backbone_cache=None,
    ):
        self.split, self.processor, self.backbone_cache = split, processor, backbone_cache
        self.resolution, self.mask_size = resolution, mask_size
        self.prompt, self.num_negatives = prompt, num_negatives
        self.negative_prompts = tuple(
            noun for noun in negative_prompts if prompt is None or not nouns_overlap(noun, prompt)
        )
        self.seed, self.resample_negatives = seed, resample_negatives
        self.epoch = 0
        self.own_names = split.categories if prompt is None else (prompt,)
        self.records, self.skipped = [], []
        for record in split.records:
            (self.records if self._prompts(record) else self.skipped).append(record)
        if not self.records:
            raise InputError(
                f"the {len(split.records)} images of split '{split.name}' give no query to train on",
                where=split.root,
                fix="annotate objects inside the images that are not marked as crowd",
            )
        if num_negatives > 0 and not any(absent_candidates(r, self.nouns) for r in self.records):
            raise InputError(
                f"num_negatives is {num_negatives}, but no noun is absent from any image",
                where=split.root,
                fix="list nouns in data.negative_prompts that the images do not show",
            )

    def __len__(self):
        """Return the number of images with a query."""
        return len(self.records)

    @property
    def nouns(self):
        """All that can be asked, present or absent, as a tuple of str."""
        return (*self.own_names, *self.negative_prompts)

    def set_epoch(self, epoch):
        """Choose the draw of absent prompts.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0; without effect if ``resample_negatives`` is False.
        """
        self.epoch = epoch

    def __getitem__(self, index):
        """Load one image.

        Parameters
        ----------
        index : int
            Position in `records`.

        Returns
        -------
        dict
            ``pixel_values``: float32 ``(3, resolution, resolution)``, normalised; or
            ``backbone_states`` ``(N, C)``, if there is a cache.
            ``queries``: list of dict with ``image_id``, ``prompt``, ``category`` (the name asked
            for), ``is_positive``, ``boxes_cxcywh`` float32 ``(n, 4)`` in [0, 1], ``masks`` uint8
            ``(n, mask_size, mask_size)``, ``mask_valid`` bool ``(n,)``, False where a box has no
            usable mask. Positive queries come first and have n >= 1, the others n = 0.

        Raises
        ------
        InputError
            If the image cannot be opened or its shape is not the annotated one.
        """
        record = self.records[index]
        queries = [
            {
                "image_id": record.image_id,
                "prompt": prompt,
                "category": prompt,
                "is_positive": bool(objects),
                **object_targets(objects, record, self.mask_size),
            }
            for prompt, objects in self._prompts(record).items()
        ]
        if self.backbone_cache is not None:
            return {"backbone_states": self.backbone_cache.states(record), "queries": queries}
        pixel_values = load_pixels(record, self.processor, self.resolution)
        return {"pixel_values": pixel_values, "queries": queries}

    def _prompts(self, record):
        """Map each prompt of an image to its objects, absent prompts to none."""
        prompts = present_prompts(record, self.split.categories, self.prompt)
        # A replaced prompt means any object: it is absent only where nothing is annotated.
        own_names = self.own_names if self.prompt is None or not record.objects else ()
        absent = absent_prompts(
            record,
            own_names,
            self.negative_prompts,
            self.num_negatives,
            seed=self.seed,
            epoch=self.epoch if self.resample_negatives else 0,
        )
        return {**prompts, **{noun: [] for noun in absent}}


class PromptCollator:
    """Join items to a batch in which every query knows its image, so that each is encoded once.

    Parameters
    ----------
    processor : transformers.Sam3Processor
        Its ``tokenizer`` turns prompts into 32 token ids.
    text_states : dict of str to torch.Tensor, optional
        From `helpers.model.cache.text_states`, for every prompt that is asked; takes the place
        of the token ids.
    """

    def __init__(self, processor, text_states=None):
        self.processor, self.text_states = processor, text_states

    def __call__(self, items):
        """Collate items of a `PromptDataset`.

        Parameters
        ----------
        items : list of dict
            I items with B queries in all.

        Returns
        -------
        dict
            ``pixel_values`` ``(I, 3, S, S)`` or ``backbone_states`` ``(I, N, C)``; ``input_ids``
            int64 ``(B, 32)`` or ``text_states`` ``(B, 32, D)``; ``attention_mask`` int64
            ``(B, 32)``; ``image_index`` int64 ``(B,)``, the image of each query, ascending;
            ``targets``, B dicts ``boxes_cxcywh``, ``masks``, ``mask_valid``; ``queries``, B dicts
            ``image_id``, ``prompt``, ``category``, ``is_positive``.

        Raises
        ------
        InputError
            If a prompt is longer than 32 tokens.
        """
        batch = join_queries(items)
        prompts = [query["prompt"] for query in batch["queries"]]
        tokens = self.tokenize(prompts)
        if self.text_states is not None:
            del tokens["input_ids"]
            tokens["text_states"] = torch.stack([self.text_states[prompt] for prompt in prompts])
        return {**batch, **tokens}

    def tokenize(self, prompts):
        """Turn prompts into token ids, refusing what SAM3 would cut silently.

        Parameters
        ----------
        prompts : sequence of str
            B prompts.

        Returns
        -------
        dict of str to torch.Tensor
            ``input_ids`` and ``attention_mask``, int64 ``(B, 32)``.

        Raises
        ------
        InputError
            If a prompt is longer than 32 tokens.
        """
        tokens = self.processor.tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS)
        for prompt, ids in zip(prompts, tokens["input_ids"], strict=True):
            if len(ids) > MAX_TOKENS:
                raise InputError(
                    f"the prompt {prompt!r} has {len(ids)} tokens, SAM3 reads {MAX_TOKENS}",
                    fix="use a short noun phrase",
                )
        return {key: torch.tensor(tokens[key]) for key in ("input_ids", "attention_mask")}


def join_queries(items):
    """Collate everything but the tokens; see `PromptCollator` for the keys.

    Parameters
    ----------
    items : list of dict
        Items of a `PromptDataset`.

    Returns
    -------
    dict
        ``pixel_values`` or ``backbone_states``, ``image_index``, ``targets``, ``queries``.
    """
    targets, described, image_index = [], [], []
    for index, item in enumerate(items):
        for query in item["queries"]:
            targets.append({key: query[key] for key in ("boxes_cxcywh", "masks", "mask_valid")})
            described.append(
                {key: query[key] for key in ("image_id", "prompt", "category", "is_positive")}
            )
            image_index.append(index)
    seen = "pixel_values" if "pixel_values" in items[0] else "backbone_states"
    return {
        seen: torch.stack([item[seen] for item in items]),
        "image_index": torch.tensor(image_index, dtype=torch.long),
        "targets": targets,
        "queries": described,
    }


def count_objects(loader_or_dataset):
    """Count the objects that reach the loss.

    Parameters
    ----------
    loader_or_dataset : torch.utils.data.DataLoader or PromptDataset
        A loader with a `PromptCollator`, or a dataset, which is then collated image by image.

    Returns
    -------
    pandas.DataFrame
        One row per query: ``image_id``, ``prompt``, ``is_positive``, ``num_objects``,
        ``num_masks`` (of which with a usable mask).
    """
    batches = loader_or_dataset
    if isinstance(loader_or_dataset, PromptDataset):
        dataset = loader_or_dataset
        batches = (join_queries([dataset[index]]) for index in range(len(dataset)))
    rows = [
        (
            query["image_id"],
            query["prompt"],
            query["is_positive"],
            len(target["boxes_cxcywh"]),
            int(target["mask_valid"].sum()),
        )
        for batch in batches
        for query, target in zip(batch["queries"], batch["targets"], strict=True)
    ]
    columns = ["image_id", "prompt", "is_positive", "num_objects", "num_masks"]
    return pd.DataFrame(rows, columns=columns)
