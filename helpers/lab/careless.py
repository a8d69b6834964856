"""A training script as people write it: plain torch, PEFT and one COCO file per split.

Reader, targets, loss, saving, loading, inference and evaluation are its own: no dataset, loss or
predictor of this project takes part. It is correct, unless one of `MISTAKES` is switched on.
"""

import json
import tempfile
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss
from transformers import Sam3Model, Sam3Processor, get_scheduler

from helpers.config import yaml_text
from helpers.files import TINY_BASE, WALL_CRACKS, resolve
from helpers.foreign import write_sompote

PARTS = ("text_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2")
NOUNS = tuple("joint moss stain rust hole bolt tile brick dog car tree door".split())
WEIGHTS = {"ce": 10.0, "presence": 5.0, "bbox": 5.0, "giou": 2.0, "mask": 20.0, "dice": 5.0}
THRESHOLD = 0.3
CONFIG_FILE, LOG_FILE = "training.yaml", "val_stats.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What the script does, which is what its YAML says as long as nobody errs."""

    words: tuple[str, ...] = ()  # asked for the categories, by default their names
    num_negatives: int = 2  # absent words per picture
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.1
    parts: tuple[str, ...] = PARTS  # of the model that get LoRA
    layers: tuple[str, ...] = LAYERS
    learning_rate: float = 3e-3
    epochs: int = 2
    batch_size: int = 2  # pictures
    seed: int = 0


IN_SETTINGS = {
    "trained as object": {"words": ("object",)},
    "no absent prompts": {"num_negatives": 0},
    "dropout of a half": {"dropout": 0.5},
    "word out of reach": {"parts": ("vision_encoder", "mask_decoder")},
    "trained far too hard": {"learning_rate": 3e-2, "epochs": 8},
    "words run together": {"parts": ("text_encoder",), "learning_rate": 6e-2, "epochs": 6},
}
"""Mistakes that are settings, and that the YAML shows."""
NOT_IN_YAML = {
    "flag without effect": {"parts": ("mask_decoder",)},
    "names of another model": {"parts": ("vision_encoder",), "layers": ("fc1", "fc2")},
    "settings hard-coded": {"learning_rate": 6e-4, "epochs": 2},
}
"""Mistakes that are settings other than those of the YAML."""
AFTER_TRAINING = (
    *("loader without effect", "finest level dropped", "presence left out", "threshold fixed"),
    *("masks left at grid size", "boxes left as fractions"),
)
"""Mistakes in lines that act after a training, which may have been a right one."""
IN_CODE = (
    *("wrong keys", "masks swallowed", "emptied by a transform", "boxes in pixels"),
    *("boxes as corners", "categories joined", "nouns in the picture", "base from its config"),
    *("base not frozen", "lora b frozen", "text features detached", "score weight zero"),
    *("sigmoid twice", "many queries per object", "presence at its clamp", "first epoch kept"),
    *("evaluation shifted", "validation crashes", "scores hardly paid", *AFTER_TRAINING),
)
"""Mistakes that are lines of the script."""
MISTAKES = (*IN_SETTINGS, *NOT_IN_YAML, *IN_CODE)


