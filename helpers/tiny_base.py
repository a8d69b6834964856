"""Train the embedded base from scratch: ``python -m helpers.tiny_base``.

The result, ``data/tiny_sam3``, is a real `transformers.Sam3Model` that knows ten things on walls and
has never met a crack. The recipe differs from fine-tuning in two ways, each needed for a model that
starts from nothing: queries that match nothing are pushed down by their own probability rather than
its square; and further sets of queries, dropped afterwards, give every object several one-to-one
teachers (Chen et al., Group DETR, ICCV 2023).
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import CLIPTokenizer, Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput, inverse_sigmoid

from helpers.errors import InputError
from helpers.losses import box_terms, mask_terms, semantic_terms
from helpers.matching import hungarian_match
from helpers.paths import RUNS
from helpers.tiny_model import build_tiny_model, spread_boxes
from helpers.tiny_scenes import Example, augment, draw_prompts, make_examples, to_pixels
from helpers.vocabulary import MAX_TEXT_TOKENS, build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything the training run depends on; stored beside the weights.

    Attributes
    ----------
    walls : int
        Rendered training scenes.
    steps, warmup_steps, decay_steps : int
        Optimiser steps in all, of the linear warm-up, and of the cosine decay at the end. Until the
        decay begins a run does not depend on ``steps``.
    images, prompts : int
        Images per step and prompts per image.
    extra_groups : int
        Further sets of queries during training.
    learning_rate, weight_decay, max_grad_norm, ema_decay : float
        AdamW; averaged weights are what is saved.
    """

    seed: int = 7
    walls: int = 9000
    steps: int = 5500
    warmup_steps: int = 200
    decay_steps: int = 1600
    images: int = 8
    prompts: int = 4
    extra_groups: int = 2
    learning_rate: float = 1.0e-3
    weight_decay: float = 0.02
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998


WEIGHTS = {
    "loss_ce": 2.0,
    "presence_loss": 2.0,
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_mask": 20.0,
    "loss_dice": 3.0,
    "loss_semantic_seg": 10.0,
    "loss_semantic_dice": 2.0,
}
POSITIVE_WEIGHT = 3.0


class QueryGroups(nn.Module):
    """Query embeddings and reference boxes of the extra sets, used in training only."""

    def __init__(self, decoder: nn.Module, count: int):
        super().__init__()
        queries, width = decoder.query_embed.weight.shape
        self.embeddings = nn.ParameterList([nn.Parameter(torch.randn(queries, width)) for _ in range(count)])
        self.boxes = nn.ParameterList(
            [nn.Parameter(spread_boxes(queries, (g + 1) / (count + 1))) for g in range(count)]
        )

    def parameters_of(self, group: int) -> dict[str, torch.Tensor]:
        """Return what replaces the decoder's own queries."""
        return {"query_embed.weight": self.embeddings[group], "reference_points.weight": self.boxes[group]}


def make_batch(examples: Sequence[Example], tokenizer: CLIPTokenizer, recipe: Recipe, step: int) -> dict:
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
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt")
    return {
        "pixel_values": to_pixels([example.image for example in chosen]),
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "image_index": torch.tensor(image_index),
        "targets": targets,
    }


def encode(model: Sam3Model, batch: dict) -> dict:
    """Run the encoders and the DETR encoder; the vision encoder sees each image once."""
    vision = model.get_vision_features(pixel_values=batch["pixel_values"])
    index = batch["image_index"]
    coarse, positions = vision.fpn_hidden_states[-2], vision.fpn_position_encoding[-2]
    text = model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    mask = batch["attention_mask"].bool()
    fused = model.detr_encoder(
        vision_features=[coarse[index]],
        text_features=text,
        vision_pos_embeds=[positions[index]],
        text_mask=mask,
    )
    return {"levels": vision.fpn_hidden_states[:-1], "text": text, "text_mask": mask, "fused": fused}


def decode(model: Sam3Model, encoded: dict, rows: torch.Tensor, queries: dict | None = None) -> dict:
    """Run the decoder on some rows, with the model's own queries or with ``queries`` in their place."""
    fused, mask = encoded["fused"], encoded["text_mask"][rows]
    arguments = {
        "vision_features": fused.last_hidden_state[rows],
        "text_features": fused.text_features[rows],
        "vision_pos_encoding": fused.pos_embeds_flattened[rows],
        "text_mask": mask,
        "spatial_shapes": fused.spatial_shapes,
    }
    out = functional_call(model.detr_decoder, queries or {}, (), arguments)
    hidden = out.intermediate_hidden_states
    boxes = (inverse_sigmoid(out.reference_boxes) + model.detr_decoder.box_head(hidden)).sigmoid()
    logits = model.dot_product_scoring(hidden, fused.text_features[rows], mask).squeeze(-1)
    return {"hidden": hidden, "boxes": boxes, "logits": logits, "presence": out.presence_logits}


def score_loss(logits: torch.Tensor, matches: list, ious: torch.Tensor, num_boxes: float) -> torch.Tensor:
    """Matched queries learn the square root of their box's IoU, the others zero, weighted by p."""
    rows = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(matches)])
    queries = torch.cat([q for q, _ in matches])
    logits = logits.float()
    target = torch.zeros_like(logits)
    target[rows, queries] = ious.clamp(min=0.01).sqrt()
    weight = logits.sigmoid().detach()
    weight[rows, queries] = POSITIVE_WEIGHT
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weight * loss).sum() / num_boxes


