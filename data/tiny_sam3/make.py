"""Train the embedded base from scratch: ``python -m data.tiny_sam3.make``.

The result, ``data/tiny_sam3``, is a real `transformers.Sam3Model` that knows ten things on walls and
has never met a crack. The recipe differs from fine-tuning in two ways, each needed for a model that
starts from nothing: queries that match nothing are pushed down by their own probability rather than
its square; and further sets of queries, dropped afterwards, give every object several one-to-one
teachers (Chen et al., Group DETR, ICCV 2023).
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import CLIPTokenizer, Sam3ImageProcessor, Sam3Processor

from data.tiny_sam3.make_examples import augment, draw_prompts, make_examples, to_pixels
from data.tiny_sam3.make_losses import QueryGroups, total_loss, training_terms
from data.tiny_sam3.make_model import IMAGE_SIZE, MASK_SIZE, build_tiny_model
from data.tiny_sam3.make_score import score_base
from data.tiny_sam3.make_vocabulary import MAX_TEXT_TOKENS, build_tokenizer
from helpers.detect.predictor import Predictor
from helpers.environment import versions_line
from helpers.errors import InputError
from helpers.files import RUNS, TINY_BASE, staged_folder, write_json
from helpers.model.sam3 import load_base


@dataclass(frozen=True)
class Recipe:
    """Everything the training run depends on; stored beside the weights.

    Until the decay begins a run does not depend on ``steps``. Averaged weights are what is saved.
    """

    seed: int = 7
    walls: int = 9000  # rendered training scenes
    steps: int = 3000  # optimiser steps in all
    warmup_steps: int = 200  # linear
    decay_steps: int = 1000  # cosine, at the end
    images: int = 8  # per step
    prompts: int = 4  # per image
    extra_groups: int = 2  # further sets of queries during training
    learning_rate: float = 1.0e-3
    weight_decay: float = 0.02
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998

    @property
    def plateau_end(self):
        """The step at which the learning rate begins to fall."""
        return self.steps - self.decay_steps


def make_batch(examples, tokenizer, recipe, step, draw_prompts=draw_prompts):
    """Draw one step's images and prompts; depends on the seed and the step alone."""
    rng = np.random.default_rng((recipe.seed, 1, step))
    chosen = [augment(rng, examples[i]) for i in rng.integers(0, len(examples), recipe.images)]
    texts, targets, image_index = [], [], []
    for row, example in enumerate(chosen):
        for text, concept in draw_prompts(rng, example.concepts, recipe.prompts):
            keep = np.array([noun == concept for noun in example.concepts], bool)
            boxes = torch.from_numpy(example.boxes_xyxy[keep].copy())
            centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            masks = torch.from_numpy(example.masks[keep].astype(np.float32))
            targets.append({"boxes_cxcywh": torch.cat([centre, size], 1), "masks": masks})
            texts.append(text)
            image_index.append(row)
    tokens = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt"
    )
    return {
        "pixel_values": to_pixels([example.image for example in chosen]),
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "image_index": torch.tensor(image_index),
        "targets": targets,
    }


