"""Stop a training run as soon as a known fault shows, before GPU hours are spent on it.

Each guard has a key in the config section ``guards`` and watches what the loss really sees. The
numbers of all batches of an optimiser step are summed over the processes and looked at once, before
the step changes a weight: all processes stop at the same step. No random number is drawn.
"""

import math
from collections import deque

import torch
from accelerate.utils import gather_object, reduce
from transformers import TrainerCallback

from helpers.causes import CAUSES
from helpers.config import GuardSection
from helpers.errors import InputError
from helpers.model import losses
from helpers.model.audit import adapter_report

# Optimiser steps over which a guard averages what a single step may show by chance.
WINDOW = 5
# A batch with objects costs 7 or more in the healthy runs of this project. Without objects SAM3's
# own loss cannot fall below 4.5e-4 per decoder layer, that of the failing script falls to 1e-5.
VANISHING_LOSS = 1e-3
# Of the weighted loss, over `WINDOW` steps, from batches with objects. Healthy runs start with
# 0.7 for the presence term, which cannot exceed 0.9 beside boxes and masks that are unlearned.
DOMINANT_SHARE = 0.95
# Of all logits, and above the share in the first step, which is the base's; healthy runs: 0.03.
SHARE_AT_CLAMP, CLAMP_RISE = 0.5, 0.25
# Optimiser steps with objects and a learning rate above 0 after which every B must have moved.
ADAPTER_STEPS = 3
# Overflowing steps in a row that fp16 may need until its scale fits: 65536 is halved each time.
SKIPPED_STEPS = 20
# Probability of a false alarm at which 'none so far' counts as 'none'.
CHANCE = 1e-6
# For a loop of which nothing is known: images that may pass without an object, and the steps that
# count as its first epoch.
PATIENCE, FIRST_STEPS = 50, 200
_TERMS = (("box", "giou", "l1"), ("mask", "dice"))  # parts of the names of box and mask terms
_NUMBERS = ("batches", "images", "objects", "absent", "masks", "box_terms", "mask_terms")
_NUMBERS += ("total", "share_at_clamp")
# Guards that training on purpose without objects (``allow_empty``) would set off.
OFF_IF_EMPTY = ("no_objects", "vanishing_loss", "at_clamp")


class GuardStop(InputError):
    """A guard stopped the run; `cause` is a key of `helpers.causes.CAUSES`, which has the fix."""

    def __init__(self, cause, message, *, where=None, fix=None):
        super().__init__(message, where=where, fix=fix or CAUSES[cause].fix)
        self.cause = cause


