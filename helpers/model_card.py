"""The model card of a run: what it is, how to use it without this package, how good it was."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from helpers.files import read_json
from helpers.paths import resolve
from helpers.run_folder import VERSIONS_FILE

_SAM_LICENSE = {
    "license": "other",
    "license_name": "sam-license",
    "license_link": "https://huggingface.co/facebook/sam3/blob/main/LICENSE",
}
_MEANING = {
    "AP": "average precision of the masks, mean over IoU 0.5 to 0.95",
    "AP50": "average precision of the masks, one counts as right at an IoU of 0.5",
    "AP75": "the same at an IoU of 0.75",
    "box_AP": "average precision of the boxes, mean over IoU 0.5 to 0.95",
    "cgF1": "SAM3's own metric, pmF1 x IL_MCC",
    "pmF1": "F1 of the masks on images that show the object, mean over IoU 0.5 to 0.95",
    "IL_MCC": "does it say yes and no rightly, image by image; -1 to 1",
    "union_iou": "IoU of all detected pixels with all true pixels",
    "max_score_present": "mean of the highest score where the object is in the image",
    "max_score_present_share_above": "share of those images with a score above the threshold",
    "max_score_absent": "mean of the highest score where the prompt is absent",
    "max_score_absent_share_above": "share of those questions with a score above the threshold",
    "num_present": "images x prompts where the object is there",
    "num_absent": "images x prompts where it is not",
}

_CARD = """---
{metadata}
---

# SAM3 for {prompts}

{what}

## Use

```python
{code}
```

`found` has the `scores` above {threshold:g}, the threshold of this run, with their `boxes` (x0, y0,
x1, y1 in pixels) and `masks`.

## Training

{training}

## Metrics

Measured on the validation split, which also chose the checkpoint: expect a little less elsewhere.

| metric | value | meaning |
|---|---:|---|
{metrics}

## Limits