def learning_rate_factor(step, recipe):
    """Linear warm-up, a plateau, and a cosine from 1 to 0.02 over the last ``decay_steps``."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = max(0.0, 1 - (recipe.steps - step) / max(recipe.decay_steps, 1))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class BaseTrainer:
    """What a run needs, one step of it, and a checkpoint from which a killed run goes on."""

    def __init__(self, recipe, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe, self.folder = recipe, folder
        self.tokenizer = self._own_tokenizer(folder / "tokenizer")
        self.model = build_tiny_model(len(self.tokenizer), recipe.seed)
        self.groups = QueryGroups(self.model.detr_decoder, recipe.extra_groups)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay)
        )
        self.trained = nn.ModuleList([self.model, self.groups])
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.step, self.curves = 0, []

    @staticmethod
    def _own_tokenizer(folder):
        """Load the run's tokenizer, or make it: ties in its training are broken differently each time."""
        if folder.is_dir():
            return CLIPTokenizer.from_pretrained(folder)
        return build_tokenizer(folder)

    @property
    def _checkpoint(self):
        return self.folder / "checkpoint.pt"

    def save(self):
        """Write the checkpoint under another name first, so that a kill leaves the old one."""
        state = {"recipe": asdict(self.recipe), "step": self.step, "curves": self.curves}
        state |= {
            name: getattr(self, name).state_dict() for name in ("trained", "average", "optimizer")
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def resume(self):
        """Load the checkpoint if there is one of the same recipe; tell whether there was.

        Until the decay begins, a run with another number of steps is the same run so far.
        """
        if not self._checkpoint.exists():
            return False
        state = torch.load(self._checkpoint, weights_only=True)
        started, wanted = Recipe(**state["recipe"]), self.recipe
        if state["step"] <= min(started.plateau_end, wanted.plateau_end):
            started = replace(started, steps=wanted.steps, decay_steps=wanted.decay_steps)
        if started != wanted:
            raise InputError(
                "the checkpoint comes from another recipe",
                where=str(self._checkpoint),
                fix="delete the folder, or pass the recipe it was started with",
            )
        for name in ("trained", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.curves = state["step"], state["curves"]
        return True

    def train_step(self, examples):
        """Take one optimiser step and return the numbers worth a curve."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(self.step, recipe)
        batch = make_batch(examples, self.tokenizer, recipe, self.step)
        terms, health = training_terms(self.model, self.groups, batch)
        loss = total_loss(terms, len(self.model.detr_decoder.layers), recipe.extra_groups)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.step}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), recipe.max_grad_norm)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        last = f"{len(self.model.detr_decoder.layers) - 1}."
        kept = {
            n.removeprefix(last): v.item()
            for n, v in terms.items()
            if "." not in n or n.startswith(last)
        }
        return {"loss": loss.item(), **kept, **health}


def train_base(recipe, folder, save_every=250):
    """Train, or go on training, until ``recipe.steps``; returns the trainer with its averaged model."""
    trainer = BaseTrainer(recipe, folder)
    trainer.resume()
    examples = make_examples(recipe.walls, recipe.seed)
    window: list[dict[str, float]] = []
    bar = tqdm(total=recipe.steps, initial=trainer.step, desc="training the base", unit="step")
    while trainer.step < recipe.steps:
        window.append(trainer.train_step(examples))
        bar.update()
        if trainer.step % 50 == 0:
            names = sorted({name for entry in window for name in entry})
            means = {n: float(np.mean([e[n] for e in window if n in e])) for n in names}
            trainer.curves.append({"step": trainer.step, **means})
            bar.set_postfix(loss=f"{means['loss']:.2f}", gap=f"{means.get('score_gap', 0):.2f}")
            window = []
        if trainer.step % save_every == 0 or trainer.step == recipe.steps:
            trainer.save()
    bar.close()
    return trainer


def publish(trainer, folder):
    """Write what `from_pretrained` loads, score it as loaded, and put the record beside it."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = Sam3ImageProcessor(size=size, mask_size={"height": MASK_SIZE, "width": MASK_SIZE})
    with staged_folder(folder) as staged:
        trainer.average.module.save_pretrained(staged)
        Sam3Processor(images, trainer.tokenizer, target_size=IMAGE_SIZE).save_pretrained(staged)
        scores = score_base(Predictor(*load_base(staged)))
        record = {
            "recipe": asdict(trainer.recipe),
            "versions": versions_line(),
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "scores": scores,
        }
        write_json(staged / "training_record.json", record)
        pd.DataFrame(trainer.curves).to_csv(
            staged / "training_curves.csv", index=False, float_format="%.5g"
        )
    return scores


def main():
    """Train the base, or finish a run that was cut off, and write it to ``data/tiny_sam3``."""
    parser = argparse.ArgumentParser(
        description="Train the course's embedded SAM3 from scratch, resuming by itself."
    )
    parser.add_argument(
        "--output", type=Path, default=TINY_BASE, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=RUNS / "tiny_base", help="checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=Recipe.steps, help="optimiser steps (default: %(default)s)"
    )
    parser.add_argument(
        "--decay-steps",
        type=int,
        default=Recipe.decay_steps,
        help="the last of them, in which the learning rate falls (default: %(default)s)",
    )
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, decay_steps=arguments.decay_steps)
    trainer = train_base(recipe, arguments.work)
    for name, value in publish(trainer, arguments.output).items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
