"""The data of a training run: checked, as queries, with the features that do not change."""

import sys
from itertools import product
from typing import NamedTuple

import torch
from accelerate import PartialState

from helpers.checks.dataset import check_dataset
from helpers.data import PromptCollator, PromptDataset, count_objects, load_dataset
from helpers.data.dataset import data_fingerprint
from helpers.data.prompts import nouns_overlap
from helpers.data.records import rename_categories
from helpers.detect.knowledge import clear_answers
from helpers.errors import InputError
from helpers.model.cache import BackboneCache, text_states


class TrainingData(NamedTuple):
    """What the loop reads, with `count_objects` of both datasets and `data_fingerprint`."""

    train: PromptDataset
    valid: PromptDataset
    collator: PromptCollator
    counts: dict
    fingerprint: str


def training_data(config, model, processor, *, train_split=None, val_split=None, allow_empty=False):
    """Read and check the data of a run, and make sure that objects arrive, unless `allow_empty`."""
    data, dataset, pictures = config.data, None, {}
    if train_split is None or val_split is None:
        dataset = load_dataset(config)
        pictures = dataset.pictures  # what the check sees of the images is not looked at again
        if not allow_empty:
            check_dataset(dataset, model, processor).raise_for_errors()
    splits = [
        dataset.split(name) if split is None else rename_categories(split, data.prompts_by_category)
        for split, name in ((train_split, data.train_split), (val_split, data.val_split))
    ]
    cache = _filled_cache(config, model, processor, splits, pictures)
    train = PromptDataset.from_config(config, splits[0], model, processor, backbone_cache=cache)
    asked = {"prompt": data.prompt, "absent_prompts": config.evaluation.absent_prompts}
    valid = PromptDataset.for_evaluation(splits[1], model, processor, **asked, backbone_cache=cache)
    counts = {"train": count_objects(train), "valid": count_objects(valid)}
    if data.replay_words:  # after the counts: a run whose own objects are missing must not pass
        model.to(PartialState().device)
        for word, noun in product(data.replay_words, train.own_names):
            if nouns_overlap(word, noun):
                message = f"{word!r} means what is annotated as {noun!r}; the base would deny it"
                fix = "list other things that the base knows"
                raise InputError(message, where="data.replay_words", fix=fix)
        answers = clear_answers(model, processor, train.records, data.replay_words)
        if not any(detected for detected, _ in answers.values()):
            words = ", ".join(data.replay_words)
            message = f"the base detects none of {words} on {len(answers)} images to replay"
            fix = "list what the images show and the base knows, see 'python -m helpers knows'"
            raise InputError(message, where="data.replay_words", fix=fix)
        train.set_replay(answers)
    for _ in counts:  # the draw of a loader that starts: seeds give the runs that they always gave
        torch.empty((), dtype=torch.int64).random_()
    if not counts["train"]["num_objects"].any() and not allow_empty:
        message = f"no object of {len(splits[0].records)} images reaches the loss (cause "
        message += "no_objects in data/causes.csv); training would teach to detect nothing"
        fix = "run 'python -m helpers check' on the dataset, or pass allow_empty=True on purpose"
        raise InputError(message, where=splits[0].root, fix=fix)
    states = None
    if config.training.feature_cache is not None and not config.lora.apply_to_text_encoder:
        states = text_states(model, processor, (*train.nouns, *valid.nouns))
    collator = PromptCollator(processor, states)
    return TrainingData(train, valid, collator, counts, data_fingerprint(splits[0], pictures))


def _filled_cache(config, model, processor, splits, pictures):
    """Return a cache with the features of all images; None if the run wants or can have none."""
    folder, lora = config.training.feature_cache, config.lora
    if folder is None:
        return None
    if lora.apply_to_vision_encoder and lora.apply_to_text_encoder:
        message = "both encoders are trained, so neither has features that stay the same"
        fix = "set it to null, or freeze an encoder: lora.apply_to_vision_encoder=false"
        raise InputError(message, where="training.feature_cache", fix=fix)
    model.to(PartialState().device)
    if lora.apply_to_vision_encoder:
        return None
    cache = BackboneCache(folder, model, processor, pictures)
    records = [record for split in splits for record in split.records]
    missing = len(cache.missing(records))
    if missing and PartialState().is_main_process:
        size = f"{missing * cache.bytes_per_image / 1e6:,.0f} MB"
        print(f"feature cache: {missing} images, {size} in {cache.folder}", file=sys.stderr)
    loading = {"batch_size": config.training.batch_size, "num_workers": config.training.num_workers}
    cache.fill(records, **loading, progress=sys.stderr.isatty())
    return cache
