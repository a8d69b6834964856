"""A training that was not written for this package: the loop of the DETR guide, on a `Sam3Model`.

As in the object detection guide of transformers there are COCO items, a collator with ``labels``, a
`Trainer`, and DETR's own matcher and loss, which has boxes alone. Only `examined` knows this package.
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_random import tiny_processor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert
from transformers import Sam3Model, Trainer, TrainingArguments, set_seed
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from helpers.diagnose import LivePatient, diagnose

WEIGHTS = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
CRITERION = ImageLoss(HungarianMatcher(1, 5, 2), 1, 0.1, ["labels", "boxes", "cardinality"])


class CocoItems(Dataset):
    """COCO annotations as the guide's dataset has them; ``key`` is where boxes are looked for."""

    def __init__(self, folder, key):
        content = json.loads((folder / "_annotations.coco.json").read_text())
        self.folder, self.key, self.images = folder, key, content["images"]
        self.annotations = content["annotations"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        row = self.images[index]
        own = [one for one in self.annotations if one["image_id"] == row["id"]]
        boxes = [one[self.key] for one in own if one.get(self.key)]
        image = Image.open(self.folder / row["file_name"]).convert("RGB")
        return {"name": row["file_name"], "image": image, "boxes_xywh": boxes}


def collate(items, processor, is_normalized):
    """Ask for a crack in every picture, and give the boxes as ``labels``."""
    pictures = [item["image"] for item in items]
    batch = dict(processor(images=pictures, text=["crack"] * len(items), return_tensors="pt"))
    batch["image_ids"], batch["labels"] = [item["name"] for item in items], []
    for item in items:
        boxes = torch.tensor(item["boxes_xywh"], dtype=torch.float).reshape(-1, 4)
        boxes = box_convert(boxes, "xywh", "cxcywh")
        size = torch.tensor(item["image"].size * 2) if is_normalized else 1
        classes = torch.zeros(len(boxes), dtype=torch.long)
        batch["labels"].append({"boxes": boxes / size, "class_labels": classes})
    return batch


def detr_loss(outputs, labels):
    """Return DETR's loss: the class "crack" against "no object", and boxes."""
    logits = outputs.pred_logits + outputs.presence_logits
    logits = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
    boxes = box_convert(outputs.pred_boxes, "xyxy", "cxcywh")
    terms = CRITERION({"logits": logits, "pred_boxes": boxes}, labels)
    return {"loss": sum(terms[name] * weight for name, weight in WEIGHTS.items())}


class DetrTrainer(Trainer):
    """The guide's trainer, for a model without a loss of its own."""

    def compute_loss(self, model, inputs, **_):
        asked = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        return detr_loss(model(**asked), inputs["labels"])["loss"]


def trained(base, data_dir, place, key="bbox", is_normalized=True):
    """Train as the guide does, two epochs; return what is alive in its notebook then."""
    set_seed(1)
    processor = tiny_processor()
    model = Sam3Model.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    items = CocoItems(data_dir / "train", key)
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    options |= {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no"}
    options |= {"disable_tqdm": True, "dataloader_pin_memory": False}

    def to_batch(items):
        return collate(items, processor, is_normalized)

    arguments = TrainingArguments(output_dir=str(place), learning_rate=1e-3, **options)
    trainer = DetrTrainer(model, arguments, data_collator=to_batch, train_dataset=items)
    trainer.train()
    return model, processor, DataLoader(items, 2, collate_fn=to_batch), trainer.state.log_history


def examined(notebook, data_dir):
    """Paste these lines into the notebook."""
    model, processor, loader, log = notebook

    def detect(picture, word, threshold=0.3):
        inputs = processor(images=picture, text=word, return_tensors="pt").to(model.device)
        with torch.no_grad():
            outputs = model(**inputs)
        size = [picture.size[::-1]]
        return processor.post_process_instance_segmentation(outputs, threshold, 0.5, size)[0]

    patient = LivePatient(
        model=model, processor=processor, batches=loader, loss=detr_loss,
        detect=detect, data_dir=data_dir, words=["crack"], log=log,
    )  # fmt: skip
    return diagnose(patient)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # PEFT asks for it
@pytest.mark.parametrize(
    ("mistake", "causes"),
    [
        # Asked for cracks alone, it is never taught "no"; that it has boxes alone is no fault.
        ({}, ["only_positive_prompts"]),
        ({"is_normalized": False}, ["wrong_box_targets", "only_positive_prompts"]),
        ({"key": "annotations"}, ["no_objects"]),
    ],
)
def test_the_loop_of_the_detr_guide_is_examined(base, data_dir, tmp_path, mistake, causes):
    found = examined(trained(base, data_dir, tmp_path, **mistake), data_dir)
    assert [one.code for one in found.causes] == causes
    assert found.causes[0].confidence == (1.0 if mistake else 0.9)
    assert found.asked > 25
    if causes != ["no_objects"]:
        assert "the targets have no masks" in found.summary()