class Guards(TrainerCallback):
    """Watch a training run and raise `GuardStop` before an optimiser step, in all processes.

    Parameters
    ----------
    config : helpers.config.Config, optional
        Of a training of this package. Without it all guards are on, in a loop of your own::

            guards = Guards()  # before the loop
            ...  # in it, between loss.backward() and optimizer.step()
            guards.step(loss_terms=terms, num_objects=sum(len(t["boxes"]) for t in targets), model=model)

        In a `transformers.Trainer`, call `note` in ``compute_loss`` with all but the model, and add the
        guards as a callback.
    queries : pandas.DataFrame, optional
        The training data as `count_objects` counts them: how often a thing is to be expected.
    allow_empty : bool
        Without the guards `OFF_IF_EMPTY`.
    """

    def __init__(self, config=None, queries=None, *, allow_empty=False):
        self.weights = {} if config is None else losses.WEIGHTS[config.loss.variant]
        keys = GuardSection.model_fields
        self.active = {key for key in keys if config is None or getattr(config.guards, key)}
        self.active -= {*OFF_IF_EMPTY} if allow_empty else set()
        self._images_until = {"objects": PATIENCE, "absent": math.inf}
        if queries is not None:
            by_image = queries.groupby("image_id")["num_objects"]
            self._images_until = {
                "objects": _images_until_seen((by_image.sum() > 0).mean(), len(by_image)),
                "absent": _images_until_seen((by_image.min() == 0).mean(), len(by_image)),
            }
        self._batches, self._number, self._first_steps = [], 0, FIRST_STEPS
        self._window, self._with_objects = deque(maxlen=WINDOW), deque(maxlen=WINDOW)
        self._seen = {"images": 0, "objects": 0, "absent": 0}
        self._learned_steps = self._overflows = 0
        self._first_share = None

    def are_finite(self, outputs, targets):
        """Return whether outputs and boxes can be matched; always True if `not_finite` is off."""
        if "not_finite" not in self.active:
            return True
        names = ("pred_logits", "pred_boxes_cxcywh", "presence_logits")
        sums = [outputs[name].detach().float().sum() for name in names]
        sums += [target["boxes_cxcywh"].float().sum() for target in targets]
        return bool(torch.stack(sums).isfinite().all())

    def observe(self, inputs, total, terms, share_at_clamp):
        """Note a batch, its weighted loss and unweighted terms, without waiting for the GPU."""
        targets = inputs["targets"]
        objects = [len(target["boxes_cxcywh"]) for target in targets]
        num_masks = torch.stack([target["mask_valid"].sum() for target in targets]).sum()
        num_images = int(inputs["image_index"][-1]) + 1
        counts = (num_images, sum(objects), objects.count(0), num_masks)
        # Of the last layer; a batch that could not be matched has none.
        box_terms = terms.get("loss_bbox", 0) + terms.get("loss_giou", 0)
        mask_terms = terms.get("loss_mask", 0) + terms.get("loss_dice", 0)
        image_ids = sorted({query["image_id"] for query in inputs["queries"]})
        weighted = [(name.rpartition(".")[2], value) for name, value in terms.items()]
        weighted = [(n, self.weights[n] * v) for n, v in weighted if n in self.weights]
        self._keep(image_ids, counts, (box_terms, mask_terms), total, share_at_clamp, weighted)

    def note(
        self,
        *,
        loss_terms,
        num_objects,
        num_images=1,
        num_masks=0,
        num_absent=None,
        share_at_clamp=0.0,
        image_ids=(),
    ):
        """Note a batch of any loop.

        `loss_terms` are the terms as they are added up, dict of str to scalar; their sum, or the entry
        ``loss``, is the loss. Terms with "box", "giou" or "l1" in their names are those of boxes, with
        "mask" or "dice" those of masks. `num_masks` objects have a mask, `num_absent` prompts no object.
        """
        terms = {
            name: torch.as_tensor(value).detach().float() for name, value in loss_terms.items()
        }
        total = terms.pop("loss", None)
        total = sum(terms.values()) if total is None else total
        parts = []
        for words in _TERMS:
            values = [v for n, v in terms.items() if any(word in n.lower() for word in words)]
            parts.append(sum(values) if values else 1.0)
        if num_absent is not None:
            self._images_until["absent"] = PATIENCE
        self.weights = dict.fromkeys(terms, 1.0)
        counts = (num_images, num_objects, num_absent or 0, num_masks)
        self._keep(list(image_ids), counts, parts, total, share_at_clamp, terms.items())

    def step(self, *, model, **batch):
        """Note one batch, see `note`, and judge it, after its backward pass."""
        self.note(**batch)
        self._judge(model, self._number, learns=True, patience=0)
        self._number += 1

    def _keep(self, image_ids, counts, parts, total, share_at_clamp, weighted):
        """Keep the `_NUMBERS` of a batch and its weighted terms until the step is judged."""
        values = (1, *counts, *parts, total, share_at_clamp)
        numbers = dict(zip(_NUMBERS, values, strict=True)) | dict.fromkeys(self.weights, 0.0)
        # A batch without objects has a single term: that is no dominance.
        for name, value in weighted if numbers["objects"] else ():
            numbers[name] = numbers[name] + value.detach()
        device = torch.as_tensor(total).device
        values = [torch.as_tensor(value, device=device) for value in numbers.values()]
        self._batches.append((image_ids, torch.stack([v.detach().float() for v in values])))
        self._names = list(numbers)

    def on_train_begin(self, args, state, control, **kwargs):
        """Learn how long an epoch is, and what the first step of an interrupted run showed."""
        self._first_steps = max(WINDOW, state.max_steps / args.num_train_epochs)
        if state.log_history:
            self._first_share = state.log_history[0].get("train_share_at_clamp")

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Judge the batches since the last optimiser step of a `transformers.Trainer`."""
        patience = SKIPPED_STEPS if args.fp16 else 0
        learns = optimizer.param_groups[0]["lr"] > 0
        self._judge(model, state.global_step, learns=learns, patience=patience)

    def _judge(self, model, number, *, learns, patience):
        """Sum up the batches of a step and raise the first fault that shows."""
        image_ids, rows = zip(*self._batches, strict=True)
        self._batches = []
        rows = torch.stack(rows)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients) or [rows.new_zeros(())]).float()
        overflow = (~norms.isfinite().all()).to(rows)
        bad_loss = (~rows[:, _NUMBERS.index("total")].isfinite()).to(rows)
        sums = torch.cat([rows.sum(0), overflow[None], bad_loss.sum()[None]])
        sums = reduce(sums, "sum").tolist()
        step = dict(zip([*self._names, "overflow", "bad_losses"], sums, strict=True))
        step["number"] = number
        self._is_first_epoch = number < self._first_steps
        for name in self._seen:
            self._seen[name] += step[name]
        if self._first_share is None:
            self._first_share = step["share_at_clamp"] / step["batches"]
        self._window.append(step)
        if step["objects"]:
            self._with_objects.append(step)
        self._overflows = self._overflows + 1 if step["overflow"] else 0
        self._learns_now = bool(step["objects"] and learns and not step["overflow"])
        for key, cause, text in self._faults(step, patience, model):
            if key in self.active:
                where, fix = f"guards.{key}", None
                if key == "not_finite":
                    batches = zip(image_ids, bad_loss.tolist(), strict=True)
                    chosen = [ids for ids, is_bad in batches if is_bad or not step["bad_losses"]]
                    names = {name for ids in gather_object(chosen) for name in ids}
                    where = ", ".join(sorted(names)) or where
                    fix = "look at these images with 'python -m helpers check', or lower "
                    fix += "training.learning_rate; with fp16 try bf16"
                raise GuardStop(cause, text, where=where, fix=fix)

    def _mean(self, name):
        """Average a number over the batches of the window."""
        return sum(s[name] for s in self._window) / sum(s["batches"] for s in self._window)

    def _never_seen(self, name):
        """Return whether so many images came by without it that this is no chance."""
        return not self._seen[name] and self._seen["images"] >= self._images_until[name]

    def _faults(self, step, patience, model):
        """Yield guard, cause and sentence of each fault that shows after this step."""
        number, window = step["number"], self._window
        if step["bad_losses"]:
            yield "not_finite", "not_finite", f"the loss is nan or inf at step {number}"
        elif self._overflows > patience:
            text = f"the gradient is nan or inf at step {number}, the loss is not"
            yield "not_finite", "not_finite", text
        if self._never_seen("objects"):
            text = f"no object in the first {self._seen['images']:.0f} images"
            yield "no_objects", "no_objects", text
        for name, things in (("box", "objects"), ("mask", "masks")):
            if step[things] and step[f"{name}_terms"] == 0:
                cause = "no_objects" if name == "box" else "masks_lost"
                text = f"{step[things]:.0f} {things} arrived at step {number}"
                yield "box_and_mask_terms", cause, f"{text}, but the {name} terms of the loss are 0"
        mean, objects = self._mean("total"), sum(step["objects"] for step in window)
        is_judged = self._is_first_epoch and len(window) == WINDOW
        if is_judged and mean < VANISHING_LOSS and (objects or self._never_seen("objects")):
            text = f"the loss averages {mean:.1e} over the last {WINDOW} steps of the first epoch"
            cause = "loss_weights" if objects else "no_objects"
            yield "vanishing_loss", cause, f"{text}, with {objects:.0f} objects in them"
        if self._learned_steps == ADAPTER_STEPS:
            # text prompts give the geometry encoder no gradient
            report = adapter_report(model).drop(index=["total", "geometry_encoder"])
            idle = ", ".join(report.index[report["B_nonzero"] == 0])
            if idle:
                text = f"B of LoRA is still zero in {idle} after {number} steps"
                yield "adapter_at_zero", "adapter_at_zero", text
        self._learned_steps += self._learns_now
        share, first = self._mean("share_at_clamp"), self._first_share
        if len(window) == WINDOW and share > max(SHARE_AT_CLAMP, first + CLAMP_RISE):
            text = f"{share:.0%} of the logits stand at the model's clamps at step {number}"
            yield "at_clamp", "at_clamp", f"{text}, {first:.0%} did at first"
        if self._is_first_epoch and self._never_seen("absent"):
            text = f"no absent prompt was asked of the first {self._seen['images']:.0f} images"
            yield "only_positive_prompts", "only_positive_prompts", text
        sums = {name: sum(step[name] for step in self._with_objects) for name in self.weights}
        name, value = max(sums.items(), key=lambda item: item[1], default=("nothing", 0))
        share = value / (sum(sums.values()) or math.inf)
        is_judged = self._is_first_epoch and len(self._with_objects) == WINDOW
        if is_judged and share > DOMINANT_SHARE:
            text = f"{name} is {share:.1%} of the weighted loss over {WINDOW} steps with objects"
            yield "dominant_term", "loss_weights", text


def _images_until_seen(share, num_images):
    """Count the random images after which one of a kind must have come, but for `CHANCE`."""
    if share in (0, 1):
        return int(share)
    return min(num_images, math.ceil(math.log(CHANCE) / math.log(1 - share)))
