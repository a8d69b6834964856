"""A dataset as a config says it, and its images as queries: one per image and category."""

import hashlib
import json
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torchvision.ops import box_convert

from helpers.config import Config
from helpers.data.coco import find_splits, read_split, split_folder
from helpers.data.images import load_pixels, look_at
from helpers.data.masks import clip_box, masks_on_grid
from helpers.data.records import (
    Split,
    absent_candidates,
    absent_prompts,
    has_mask,
    nouns_overlap,
    present_prompts,
    rename_categories,
    replayed_prompts,
)
from helpers.errors import InputError
from helpers.files import file_digest, resolve


@dataclass(frozen=True)
class Dataset:
    """The splits of a folder as a config asks for them; each is read and each image decoded once."""

    root: Path  # resolved
    config: Config  # its `data` holds the nouns and the absent prompts
    pictures: dict = field(default_factory=dict, repr=False, compare=False)  # see `look`
    read: dict = field(default_factory=dict, repr=False, compare=False)  # splits as in the files
    _splits: dict = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def names(self):
        """Names of the splits, see `helpers.data.coco.find_splits`."""
        return find_splits(self.root)

    def split(self, name):
        """Return a split, see `helpers.data.coco.read_split`, with the nouns of the config."""
        name, _ = split_folder(self.root, name)
        if name not in self._splits:
            self.read[name] = read_split(self.root, name)
            nouns = self.config.data.prompts_by_category
            self._splits[name] = rename_categories(self.read[name], nouns)
        return self._splits[name]

    def look(self, split, bar=None):
        """Decode the images of a split that were not decoded yet; return a dict of path to Picture."""
        for record in split.records:
            if record.path not in self.pictures:
                self.pictures[record.path] = look_at(record.path)
            if bar is not None:
                bar.update()
        return {record.path: self.pictures[record.path] for record in split.records}


def load_dataset(config, data_dir=None):
    """Open the dataset of a config; a split is read when it is first asked for.

    Parameters
    ----------
    config : helpers.config.Config
    data_dir : os.PathLike, optional
        Another folder than ``data.data_dir``, read with the same settings.

    Returns
    -------
    Dataset
    """
    root = resolve(config.data.data_dir if data_dir is None else data_dir)
    if not root.is_dir():
        raise InputError("no such folder", where=root, fix="check the path of the dataset")
    return Dataset(root, config)


def object_targets(objects, record, mask_size):
    """Return what the loss compares n objects of an image with, see `PromptDataset.targets`."""
    boxes_xyxy = [clip_box(item.box_xyxy, record.width, record.height) for item in objects]
    scale = torch.tensor([record.width, record.height, record.width, record.height])
    boxes = torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4) / scale
    boxes_cxcywh = box_convert(boxes, "xyxy", "cxcywh")
    mask_valid = torch.tensor([has_mask(record, item) for item in objects], dtype=torch.bool)
    masks = torch.zeros((len(objects), mask_size, mask_size), dtype=torch.uint8)
    if mask_size:
        rles = [item.rle for item, valid in zip(objects, mask_valid, strict=True) if valid]
        masks[mask_valid] = masks_on_grid(rles, mask_size)
    return {"boxes_cxcywh": boxes_cxcywh, "masks": masks, "mask_valid": mask_valid}


def data_fingerprint(split, pictures=None):
    """Return 16 hex digits of the SHA-256 of what a split teaches; images not known are read."""
    pictures = pictures or {}
    digest = hashlib.sha256(json.dumps(split.categories).encode("utf-8"))
    for record in split.records:
        objects = [
            [item.category, item.file_category, item.box_xyxy, item.is_crowd, item.rle]
            for item in record.objects
        ]
        size = [record.width, record.height]
        # The file name, too, decides the draw of absent prompts.
        description = [record.image_id, size, sorted(record.contents), objects]
        digest.update(json.dumps(description, sort_keys=True).encode("utf-8"))
        known = getattr(pictures.get(record.path), "digest", "")
        digest.update((known or file_digest(record.path)).encode("ascii"))
    return digest.hexdigest()[:16]


_TARGETS = ("boxes_cxcywh", "masks", "mask_valid")
MAX_TOKENS = 32  # context of SAM3's text encoder; its processor would cut or fail beyond it