def detection_terms(decoded: dict, targets: list[dict], prefix: str = "") -> tuple[dict, list]:
    """Score and box terms of every decoder layer, and the last layer's matches."""
    num_boxes = max(1.0, float(sum(len(t["boxes_cxcywh"]) for t in targets)))
    terms, matches = {}, []
    for layer, (logits, boxes) in enumerate(zip(decoded["logits"], decoded["boxes"], strict=True)):
        matches = hungarian_match({"pred_logits": logits, "pred_boxes_cxcywh": boxes}, targets)
        boxed, ious = box_terms(boxes, targets, matches, num_boxes)
        terms |= {f"{prefix}{layer}.{name}": value for name, value in boxed.items()}
        terms[f"{prefix}{layer}.loss_ce"] = score_loss(logits, matches, ious, num_boxes)
    return terms, matches


def training_terms(model: Sam3Model, groups: QueryGroups, batch: dict) -> tuple[dict, dict]:
    """Compute all loss terms of one step and the two numbers that betray collapsed queries."""
    encoded = encode(model, batch)
    present = torch.tensor([len(t["boxes_cxcywh"]) > 0 for t in batch["targets"]])
    rows = present.nonzero()[:, 0]
    targets = [batch["targets"][row] for row in rows]
    decoded = decode(model, encoded, torch.arange(len(present)))
    labels = present.float()[None, :, None].expand_as(decoded["presence"])
    terms = {"presence_loss": F.binary_cross_entropy_with_logits(decoded["presence"], labels)}
    own = {name: decoded[name][:, rows] for name in ("hidden", "boxes", "logits")}
    masks = model.mask_decoder(
        decoder_queries=own["hidden"][-1],
        backbone_features=[level[batch["image_index"][rows]] for level in encoded["levels"]],
        encoder_hidden_states=encoded["fused"].last_hidden_state[rows],
        prompt_features=encoded["text"][rows],
        prompt_mask=encoded["text_mask"][rows],
    )
    terms |= semantic_terms(masks.semantic_seg, targets)
    if not targets:
        return terms, {}
    found, matches = detection_terms(own, targets)
    num_boxes = float(sum(len(t["boxes_cxcywh"]) for t in targets))
    terms |= found | mask_terms(masks.pred_masks, targets, matches, num_boxes)
    for group in range(len(groups.embeddings)):
        extra = decode(model, encoded, rows, groups.parameters_of(group))
        terms |= detection_terms(extra, targets, prefix=f"group{group}.")[0]
    return terms, _query_health(own, matches)


@torch.no_grad()
def _query_health(own: dict, matches: list) -> dict[str, float]:
    probability = own["logits"][-1].sigmoid()
    matched = torch.zeros_like(probability, dtype=torch.bool)
    for row, (queries, _) in enumerate(matches):
        matched[row, queries] = True
    gap = probability[matched].mean() - probability[~matched].mean()
    return {"query_std": float(own["hidden"][-1].std(1).mean()), "score_gap": float(gap)}


def total_loss(terms: dict[str, torch.Tensor], layers: int, groups: int) -> torch.Tensor:
    """Weigh the terms; those repeated over decoder layers and query groups are averaged over them."""
    total = 0.0
    for name, value in terms.items():
        share = 1.0 if "." not in name else 1 / layers
        share *= 1 / groups if name.startswith("group") else 1.0
        total = total + WEIGHTS[name.rpartition(".")[2]] * share * value
    return total


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a plateau, and a cosine from 1 to 0.02 over the last ``decay_steps``."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = max(0.0, 1 - (recipe.steps - step) / recipe.decay_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class BaseTrainer:
    """Hold what a run needs, step it, and put it on disk so that a killed run goes on.

    Parameters
    ----------
    recipe : Recipe
        What to train.
    folder : pathlib.Path
        Receives the tokenizer, ``checkpoint.pt`` and ``curves.csv``.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe, self.folder = recipe, folder
        self.tokenizer = build_tokenizer(folder / "tokenizer")
        self.model = build_tiny_model(len(self.tokenizer), recipe.seed)
        self.groups = QueryGroups(self.model.detr_decoder, recipe.extra_groups)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        self.trained = nn.ModuleList([self.model, self.groups])
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.step, self.curves = 0, []

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint under another name first, so that a kill leaves the old one."""
        state = {"recipe": asdict(self.recipe), "step": self.step, "curves": self.curves}
        state |= {name: getattr(self, name).state_dict() for name in ("trained", "average", "optimizer")}
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def resume(self) -> bool:
        """Load the checkpoint if there is one of the same recipe; tell whether there was."""
        if not self._checkpoint.exists():
            return False
        state = torch.load(self._checkpoint, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise InputError(
                "the checkpoint comes from another recipe",
                where=str(self._checkpoint),
                fix="delete the folder, or pass the recipe it was started with",
            )
        for name in ("trained", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.curves = state["step"], state["curves"]
        return True

    def train_step(self, examples: Sequence[Example]) -> dict[str, float]:
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
        kept = {n.removeprefix(last): v.item() for n, v in terms.items() if "." not in n or n.startswith(last)}
        return {"loss": loss.item(), **kept, **health}


def train_base(recipe: Recipe, folder: Path, save_every: int = 250) -> BaseTrainer:
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
