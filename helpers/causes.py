"""Every cause of a silent detector that this project can name: the vocabulary of the diagnosis.

A cause is planted by `helpers.wrong_reader`, found by `helpers.diagnosis`, and stopped by
`helpers.guards`; all three speak of it by its code. Rows are those of the catalogue of reported
causes, of which `LEFT_OUT` says what is missing here and why.
"""

from __future__ import annotations

from typing import NamedTuple

STAGES = (
    "files",
    "data",
    "prompts",
    "base",
    "adapter",
    "loss",
    "training",
    "checkpoint",
    "prediction",
    "evaluation",
)
"""Where a cause lives, in the order in which data flows: an earlier one explains later oddities."""


class Cause(NamedTuple):
    """One cause.

    Attributes
    ----------
    row : str
        Row of the catalogue.
    stage : str
        One of `STAGES`.
    title : str
        What is wrong, as one would say it to the owner of the run.
    fix : str
        What to do.
    confusable : str
        Another cause that looks the same to the diagnosis, and what would tell them apart; empty
        if there is none.
    """

    row: str
    stage: str
    title: str
    fix: str
    confusable: str = ""


CAUSES = {
    "damaged_run": Cause(
        "",
        "files",
        "files of the run are missing, cut off or changed",
        "restore the folder from a copy, or train again with --overwrite",
    ),
    "no_objects": Cause(
        "1",
        "data",
        "no annotated object reached the loss",
        "read the annotations with helpers.data.coco.read_split, and train only after "
        "'python -m helpers check DATA' counts the same objects before and after the collate",
    ),
    "masks_lost": Cause(
        "1",
        "data",
        "boxes reach the loss but their masks do not",
        "decode polygons and run lengths alike, and let a mask that cannot be read stop the run",
    ),
    "objects_filtered": Cause(
        "1b",
        "data",
        "prompts lose their objects after loading and are trained as absent",
        "drop the prompt together with its objects; set iscrowd to 0 for single objects",
    ),
    "boxes_off_masks": Cause(
        "6",
        "data",
        "the boxes in the files are not [x, y, width, height] in pixels",
        "convert them once, and check that each box is the tight box of its own mask",
    ),
    "wrong_box_targets": Cause(
        "6",
        "data",
        "box targets are not (centre, size) as fractions of the image",
        "convert targets to cxcywh in [0, 1] before the loss; compare each with its own mask",
    ),
    "annotations_off_image": Cause(
        "28",
        "data",
        "annotations were made on an image that was turned or has another shape",
        "turn images upright (EXIF) before annotating, and annotate the size that is trained",
    ),
    "not_finite": Cause(
        "16",
        "data",
        "degenerate objects or a loss that is not finite",
        "drop or repair boxes thinner than a pixel and empty masks; lower the learning rate",
    ),
    "unreadable_data": Cause(
        "1",
        "data",
        "annotations or images cannot be read as they are",
        "mend what 'python -m helpers check DATA' lists as errors",
    ),
    "labels_missing": Cause(
        "20",
        "data",
        "objects in the pictures are not annotated, so they are trained as absent",
        "annotate every object, or leave incompletely annotated images out",
        confusable="objects_filtered leaves the annotations in the files, labels_missing does not: "
        "the count of objects in the files tells them apart",
    ),
    "tiny_objects": Cause(
        "21",
        "data",
        "objects are smaller than two cells of the mask grid",
        "cut the images into tiles, or raise model.resolution",
    ),
    "mostly_empty": Cause(
        "22",
        "data",
        "hardly any image shows an object",
        "leave most images without objects out; one in four is plenty",
        confusable="labels_missing: only a look at the pictures tells an empty image from one "
        "that was not annotated; the diagnosis asks the trained model",
    ),
    "category_names": Cause(
        "14",
        "prompts",
        "nearly the same name is asked as present and as absent",
        "remove the category without annotations, or give both one name",
    ),
    "merged_categories": Cause(
        "12",
        "prompts",
        "one prompt is given the objects of several categories",
        "ask one prompt per category, with only its own objects",
    ),
    "only_positive_prompts": Cause(
        "4",
        "prompts",
        "no absent prompt was asked, so 'no' was never taught",
        "set data.num_negatives to 2 or more, with nouns that the images do not show",
    ),
    "present_negatives": Cause(
        "19",
        "prompts",
        "prompts are asked as absent although the picture shows them",
        "list what is in a picture under 'contents', or take nouns from another field",
    ),
    "other_training_prompt": Cause(
        "5",
        "prompts",
        "the training asked for another word than is asked now",
        "ask for a trained prompt (prompts.json), or train with the word you will ask for",
    ),
    "blank_base": Cause(
        "28",
        "base",
        "the base itself finds nothing, not even what it knows",
        "load the base anew; compare it with its fingerprint before training on it",
    ),
    "port_divergence": Cause(
        "29",
        "base",
        "the model in memory does not compute what transformers' Sam3Model computes",
        "pin the versions of requirements.lock, leave autocast off, and do not patch the model",
    ),
    "base_not_frozen": Cause(
        "31",
        "adapter",
        "weights of the base were trained besides the adapter, and are not saved with it",
        "freeze the base before the optimiser is made; train LoRA only",
        confusable="blank_base, for a run without 'trained_parameters' in its metrics: in both "
        "the fingerprint of the base differs from the recorded one",
    ),
    "lora_elsewhere": Cause(
        "3",
        "adapter",
        "LoRA is not where the config says",
        "use the names of the Hugging Face model and count the modules per component",
    ),
    "adapter_at_zero": Cause(
        "7",
        "adapter",
        "the adapter received no gradient and does nothing",
        "let gradients reach lora_A and lora_B: require_grad, use_reentrant=False, used branches",
    ),
    "extreme_regularisation": Cause(
        "35",
        "adapter",
        "the adapter is regularised or wide beyond reason for the data",
        "keep lora.dropout at 0.2 or below, and few epochs on few images",
    ),
    "loss_weights": Cause(
        "15",
        "loss",
        "the terms of the loss are weighted or normalised wrongly",
        "use helpers.model.losses with its weights; no term may dominate the others",
    ),
    "ported_loss": Cause(
        "34",
        "loss",
        "the loss is not the one this head was trained with",
        "test the loss: a perfect prediction must cost least",
    ),
    "one_to_many_matching": Cause(
        "30",
        "loss",
        "several queries are rewarded for the same object, so each is found many times",
        "match one query per object (helpers.model.matching), or remove duplicates afterwards",
    ),
    "dead_config_keys": Cause(
        "24",
        "training",
        "settings of the config were not used in training",
        "pass every key on, and compare the logged learning rates and steps with the config",
    ),
    "overtrained": Cause(
        "10",
        "training",
        "training went on until everything else was forgotten",
        "stop earlier, lower the learning rate or the rank; watch known concepts while training",
    ),
    "text_distorted": Cause(
        "11",
        "training",
        "tuning the text encoder pulled all words together",
        "freeze the text encoder or lower its learning rate, and ask absent prompts",
        confusable="only_positive_prompts also makes every word answer; the cosines between prompt "
        "embeddings rise only here",
    ),
    "at_clamp": Cause(
        "18",
        "training",
        "logits stand at the model's clamps, where there is no gradient",
        "start again from the base with a lower learning rate: training on cannot mend this",
    ),
    "low_confidence": Cause(
        "17",
        "training",
        "boxes and masks are right but their scores stay low",
        "train longer, adapt the text encoder or the DETR decoder, or choose the threshold on the "
        "validation split",
    ),
    "wrong_checkpoint": Cause(
        "23",
        "checkpoint",
        "the kept checkpoint is not the best one",
        "choose it by a detection metric on a validation split with objects, not by the loss",
    ),
    "weights_not_loaded": Cause(
        "2",
        "checkpoint",
        "the trained weights are in the file but not in the model",
        "load with helpers.model.lora.load_adapter, which refuses missing and unexpected keys",
    ),
    "adapter_keys": Cause(
        "25",
        "checkpoint",
        "the keys of the adapter file do not fit the model",
        "use the versions the adapter was written with, or rename the keys",
    ),
    "merge_changed_outputs": Cause(
        "26",
        "checkpoint",
        "the saved weights do not give the results the run recorded",
        "merge and save in float32 with the scale alpha / rank, and compare the detections after",
        confusable="a validation split that was changed after the training gives other results "
        "too: the checkpoint's own weights tell them apart, where the checkpoint was not removed",
    ),
    "presence_ignored": Cause(
        "8",
        "prediction",
        "the score leaves the presence probability out",
        "score = sigmoid(query logit) * sigmoid(presence logit)",
    ),
    "threshold_ignored": Cause(
        "8",
        "prediction",
        "the score threshold asked for is not the one applied",
        "pass the threshold on; choose it on the validation split",
    ),
    "mask_threshold_on_logits": Cause(
        "9",
        "prediction",
        "mask logits are compared with a probability, or at another size",
        "take the sigmoid first, and resize logits to the image before the threshold",
    ),
    "evaluation_mismatch": Cause(
        "13",
        "evaluation",
        "the evaluation pairs detections with the annotations of something else",
        "give every image and prompt its own id; the truth against itself must score 1.0",
    ),
    "validation_crash": Cause(
        "32",
        "evaluation",
        "the validation cannot run",
        "run one validation step before the first epoch",
    ),
}
"""Code to cause, in the order of the stages."""

LEFT_OUT = {
    "27": "there are no box prompts in helpers.detect.predictor, so training and use cannot differ in them",
    "33": "a misreading, not a fault: healthy runs with logits near the bottom must raise no alarm",
}
"""Rows of the catalogue that cannot be planted in this project, with the reason."""
