"""The embedded base before training: a small `Sam3Config` and an initialisation that can learn.

A SAM3 decoder that starts from plain Xavier weights collapses: its queries become equal and stay so.
Three choices below keep them apart. Residual branches of the decoder start small; every query starts
at a reference box of its own; and the box-relative attention bias starts as what it is for, looking
inside the query's box and along its edges, so that queries see different things from the first step.
"""

import math

import torch
from torch import nn
from transformers import Sam3Config, Sam3Model

IMAGE_SIZE = 128
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
MASK_SIZE = 4 * GRID
HIDDEN_SIZE = 64
VISION_SIZE = 96
NUM_HEADS = 8
NUM_QUERIES = 20
BIAS_STRENGTH = 9.0
"""Attention logit lost per unit of (logarithmic) distance outside a query's box."""


def tiny_config(vocabulary_size):
    """Return the configuration of the embedded base (about 1.5 M parameters)."""
    width = {
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": 4 * HIDDEN_SIZE,
    }
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": VISION_SIZE,
        "intermediate_size": 3 * VISION_SIZE,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "pretrain_image_size": IMAGE_SIZE,
        "window_size": GRID // 2,
        "global_attn_indexes": [1, 3],
    }
    levels = [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2]
    return Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": HIDDEN_SIZE,
            "backbone_feature_sizes": levels,
        },
        text_config={
            "vocab_size": vocabulary_size,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 4 * HIDDEN_SIZE,
            "projection_dim": HIDDEN_SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        geometry_encoder_config={**width, "num_layers": 1, "dropout": 0.0},
        detr_encoder_config={**width, "num_layers": 2, "dropout": 0.0},
        detr_decoder_config={**width, "num_layers": 3, "num_queries": NUM_QUERIES, "dropout": 0.0},
        mask_decoder_config={
            "hidden_size": HIDDEN_SIZE,
            "num_attention_heads": NUM_HEADS,
            "dropout": 0.0,
        },
    )


def build_tiny_model(vocabulary_size, seed):
    """Return an untrained embedded base with the initialisation described above."""
    torch.manual_seed(seed)
    model = Sam3Model(tiny_config(vocabulary_size))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = (
                module.weight[0].numel()
                if not isinstance(module, nn.ConvTranspose2d)
                else module.weight.shape[0]
            )
            nn.init.trunc_normal_(module.weight, std=1 / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.text_encoder.text_model.embeddings.token_embedding.weight, std=0.5)
    _add_position_table(model)
    _separate_queries(model.detr_decoder)
    _look_inside_boxes(model.detr_decoder)
    return model


@torch.no_grad()
def _add_position_table(model):
    """Start the ViT's position embeddings as a sine-cosine table, which small data cannot teach it."""
    table = model.vision_encoder.backbone.embeddings.position_embeddings
    frequencies = torch.pi * torch.arange(1, VISION_SIZE // 4 + 1) / 4
    cells = (torch.arange(GRID) + 0.5) / GRID
    waves = torch.cat(
        [(cells[:, None] * frequencies).sin(), (cells[:, None] * frequencies).cos()], 1
    )
    rows = waves[:, None].expand(GRID, GRID, -1)
    columns = waves[None].expand(GRID, GRID, -1)
    table.copy_(0.5 * torch.cat([rows, columns], -1).reshape(1, GRID * GRID, VISION_SIZE))


@torch.no_grad()
def _separate_queries(decoder):
    """Give queries large embeddings, spread boxes, and small residual branches."""
    for layer in decoder.layers:
        for branch in (
            layer.self_attn.o_proj,
            layer.text_cross_attn.o_proj,
            layer.vision_cross_attn.o_proj,
            layer.mlp.fc2,
        ):
            branch.weight.mul_(0.3)
    nn.init.normal_(decoder.query_embed.weight, std=1.0)
    nn.init.zeros_(decoder.box_head.layer3.weight)
    decoder.reference_points.weight.copy_(
        spread_boxes(decoder.reference_points.num_embeddings, shift=0.0)
    )


def spread_boxes(count, shift):
    """Return box logits (count, 4) cxcywh that cover the picture evenly, by a Kronecker sequence."""
    golden = torch.tensor([0.7549, 0.5698])
    centres = 0.12 + 0.76 * ((0.5 + shift + torch.arange(1, count + 1)[:, None] * golden) % 1.0)
    sides = 0.22 + 0.3 * (
        (shift + torch.arange(1, count + 1)[:, None] * torch.tensor([0.618, 0.414])) % 1.0
    )
    return torch.cat([centres, sides], 1).logit()


@torch.no_grad()
def _look_inside_boxes(decoder):
    """Start the box-relative bias so that heads 0-3 look inside and 4-7 along one edge each.

    The bias of a cell is ``-strength * relu(distance outside the box)`` for an inside head and
    ``-strength * |distance to the edge|`` for an edge head, both exactly expressible by its MLP.
    """
    for axis, mlp in enumerate((decoder.box_rpb_embed_x, decoder.box_rpb_embed_y)):
        mlp.layer2.weight.mul_(0.1)
        mlp.layer1.weight[:4] = torch.tensor([[-1.0, 0], [0, 1.0], [1.0, 0], [0, -1.0]])
        outside, start, end = torch.zeros(3, mlp.layer2.in_features)
        outside[:2], start[[0, 2]], end[[1, 3]] = -BIAS_STRENGTH, -BIAS_STRENGTH, -BIAS_STRENGTH
        edges = {4 + 2 * axis: start, 5 + 2 * axis: end}
        for head in range(NUM_HEADS):
            mlp.layer2.weight[head] += edges.get(head, outside)