class Careless:
    """One training of the script: `train`, then `save`, `detect`, `evaluate`.

    Parameters
    ----------
    mistakes : sequence of str
        Of `MISTAKES`.
    data_dir, base : os.PathLike
        Dataset with one COCO file per split, and folder of a `Sam3Model` with its processor.
    **settings
        Fields of `Recipe`.

    Attributes
    ----------
    model, processor
        The model under training with PEFT, and the processor of its base.
    log : list of dict
        One entry per epoch.
    """

    def __init__(self, mistakes=(), *, data_dir=WALL_CRACKS, base=TINY_BASE, **settings):
        if unknown := set(mistakes) - {*MISTAKES}:
            raise ValueError(f"no such mistake: {', '.join(unknown)}")
        self.mistakes, self.data_dir, self.base = {*mistakes}, resolve(data_dir), resolve(base)
        self.claimed = Recipe(**settings)
        for name in self.mistakes & IN_SETTINGS.keys():
            self.claimed = replace(self.claimed, **IN_SETTINGS[name])
        self.recipe = self.claimed
        for name in self.mistakes & NOT_IN_YAML.keys():
            self.recipe = replace(self.recipe, **NOT_IN_YAML[name])
        self.random = np.random.default_rng(self.recipe.seed)
        self.processor = Sam3Processor.from_pretrained(self.base)
        self.model, self.log = self.with_lora(), []
        self.loaded = self.model  # what `detect` asks; `load` replaces it

    def with_lora(self):
        """Load the base and put LoRA on it."""
        recipe, model = self.recipe, Sam3Model.from_pretrained(self.base)
        torch.manual_seed(recipe.seed)
        if "base from its config" in self.mistakes:
            model = Sam3Model(model.config)
        inside = "|".join(recipe.parts).replace("text_encoder", "text_encoder.text_model")
        targets = rf"({inside})\.(.*\.)?({'|'.join(recipe.layers)})"
        settings = {"r": recipe.rank, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(model, LoraConfig(**settings, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "base not frozen" in self.mistakes:
                parameter.requires_grad_(True)
            if "lora b frozen" in self.mistakes and ".lora_B" in name:
                parameter.requires_grad_(False)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    # data

    def read(self, split):
        """List the pictures of a split: dicts of the COCO entry, ``path`` and ``objects``."""
        folder = self.data_dir / split
        content = json.loads((folder / "_annotations.coco.json").read_text(encoding="utf-8"))
        ids = [category["id"] for category in content["categories"]]
        names = [category["name"] for category in content["categories"]]
        self.words = dict(zip(ids, cycle(self.recipe.words or names), strict=False))
        entries = content["annotations"]
        if "wrong keys" in self.mistakes:
            entries = content.get("bboxes", [])
        pictures = []
        for image in content["images"]:
            own = [one for one in entries if one["image_id"] == image["id"]]
            objects = [one for one in own if not one.get("iscrowd")]  # as COCO trainers do
            pictures.append({**image, "path": folder / image["file_name"], "objects": objects})
        return pictures

    def questions(self, picture):
        """List (word, objects) to ask about a picture: what it shows, and some absent words."""
        shown = {}
        for one in picture["objects"]:
            shown.setdefault(self.words[one["category_id"]], []).append(one)
        if "categories joined" in self.mistakes and shown:
            words = Counter(self.words[one["category_id"]] for one in picture["objects"])
            shown = {words.most_common(1)[0][0]: picture["objects"]}
        contents = picture.get("contents", [])
        absent = [noun for noun in NOUNS if noun not in {*shown, *contents, *self.words.values()}]
        if "nouns in the picture" in self.mistakes:
            absent = contents or absent
        own = [word for word in dict.fromkeys(self.words.values()) if word not in shown]
        count = self.recipe.num_negatives
        drawn = self.random.choice(absent, min(count, len(absent)), replace=False).tolist()
        return [*shown.items(), *((word, []) for word in [*own, *drawn] if count)]

    def target(self, objects, picture):
        """Return ``boxes`` (n, 4), centre and size as fractions, and ``masks`` (n, h, w)."""
        height, width = picture["height"], picture["width"]
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
        kind = "xyxy" if "boxes as corners" in self.mistakes else "cxcywh"
        boxes = box_convert(boxes, "xywh", kind)
        if "boxes in pixels" not in self.mistakes:
            boxes = boxes / torch.tensor([width, height, width, height])
        masks = np.zeros((len(objects), height, width), np.float32)
        for mask, one in zip(masks, objects, strict=True):
            if "masks swallowed" not in self.mistakes:
                mask[:] = decoded(one["segmentation"], height, width)
        if "emptied by a transform" in self.mistakes and picture["id"] % 2:
            boxes, masks = boxes[:0], masks[:0]
        return {"boxes": boxes, "masks": torch.from_numpy(masks)}

    def batch(self, pictures):
        """Collate pictures and their questions, a row per question; None without any."""
        asked = [self.questions(picture) for picture in pictures]
        rows = [(n, word, own) for n, pairs in enumerate(asked) for word, own in pairs]
        if not rows:
            return None  # nothing is asked about these pictures
        return {
            "pixel_values": self.pixels([opened(picture["path"]) for picture in pictures]),
            "image_index": torch.tensor([number for number, *_ in rows]),
            "image_ids": [picture["path"].name for picture in pictures],
            **self.tokens([word for _, word, _ in rows]),
            "targets": [self.target(objects, pictures[number]) for number, _, objects in rows],
        }

    def batches(self, split="train", order=None):
        """Yield the batches of an epoch."""
        pictures, size = self.read(split), self.recipe.batch_size
        order = range(len(pictures)) if order is None else order(len(pictures))
        pictures = [pictures[number] for number in order]
        for start in range(0, len(pictures), size):
            batch = self.batch(pictures[start : start + size])
            if batch is not None:
                yield batch

    def pixels(self, pictures):
        """Turn PIL images into the input of the model."""
        return self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]

    def tokens(self, words):
        """Turn words into ``input_ids`` and ``attention_mask``."""
        options = {"padding": "max_length", "max_length": 32, "return_tensors": "pt"}
        tokens = self.processor.tokenizer(words, **options)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    # training

    def outputs(self, model, batch):
        """Ask the model every question of a batch; a picture is seen once."""
        names = ("pixel_values", "image_index", "input_ids", "attention_mask")
        pixel_values, index, ids, mask = (batch[name].to(model.device) for name in names)
        vision = model.get_vision_features(pixel_values=pixel_values)
        levels = [level[index] for level in vision.fpn_hidden_states]
        if "finest level dropped" in self.mistakes and not model.training:
            levels[0] = torch.zeros_like(levels[0])
        codes = [level[:1].expand(len(index), -1, -1, -1) for level in vision.fpn_position_encoding]
        vision.fpn_hidden_states, vision.fpn_position_encoding = tuple(levels), tuple(codes)
        text = model.get_text_features(input_ids=ids, attention_mask=mask, return_dict=True)
        if "text features detached" in self.mistakes:
            text.pooler_output = text.pooler_output.detach()
        return model(vision_embeds=vision, text_embeds=text, attention_mask=mask)

    def loss(self, outputs, targets):
        """Return the terms of the loss, not weighted, and their weighted sum ``loss``."""
        count = max(1, sum(len(target["boxes"]) for target in targets))
        terms = {name: outputs.pred_logits.sum() * 0 for name in WEIGHTS}
        for row, target in enumerate(targets):
            presence = outputs.presence_logits[row, 0]
            is_there = torch.full_like(presence, float(len(target["boxes"]) > 0))
            term = F.binary_cross_entropy_with_logits(presence, is_there)
            if "presence at its clamp" in self.mistakes:
                term = F.relu(presence + 30)  # a margin where a class was meant
            terms["presence"] = terms["presence"] + term / len(targets)
            if is_there:
                for name, value in self.row_terms(outputs, row, target).items():
                    terms[name] = terms[name] + value / count
        weights = dict(WEIGHTS)
        if "score weight zero" in self.mistakes:
            weights["ce"] = 0.0
        terms["loss"] = sum(weights[name] * value for name, value in terms.items())
        return terms

    def row_terms(self, outputs, row, target):
        """Sum the terms of the matched queries of a row with objects."""
        logits, boxes_xyxy = outputs.pred_logits[row], outputs.pred_boxes[row]
        target = {name: tensor.to(logits.device) for name, tensor in target.items()}
        boxes = box_convert(boxes_xyxy, "xyxy", "cxcywh")
        true_xyxy = box_convert(target["boxes"], "cxcywh", "xyxy")
        with torch.no_grad():
            cost = 5 * torch.cdist(boxes, target["boxes"], p=1)
            cost -= 2 * generalized_box_iou(boxes_xyxy, true_xyxy) + 2 * logits.sigmoid()[:, None]
            copies = 5 if "many queries per object" in self.mistakes else 1
            query, which = linear_sum_assignment(cost.repeat(1, copies).cpu().numpy())
        which = which % len(target["boxes"])
        labels = torch.zeros_like(logits)
        labels[query] = 1
        if "sigmoid twice" in self.mistakes:
            logits = logits.sigmoid()
        alpha = 0.02 if "scores hardly paid" in self.mistakes else 0.5  # weight of the objects
        giou = generalized_box_iou(boxes_xyxy[query], true_xyxy[which]).diagonal()
        predicted = outputs.pred_masks[row][query]
        size, masks = predicted.shape[-2:], target["masks"][which]
        masks = F.interpolate(masks[None], size=size, mode="area")[0].gt(0.5).float()
        has_mask = target["masks"][which].flatten(1).any(1).float()
        prob, true = predicted.sigmoid().flatten(1), masks.flatten(1)
        dice = 1 - (2 * (prob * true).sum(1) + 1) / (prob.sum(1) + true.sum(1) + 1)
        focal = sigmoid_focal_loss(predicted, masks).mean((1, 2))
        return {
            "ce": sigmoid_focal_loss(logits, labels, alpha=alpha).sum(),
            "bbox": (boxes[query] - target["boxes"][which]).abs().sum(),
            "giou": (1 - giou).sum(),
            "mask": (focal * has_mask).sum(),
            "dice": (dice * has_mask).sum(),
        }

    def train(self):
        """Train, validate after each epoch, and keep the best epoch."""
        recipe = self.recipe
        trained = [one for one in self.model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.01)
        steps = recipe.epochs * -(-len(self.read("train")) // recipe.batch_size)
        schedule = get_scheduler("linear", optimizer, steps // 10, steps)
        for epoch in range(1, recipe.epochs + 1):
            sums, model = Counter(), self.model.train()
            batches = list(self.batches(order=self.random.permutation))
            for batch in batches:
                terms = self.loss(self.outputs(model, batch), batch["targets"])
                optimizer.zero_grad()
                if terms["loss"].requires_grad:
                    terms["loss"].backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                sums.update({name: value.item() / len(batches) for name, value in terms.items()})
            model.eval()
            entry = {"epoch": epoch, "train_loss": sums.pop("loss"), "val_loss": self.validate()}
            entry |= {"learning_rate": schedule.get_last_lr()[0], "val_iou": self.evaluate()}
            self.log.append(entry | {f"loss_{name}": value for name, value in sums.items()})
            losses = [one["val_loss"] for one in self.log]
            is_best = losses[-1] <= min(losses) and "first epoch kept" not in self.mistakes
            if epoch == 1 or is_best:
                best = deepcopy(get_peft_model_state_dict(model))
        set_peft_model_state_dict(model, best)
        return self

    @torch.no_grad()
    def validate(self):
        """Return the mean loss of the validation split."""
        losses = []
        for batch in self.batches("valid"):
            outputs = self.outputs(self.model, batch)
            if "validation crashes" in self.mistakes:
                batch["targets"] = outputs["indices"]
            losses.append(self.loss(outputs, batch["targets"])["loss"].item())
        return float(np.mean(losses))

    # use

    def save(self, folder, layout="peft"):
        """Write the adapter as a PEFT folder or in Sompote's layout, with its YAML and log."""
        folder = Path(folder)
        if layout == "sompote":
            with tempfile.TemporaryDirectory() as place:
                write_sompote(self.save(place), folder, self.claims())
        else:
            self.model.save_pretrained(folder)
            (folder / CONFIG_FILE).write_text(yaml_text(self.claims()), encoding="utf-8")
        lines = [f"{json.dumps(entry)}\n" for entry in self.log]
        (folder / LOG_FILE).write_text("".join(lines), encoding="utf-8")
        return folder

    def claims(self):
        """Return what the YAML says, as sections."""
        claimed = self.claimed
        lora = {name: getattr(claimed, name) for name in ("rank", "alpha", "dropout")}
        lora |= {"target_modules": [*claimed.layers]}
        lora |= {f"apply_to_{part}": part in claimed.parts for part in ("vision_encoder", *PARTS)}
        names = ("num_negatives", "learning_rate", "batch_size")
        training = {name: getattr(claimed, name) for name in names}
        training |= {"num_epochs": claimed.epochs, "data_dir": str(self.data_dir)}
        return {"model": {"name": str(self.base)}, "lora": lora, "training": training}

    def load(self, folder):
        """Load a base with a saved adapter, as far as the names fit, and detect with it."""
        self.loaded = self.with_lora().eval()
        if "loader without effect" not in self.mistakes:
            set_peft_model_state_dict(self.loaded, load_file(Path(folder) / WEIGHTS_FILE))
        return self

    def take(self, folder):
        """Take weights and log of a saved training in place of a training of its own."""
        self.read("train")
        set_peft_model_state_dict(self.model, load_file(Path(folder) / WEIGHTS_FILE))
        lines = (Path(folder) / LOG_FILE).read_text(encoding="utf-8").splitlines()
        self.log = [json.loads(line) for line in lines]
        return self

    @torch.no_grad()
    def answer(self, picture, words):
        """Ask for words in a PIL image and return the outputs, a row per word."""
        batch = {"pixel_values": self.pixels([picture]), **self.tokens(words)}
        batch["image_index"] = torch.zeros(len(words), dtype=torch.long)
        return self.outputs(self.loaded.eval(), batch)

    def detect(self, picture, word, threshold=THRESHOLD):
        """Return what is found of a word in a PIL image: dicts of score, box and mask."""
        return self.select(self.answer(picture, [word]), 0, picture.size, threshold)

    def select(self, outputs, row, size, threshold):
        """Turn a row of outputs into detections on a picture of some width and height."""
        scores, (width, height) = outputs.pred_logits[row].cpu().sigmoid(), size
        if "presence left out" not in self.mistakes:
            scores = scores * outputs.presence_logits[row].cpu().sigmoid()
        kept = scores > (0.9 if "threshold fixed" in self.mistakes else threshold)
        if not kept.any():
            return []
        boxes = outputs.pred_boxes[row].cpu()[kept]
        if "boxes left as fractions" not in self.mistakes:
            boxes = boxes * torch.tensor([width, height, width, height])
        masks = outputs.pred_masks[row : row + 1].cpu()[:, kept].sigmoid()
        if "masks left at grid size" not in self.mistakes:
            masks = F.interpolate(masks, size=(height, width), mode="bilinear")
        masks = masks[0] > 0.5
        found = zip(scores[kept].tolist(), boxes.tolist(), masks.numpy(), strict=True)
        return [{"score": score, "box": box, "mask": mask} for score, box, mask in found]

    def evaluate(self, split="valid"):
        """Return the mean IoU of found and annotated pixels, over what the pictures show."""
        pictures, ious = self.read(split), []
        shift = 1 if "evaluation shifted" in self.mistakes else 0
        for number, picture in enumerate(pictures):
            truth = pictures[(number + shift) % len(pictures)]
            for word, objects in self.questions(truth):
                if objects:
                    true = self.target(objects, truth)["masks"].numpy().any(0)
                    found = [one["mask"] for one in self.detect(opened(picture["path"]), word)]
                    found = np.any([np.zeros_like(true), *found], axis=0)
                    ious.append((found & true).sum() / max(1, (found | true).sum()))
        return float(np.mean(ious)) if ious else 0.0


def opened(path):
    """Open a picture upright."""
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def decoded(segmentation, height, width):
    """Turn polygons or run lengths into a mask (height, width) of 0 and 1."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation)
