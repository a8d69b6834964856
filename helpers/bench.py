"""Time the parts of a step on the embedded base: ``python -m helpers.bench``."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from helpers.adapters import add_lora
from helpers.annotations import read_split
from helpers.config import load_config
from helpers.datasets import PromptCollator, PromptDataset
from helpers.environment import device, versions_line
from helpers.errors import InputError
from helpers.losses import sam3_losses
from helpers.paths import CONFIGS, RUNS, resolve
from helpers.sam3 import load_base


def bench(profile="tiny", min_seconds=2.0):
    """Measure a vision pass, a prompt pass and a training step on the first training image.

    Parameters
    ----------
    profile : str
        Overlay of ``configs/crack_detection_config.yaml``.
    min_seconds : float
        Each part is repeated for at least this long.

    Returns
    -------
    dict
        ``versions``, ``device``, ``image_pixels``, ``prompts`` (per image) and
        ``median_seconds`` of ``vision_pass`` (one image), ``prompt_pass`` (all its prompts on
        computed features) and ``training_step`` (forward, loss, backward and AdamW of LoRA).
    """
    config = load_config(CONFIGS / "crack_detection_config.yaml", profile=profile)
    torch.manual_seed(config.training.seed)
    place = device()["device"]
    model, inputs, targets = _first_image(config, place)
    model = add_lora(model, config.lora).to(place)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def vision_pass():
        with torch.no_grad():
            return model.get_base_model().vision_encoder(inputs["pixel_values"])

    features = vision_pass()
    prompts = {key: value for key, value in inputs.items() if key != "pixel_values"}

    def prompt_pass():
        with torch.no_grad():
            model(vision_embeds=features, **prompts)

    def training_step():
        optimizer.zero_grad()
        sam3_losses(model(**inputs), targets, config.loss.variant)["total"].backward()
        optimizer.step()

    parts = {part.__name__: part for part in (vision_pass, prompt_pass, training_step)}
    return {
        "versions": versions_line(),
        "device": device(),
        "image_pixels": config.model.resolution,
        "prompts": len(targets),
        "median_seconds": {name: _median(part, min_seconds) for name, part in parts.items()},
    }


def _first_image(config, place):
    """Load the base, and the first training image with all its prompts, onto a device."""
    model, processor = load_base(
        config.model.name, config.model.revision, resolution=config.model.resolution
    )
    dataset = PromptDataset(
        read_split(config.data.data_dir, config.data.train_split),
        processor,
        resolution=model.resolution,
        mask_size=model.mask_size,
        num_negatives=config.data.num_negatives,
        negative_prompts=config.data.negative_prompts,
    )
    batch = PromptCollator(processor)([dataset[0]])
    keys = ("pixel_values", "input_ids", "attention_mask", "image_index")
    inputs = {key: batch[key].to(place) for key in keys}
    targets = [
        {key: value.to(place) for key, value in target.items()} for target in batch["targets"]
    ]
    return model, inputs, targets


def _median(part, min_seconds):
    """Return the median time of a function in seconds; the timer waits for the accelerator."""
    from torch.utils.benchmark import Timer  # looks for a compiler and warns: not on every import

    timer = Timer("part()", globals={"part": part}, num_threads=torch.get_num_threads())
    return round(timer.blocked_autorange(min_run_time=min_seconds).median, 5)


def main(arguments=None):
    """Run the benchmark and write its numbers as JSON.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program name.

    Returns
    -------
    int
        0 done, 2 unusable input.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers.bench", description=__doc__)
    parser.add_argument("--profile", default="tiny", help="tiny (default) or sam3")
    parser.add_argument("--output", type=resolve, default=RUNS / "bench.json")
    options = parser.parse_args(arguments)
    try:
        text = json.dumps(bench(options.profile), indent=2)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