@dataclass(eq=False, repr=False)
class PromptDataset(torch.utils.data.Dataset):
    """The images of a split with their prompts and targets.

    Images with a query become ``records``, those about which nothing is asked ``skipped``.
    """

    split: Split
    processor: object  # transformers.Sam3Processor
    _: KW_ONLY
    resolution: int  # side of the square input in pixels
    mask_size: int  # and of the grid of predicted masks in cells
    prompt: str | None = None  # replaces every category name: one query for all objects
    num_negatives: int = 0  # this and the next two: see `helpers.data.records.absent_prompts`
    negative_prompts: tuple[str, ...] = ()
    seed: int = 42
    resample_negatives: bool = True  # draw anew in each epoch (`set_epoch`)
    backbone_cache: object = None  # of these images: its features take the place of the pixels

    def __post_init__(self):
        """Choose the images that are asked about; refuse a split without any."""
        split, prompt = self.split, self.prompt
        nouns = [n for n in self.negative_prompts if prompt is None or not nouns_overlap(n, prompt)]
        self.negative_prompts, self.epoch, self.replay = tuple(nouns), 0, {}
        self.own_names = split.categories if prompt is None else (prompt,)
        self.records, self.skipped = [], []
        for record in split.records:
            (self.records if self._prompts(record) else self.skipped).append(record)
        if not self.records:
            message = f"the {len(split.records)} images of split '{split.name}' give no query"
            fix = "annotate objects inside the images that are not marked as crowd"
            raise InputError(message, where=split.root, fix=fix)
        wants_absent = self.num_negatives > 0
        if wants_absent and not any(absent_candidates(r, self.nouns) for r in self.records):
            message = f"num_negatives is {self.num_negatives}, but no noun is absent from any image"
            fix = "list nouns in data.negative_prompts that the images do not show"
            raise InputError(message, where=split.root, fix=fix)

    @classmethod
    def from_config(cls, config, split, model=None, processor=None, **changes):
        """Build the dataset of a config; its `targets` need neither model nor processor."""
        settings = {
            **dict(zip(("resolution", "mask_size"), model_sizes(config, model), strict=True)),
            "prompt": config.data.prompt,
            "num_negatives": config.data.num_negatives,
            "negative_prompts": config.data.negative_prompts,
            "seed": config.training.seed,
        }
        return cls(split, processor, **settings | changes)

    @classmethod
    def for_evaluation(cls, split, model, processor, *, prompt=None, absent_prompts=(), **changes):
        """Ask each category, or ``prompt``, on every image, and absent nouns where they may be absent."""
        num_nouns = len(split.categories if prompt is None else (prompt,)) + len(absent_prompts)
        settings = {
            "resolution": model.resolution,
            "mask_size": model.mask_size,
            "prompt": prompt,
            # All there are. With a single noun and no other, only images without it can ask for it.
            "num_negatives": num_nouns if num_nouns > 1 else 0,
            "negative_prompts": absent_prompts,
        }
        return cls(split, processor, resample_negatives=False, **settings | changes)

    def __len__(self):
        """Count the images with a query."""
        return len(self.records)

    @property
    def nouns(self):
        """All that can be asked, present or absent, as a tuple of str."""
        return (*self.own_names, *self.negative_prompts)

    def set_replay(self, answers):
        """Ask words of the base, too, by its `clear_answers`: never as absent where they may be."""
        self.replay = {name: words for name, (words, _) in answers.items()}
        self.records = [
            replace(record, contents=record.contents | answers[record.image_id][1])
            for record in self.records
        ]

    def set_epoch(self, epoch):
        """Choose the draw of absent prompts by the number of the epoch, from 0."""
        self.epoch = epoch

    def __getitem__(self, index):
        """Load ``queries``, and ``pixel_values`` (3, S, S) or ``backbone_states`` (N, C)."""
        queries, record = self.targets(index), self.records[index]
        if self.backbone_cache is not None:
            return {"backbone_states": self.backbone_cache.states(record), "queries": queries}
        pixel_values = load_pixels(record, self.processor, self.resolution)
        return {"pixel_values": pixel_values, "queries": queries}

    def targets(self, index, mask_size=None):
        """Return the queries of an image without opening it; with mask size 0 masks are not decoded.

        Each is a dict of ``image_id``, ``prompt``, ``category`` (the name asked for),
        ``is_positive``, ``boxes_cxcywh`` float32 (n, 4) in [0, 1], ``masks`` uint8
        (n, mask_size, mask_size) and ``mask_valid`` bool (n,). Positive queries come first.
        """
        record = self.records[index]
        mask_size = self.mask_size if mask_size is None else mask_size
        queries = []
        for prompt, objects in self._prompts(record).items():
            names = {"image_id": record.image_id, "prompt": prompt, "category": prompt}
            targets = object_targets(objects, record, mask_size)
            queries.append({**names, "is_positive": bool(objects), **targets})
        return queries

    def _prompts(self, record):
        """Map each prompt of an image to its objects, absent prompts to none."""
        prompts = present_prompts(record, self.split.categories, self.prompt)
        # A replaced prompt means any object: it is absent only where nothing is annotated.
        own_names = self.own_names if self.prompt is None or not record.objects else ()
        draw = {"seed": self.seed, "epoch": self.epoch if self.resample_negatives else 0}
        nouns = (own_names, self.negative_prompts)
        absent = absent_prompts(record, *nouns, self.num_negatives, **draw)
        replayed = replayed_prompts(record, self.replay.get(record.image_id, {}), **draw)
        return {**prompts, **replayed, **{noun: [] for noun in absent}}


