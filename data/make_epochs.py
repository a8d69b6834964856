"""Train the failing and the fixed config and draw one wall by epoch: ``python -m data.make_epochs``.

It takes minutes of one core. The sentence about the picture is stored in the file as its comment.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import TrainerCallback

from helpers.config import load_config
from helpers.data import read_split
from helpers.detect import Predictor
from helpers.environment import quieten
from helpers.errors import InputError
from helpers.files import CONFIGS, ROOT, WALL_CRACKS, staged_folder
from helpers.lab import read_split_wrong_keys
from helpers.model import load_base
from helpers.show.pictures import annotate_detections, as_picture
from helpers.train import train

EPOCHS_GIF = ROOT / "notebooks" / "figures" / "epochs.gif"
WORD, THRESHOLD = "crack", 0.3
NUM_EPOCHS = 5  # of the fixed config with the tiny profile
MAX_BYTES = 400_000
# The failing run is that of lesson 02: its loss, its word, no absent prompts.
FAILING = ("loss.variant=early", "data.prompt=object", "evaluation.absent_prompts=[]")
FAILING += ("evaluation.metric_for_best=AP50", "training.gradient_accumulation_steps=2")
COMMON = ("training.seed=42", "training.num_epochs=50", "training.num_workers=0")


class Answers(TrainerCallback):
    """What the model detects on one picture before training and after each epoch."""

    def __init__(self, processor, picture):
        self.processor, self.picture, self.predictions = processor, picture, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Ask the base."""
        self._ask(model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """Ask the model as it stands."""
        self._ask(model)

    def _ask(self, model):
        was_training, predictor = model.training, Predictor(model.eval(), self.processor)
        with torch.no_grad():
            [answer] = predictor.predict(self.picture, WORD, THRESHOLD)
        model.train(was_training)
        self.predictions.append(answer)


def answers_by_epoch(folder, picture):
    """Train both runs; return ``{"failing run": [...], "fixed run": [...]}`` of `Prediction`."""
    splits = {name: read_split_wrong_keys(WALL_CRACKS, name) for name in ("train", "valid")}
    lost = {"train_split": splits["train"], "val_split": splits["valid"], "allow_empty": True}
    runs = {"failing run": ("full_lora", FAILING, lost), "fixed run": ("crack_detection", (), {})}
    answers = {}
    for name, (config_name, overrides, options) in runs.items():
        path = CONFIGS / f"{config_name}_config.yaml"
        config = load_config(path, "tiny", overrides=(*COMMON, *overrides))
        base = config.model
        _, processor = load_base(base.name, base.revision, resolution=base.resolution)
        asked = Answers(processor, picture)
        train(config, output_dir=Path(folder) / config_name, callbacks=[asked], **options)
        answers[name] = asked.predictions
    return answers


def frames(picture, answers):
    """Draw one frame per epoch, the failing run above the fixed one; return a list of PIL.Image."""
    drawn = []
    for epoch, pair in enumerate(zip(*answers.values(), strict=True)):
        figure = Figure(figsize=(3.2, 6.6), dpi=100, layout="constrained")
        figure.suptitle("before training" if epoch == 0 else f"after epoch {epoch}", fontsize=12)
        for axes, name, answer in zip(figure.subplots(2), answers, pair, strict=True):
            shown = annotate_detections(picture, answer.detections)
            axes.imshow(shown if answer.detections else as_picture(picture))
            axes.set_title(name, fontsize=11)
            axes.set_xticks([])
            axes.set_yticks([])
            count = len(answer.detections)
            axes.set_xlabel(f"max score {answer.max_score:.3f}, {count} detected", fontsize=11)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        drawn.append(Image.open(stream).convert("RGB"))
    return drawn


def sentence(answers):
    """Return what the pictures show, as their alternative text."""
    scores = {
        name: ", ".join(f"{one.max_score:.3f}" for one in predictions)
        for name, predictions in answers.items()
    }
    listed = "; ".join(f"{name} {numbers}" for name, numbers in scores.items())
    epochs = len(next(iter(answers.values()))) - 1
    return (
        f"One test wall, asked for {WORD}, before training and after each of {epochs} epochs. "
        f"Highest score: {listed}."
    )


def write_gif(path, drawn, comment):
    """Write frames as a GIF that repeats, with one palette for all; return its bytes."""
    palette = drawn[-1].quantize(96, dither=Image.Dither.NONE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]
    with staged_folder(path.parent) as staging:
        durations = [900] * (len(indexed) - 1) + [2500]  # milliseconds
        options = {"save_all": True, "append_images": indexed[1:], "loop": 0, "optimize": True}
        options |= {"duration": durations, "comment": comment.encode()}
        indexed[0].save(staging / path.name, **options)
        size = (staging / path.name).stat().st_size
        if size >= MAX_BYTES:
            raise InputError(f"has {size} bytes", where=path, fix="draw fewer or smaller frames")
    return size


def main(arguments=None):
    """Train, draw and write; return 0."""
    parser = argparse.ArgumentParser(prog="python -m data.make_epochs", description=__doc__)
    parser.add_argument("--output", type=Path, default=EPOCHS_GIF)
    options = parser.parse_args(arguments)
    quieten()
    wall = next(record for record in read_split(WALL_CRACKS, "test").records if record.objects)
    with tempfile.TemporaryDirectory() as folder:
        answers = answers_by_epoch(folder, wall.path)
    size = write_gif(options.output, frames(wall.path, answers), sentence(answers))
    print(f"{sentence(answers)} {options.output.name}: {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