{limits}
"""


def model_card(run, own_resolution, merge=None):
    """Write the model card of a run, or of the full model it was merged into.

    Parameters
    ----------
    run : helpers.run_folder.RunFiles
        Every number of the card is from its ``metrics``, ``prompts`` and ``config``.
    own_resolution : int
        Resolution of the base as it is published, see `helpers.sam3.base_config`. The code of the
        card sets that of the run if it differs.
    merge : dict, optional
        For a merged model: what `helpers.merging.merge` returns.

    Returns
    -------
    str
        Markdown with the metadata block of the Hugging Face Hub. A base in a local folder is not
        named in the metadata, since the Hub could not find it.
    """
    names = list(run.prompts["prompts"])
    prompts = ", ".join(f'"{name}"' for name in names) or "no prompt with objects"
    return _CARD.format(
        metadata=_metadata(run.config.model.name, merge).to_yaml(),
        prompts=prompts,
        what=_what(run, merge),
        code=_code(run, own_resolution, merge),
        threshold=run.config.evaluation.score_threshold,
        training="\n".join(f"- {line}" for line in _training(run)),
        metrics="\n".join(_metric_rows(run.metrics["valid"])),
        limits="\n".join(f"- {line}" for line in _limits(run, merge)),
    )


def is_on_hub(base_name):
    """Tell whether a base is named as on the Hub, and not by a folder of this machine."""
    return not resolve(base_name).is_dir() and not Path(base_name).is_absolute()


def _metadata(base_name, merge):
    """Return the metadata block; a licence is named only where it is known."""
    known = _SAM_LICENSE if base_name.startswith("facebook/sam3") else {"license": "unknown"}
    on_hub = {"base_model": base_name} if is_on_hub(base_name) else {}
    if on_hub and merge:
        on_hub["base_model_relation"] = "finetune"
    return ModelCardData(
        library_name="transformers" if merge else "peft",
        pipeline_tag="image-segmentation",
        tags=["sam3", "image-segmentation", "open-vocabulary", *([] if merge else ["lora"])],
        **known,
        **on_hub,
    )


def _what(run, merge):
    """Say in a sentence or two what the folder holds."""
    base = run.config.model.name
    revision = run.config.model.revision
    base = f"`{base}`" + (f" at revision `{revision}`" if revision else "")
    if merge is None:
        return f"A LoRA adapter for {base}. `base.json` tells the exact base by a fingerprint."
    return (
        f"A full model: {base} with the LoRA adapter of a run merged in, in float32, and stored in "
        f"{merge['dtype']}. On {merge['num_images']} images its logits differ from those of base "
        f"and adapter by at most {merge['merged']['max_logit_difference']:.2g} before the change of type; "
        "`merge.json` has the comparison."
    )


def _code(run, own_resolution, merge):
    """Return the lines that use the result with plain transformers and PEFT."""
    settings, evaluation = run.config.model, run.config.evaluation
    prompt = next(iter([*run.prompts["prompts"], *run.prompts["negatives"]]), "object")
    resize = settings.resolution != own_resolution and not merge  # a merged model has its own
    revision = f", revision={json.dumps(settings.revision)}" if settings.revision else ""
    if merge:
        imports, source = [], "name"
        names = 'name = "."  # this folder, or its name on the Hub'
        model = "Sam3Model.from_pretrained(name, dtype=torch.float32)"
    else:
        imports, source = ["from peft import PeftModel"], f"base{revision}"
        names = f"base = {json.dumps(settings.name)}\n"
        names += 'adapter = "."  # this folder, or its name on the Hub'
        options = f"base{revision}, dtype=torch.float32{', config=config' if resize else ''}"
        model = f"PeftModel.from_pretrained(Sam3Model.from_pretrained({options}), adapter)"
    lines = [
        "import torch",
        *imports,
        f"from transformers import {'Sam3Config, ' if resize else ''}Sam3Model, Sam3Processor",
        "from transformers.image_utils import load_image",
        "",
        names,
        'image = load_image("photo.jpg")',
        "torch.set_grad_enabled(False)",
        *(_resize_lines(source, settings.resolution) if resize else []),
        "",
        f"model = {model}.eval()",
        f"processor = Sam3Processor.from_pretrained({source})",
        f"inputs = processor(images=image, text={json.dumps(prompt)}"
        f'{", size=size" if resize else ""}, return_tensors="pt")',
        "outputs = model(**inputs)",
        "[found] = processor.post_process_instance_segmentation(",
        f"    outputs, threshold={evaluation.score_threshold:g}, "
        f"mask_threshold={evaluation.mask_threshold:g}, target_sizes=[image.size[::-1]]",
        ")",
    ]
    return "\n".join(lines)


def _resize_lines(source, resolution):
    """Return the lines that bring the configuration of a base to the resolution of the run."""
    return [
        f'size = {{"height": {resolution}, "width": {resolution}}}',
        f"config = Sam3Config.from_pretrained({source})",
        'config = Sam3Config(**getattr(config, "detector_config", config.to_dict()))',
        f"config.image_size = {resolution}",
    ]


def _training(run):
    """Return what was trained, on what, and with which versions."""
    config, metrics, prompts = run.config, run.metrics, run.prompts
    asked = ", ".join(f'"{name}" on {count}' for name, count in prompts["prompts"].items())
    absent = ", ".join(f'"{name}"' for name in prompts["negatives"])
    adapted = run.adapter[run.adapter["modules"] > 0]
    where = ", ".join(
        f"{name.replace('_', ' ')} {row['modules']:.0f}"
        for name, row in adapted.drop(index="total").iterrows()
    )
    total = run.adapter.loc["total"]
    kept = metrics["best_step"] or f"{metrics['steps']}, the last"
    packages = read_json(run.folder / VERSIONS_FILE, fix="train again")["packages"]
    lines = [
        f"Prompts with objects, and the training images that show them: {asked or 'none'}.",
        f"{prompts['negatives_per_image']} absent prompts per image, drawn from {absent or 'none'}.",
        f"{metrics['objects']['train']} objects reached the loss in an epoch.",
        f"LoRA of rank {config.lora.rank} and alpha {config.lora.alpha:g} on "
        f"{total['modules']:.0f} linear layers ({where}): {total['parameters']:,.0f} parameters, "
        f"{total['share']:.2%} of all.",
        f"{metrics['epochs']:g} epochs, {metrics['steps']} steps, peak learning rate "
        f"{config.effective_learning_rate:g}, loss `{config.loss.variant}`, "
        f"{config.model.resolution} pixels, seed {config.training.seed}. Kept: step {kept}.",
        f"Training loss {metrics['train_loss']['first']:.4g} at first, "
        f"{metrics['train_loss']['last']:.4g} at last.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in packages.items()) + ".",
        f"Configuration `{config.fingerprint()}` (`config.yaml`)",
    ]
    if fingerprint := metrics.get("data_fingerprint"):
        lines[-1] += f", training data `{fingerprint}`"
    lines[-1] += "."
    return lines


def _metric_rows(valid):
    """Return a row for each metric that has a value."""
    threshold = valid.get("score_threshold")
    rows = [
        f"| {name} | {valid[name]:.4g} | {meaning} |"
        for name, meaning in _MEANING.items()
        if valid.get(name) is not None
    ]
    if threshold is not None:
        rows.append(f"| score_threshold | {threshold:g} | the threshold that counts here |")
    return rows


def _limits(run, merge):
    """Return what a user of the result has to know, the notes of the run among it."""
    limits = [f"{note[0].upper()}{note[1:]}." for note in run.metrics["notes"]]
    limits += [
        "One seed; another one gives other numbers.",
        "Prompts other than those above were never asked in training. A prompt that is absent from "
        "the image was only taught for the absent prompts listed above.",
        "Photographs unlike those of the training, other cameras, distances or materials, were not "
        "tried.",
        "Masks come from a grid coarser than the image, so a thin line has no exact outline.",
    ]
    if not is_on_hub(run.config.model.name) and not merge:
        limits.append(
            "The base is a folder where it was trained; the adapter is of no use without."
        )
    if run.config.model.name.startswith("facebook/sam3"):
        limits.append("SAM3 is under Meta's SAM License, which goes with what is derived from it.")
    else:
        limits.append("The licence is that of the base and of the photographs; it is not set here.")
    return limits
