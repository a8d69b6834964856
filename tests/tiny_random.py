"""A random SAM3 of 250,000 parameters, its processor, and a dataset of a few pictures, for tests."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Sam3Config, Sam3ImageProcessor, Sam3Processor

from helpers.config import load_config
from helpers.files import CONFIGS
from helpers.model.prompted import PromptedSam3

RESOLUTION = 56
MASK_SIZE = 28
NUM_QUERIES = 10
VOCABULARY = [
    "<start>",
    "<end>",
    "<unk>",
    "crack",
    "joint",
    "moss",
    "dog",
    "object",
    "hole",
    "wall",
]


def tiny_config():
    """Return the configuration: 56 px, patch 8, hidden 32, 10 queries, 2 decoder layers."""
    width = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    backbone = {
        "model_type": "sam3_vit_model",
        "num_hidden_layers": 2,
        "image_size": RESOLUTION,
        "patch_size": 8,
        "pretrain_image_size": RESOLUTION,
        "window_size": 4,
        "global_attn_indexes": [1],
        **width,
    }
    return Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[28, 28], [14, 14], [7, 7]],
        },
        text_config={
            "vocab_size": len(VOCABULARY),
            "projection_dim": 16,
            "num_hidden_layers": 2,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **width,
        },
        geometry_encoder_config={"num_layers": 1, **width},
        detr_encoder_config={"num_layers": 1, **width},
        detr_decoder_config={"num_layers": 2, "num_queries": NUM_QUERIES, **width},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )


def tiny_model(seed=0):
    """Return the random model in eval mode; equal seeds give equal weights.

    The weights are wider than the library's, so that scores and masks differ visibly.
    """
    torch.manual_seed(seed)
    model = PromptedSam3(tiny_config()).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    return model


def tiny_processor():
    """Return a `Sam3Processor` whose tokenizer knows the words of `VOCABULARY`."""
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        pad_token="<end>",
        model_max_length=32,
    )
    size = {"height": RESOLUTION, "width": RESOLUTION}
    mask_size = {"height": MASK_SIZE, "width": MASK_SIZE}
    return Sam3Processor(Sam3ImageProcessor(size=size, mask_size=mask_size), fast)


def save_tiny_base(folder, seed=0):
    """Write a random base into `folder`, loadable by `helpers.model.sam3.load_base`, and return it."""
    folder = Path(folder)
    tiny_model(seed).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def token_inputs(prompts):
    """Return ``input_ids`` and ``attention_mask`` (B, 32) of some prompts."""
    return dict(tiny_processor()(text=list(prompts), return_tensors="pt"))


def write_dataset(folder, sizes=(("train", 6), ("valid", 3), ("test", 3))):
    """Write a dataset of grey walls, 60 x 40 px, with one or two dark bars called crack.

    The last image of each split shows nothing.
    """
    for split, count in sizes:
        root = Path(folder) / split
        root.mkdir(parents=True)
        generator = np.random.default_rng([len(split), count])
        images, annotations = [], []
        for index in range(count):
            pixels = generator.integers(120, 200, (40, 60, 3), dtype=np.uint8)
            images.append(
                {"id": index, "file_name": f"{split}_{index}.png", "width": 60, "height": 40}
            )
            for _ in range(0 if index == count - 1 else 1 + index % 2):
                x, y = (int(value) for value in generator.integers(2, 20, 2))
                width, height = (int(value) for value in generator.integers(10, 18, 2))
                pixels[y : y + height, x : x + width] = 30
                x1, y1 = x + width, y + height
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": 1,
                        "bbox": [x, y, width, height],
                        "segmentation": [[x, y, x1, y, x1, y1, x, y1]],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
            Image.fromarray(pixels).save(root / images[-1]["file_name"])
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "crack", "supercategory": "none"}],
        }
        (root / "_annotations.coco.json").write_text(json.dumps(content))
    return Path(folder)


SHARED_RUN = ("training.seed=2", "evaluation.score_threshold=0.245")
"""Of the run that all tests share: some detections reach the threshold, some are right."""


def tiny_run_config(base, data_dir, *overrides):
    """Return a config that trains the random base for two epochs of three steps."""
    return load_config(
        CONFIGS / "crack_detection_config.yaml",
        profile="tiny",
        overrides=(
            ("model.name", base),
            ("model.resolution", RESOLUTION),
            ("data.data_dir", data_dir),
            "data.negative_prompts=[joint, moss, dog, hole]",
            "scale.num_epochs=0.04",
            "training.batch_size=1",
            "training.gradient_accumulation_steps=2",
            "lora.rank=4",
            *overrides,
        ),
    )