def model_sizes(config, model=None):
    """Return the side of the input in pixels and of the mask grid in cells, of a model or a SAM3."""
    if model is not None:
        return model.resolution, model.mask_size
    return config.model.resolution, config.model.resolution // 14 * 4


@dataclass(eq=False, repr=False)
class PromptCollator:
    """Join items to a batch in which every query knows its image, so that each is encoded once."""

    processor: object  # transformers.Sam3Processor: its ``tokenizer`` makes 32 token ids
    text_states: dict | None = None  # from `helpers.model.cache.text_states`, in their place

    def __call__(self, items):
        """Collate I items with B queries in all.

        The batch has ``pixel_values`` (I, 3, S, S) or ``backbone_states`` (I, N, C); ``input_ids``
        (B, 32) or ``text_states`` (B, 32, D); ``attention_mask`` (B, 32); ``image_index`` (B,), the
        image of each query, ascending; ``targets``, B dicts of ``boxes_cxcywh``, ``masks``,
        ``mask_valid``; ``queries``, B dicts of the rest.
        """
        queries = [query for item in items for query in item["queries"]]
        prompts = [query["prompt"] for query in queries]
        tokens = self.tokenize(prompts)
        if self.text_states is not None:
            del tokens["input_ids"]
            tokens["text_states"] = torch.stack([self.text_states[prompt] for prompt in prompts])
        images = "pixel_values" if "pixel_values" in items[0] else "backbone_states"
        image_index = [index for index, item in enumerate(items) for _ in item["queries"]]
        return {
            images: torch.stack([item[images] for item in items]),
            "image_index": torch.tensor(image_index, dtype=torch.long),
            "targets": [{key: query[key] for key in _TARGETS} for query in queries],
            "queries": [{k: v for k, v in query.items() if k not in _TARGETS} for query in queries],
            **tokens,
        }

    def tokenize(self, prompts):
        """Turn B prompts into ``input_ids`` and ``attention_mask``, int64 (B, 32); none is cut."""
        for prompt in prompts:
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                message = f"the prompt {prompt!r} is no text: it holds bytes that are not UTF-8"
                raise InputError(message, fix="type it in a terminal or file that uses UTF-8")
        tokens = self.processor.tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS)
        for prompt, ids in zip(prompts, tokens["input_ids"], strict=True):
            if len(ids) > MAX_TOKENS:
                message = f"the prompt {prompt!r} has {len(ids)} tokens, SAM3 reads {MAX_TOKENS}"
                raise InputError(message, fix="use a short noun phrase")
        return {key: torch.tensor(tokens[key]) for key in ("input_ids", "attention_mask")}


def count_objects(loader_or_dataset):
    """Count the objects that reach the loss.

    Parameters
    ----------
    loader_or_dataset : torch.utils.data.DataLoader or PromptDataset
        A loader with a `PromptCollator`, or a dataset, of which no image is opened.

    Returns
    -------
    pandas.DataFrame
        One row per query: ``image_id``, ``prompt``, ``is_positive``, ``num_objects``,
        ``num_masks`` (of which with a usable mask).
    """
    if isinstance(loader_or_dataset, PromptDataset):
        indices = range(len(loader_or_dataset))
        queries = (query for index in indices for query in loader_or_dataset.targets(index, 0))
    else:
        queries = (
            query | target
            for batch in loader_or_dataset
            for query, target in zip(batch["queries"], batch["targets"], strict=True)
        )
    names = ["image_id", "prompt", "is_positive"]
    rows = [
        (*(query[name] for name in names), len(query["masks"]), int(query["mask_valid"].sum()))
        for query in queries
    ]
    return pd.DataFrame(rows, columns=[*names, "num_objects", "num_masks"])
