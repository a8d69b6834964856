"""Names of modules and weights in Meta's SAM3, and in transformers' `Sam3Model`.

Read in facebookresearch/sam3 at 99d02f2 and in transformers 5.23. A star stands for the number of a
layer. The output projection is `out_proj` in Meta's code and `o_proj` in transformers', except in the
ViT (`proj`) and in the text encoder (`out_proj` in both).
"""

import re

_VIT = "backbone.vision_backbone.trunk"
_TEXT = "backbone.language_backbone.encoder"
_BLOCK, _LAYER = f"{_TEXT}.transformer.resblocks.*", "text_encoder.text_model.encoder.layers.*"
_FPN, _DECODER = "backbone.vision_backbone.convs.*", "transformer.decoder"
# Attention in Meta's code: its name in transformers, and the output projection in both.
_ATTENTION = {
    f"{_VIT}.blocks.*.attn": ("vision_encoder.backbone.layers.*.attention", "proj", "o_proj"),
    f"{_BLOCK}.attn": (f"{_LAYER}.self_attn", "out_proj", "out_proj"),
} | {
    native: (hf, "out_proj", "o_proj")
    for native, hf in {
        "transformer.encoder.layers.*.self_attn": "detr_encoder.layers.*.self_attn",
        "transformer.encoder.layers.*.cross_attn_image": "detr_encoder.layers.*.cross_attn",
        f"{_DECODER}.layers.*.self_attn": "detr_decoder.layers.*.self_attn",
        f"{_DECODER}.layers.*.ca_text": "detr_decoder.layers.*.text_cross_attn",
        f"{_DECODER}.layers.*.cross_attn": "detr_decoder.layers.*.vision_cross_attn",
        "geometry_encoder.encode.*.self_attn": "geometry_encoder.layers.*.self_attn",
        "geometry_encoder.encode.*.cross_attn_image": "geometry_encoder.layers.*.cross_attn",
        "segmentation_head.cross_attend_prompt": "mask_decoder.prompt_cross_attn",
    }.items()
}
_NAMES = {
    # linear layers, which LoRA adapts
    f"{_VIT}.blocks.*.mlp": "vision_encoder.backbone.layers.*.mlp",
    f"{_BLOCK}.mlp.c_fc": f"{_LAYER}.mlp.fc1",
    f"{_BLOCK}.mlp.c_proj": f"{_LAYER}.mlp.fc2",
    "backbone.language_backbone.resizer": "text_projection",
    "geometry_encoder.boxes_direct_project": "geometry_encoder.boxes_direct_project",
    "geometry_encoder.boxes_pos_enc_project": "geometry_encoder.boxes_pos_enc_project",
    "geometry_encoder.final_proj": "geometry_encoder.final_proj",
    "dot_prod_scoring.prompt_proj": "dot_product_scoring.text_proj",
    "dot_prod_scoring.hs_proj": "dot_product_scoring.query_proj",
    # everything else, which only a full checkpoint holds
    f"{_VIT}.pos_embed": "vision_encoder.backbone.embeddings.position_embeddings",
    f"{_VIT}.patch_embed.proj": "vision_encoder.backbone.embeddings.patch_embeddings.projection",
    f"{_VIT}.ln_pre": "vision_encoder.backbone.layer_norm",
    f"{_VIT}.blocks.*.norm1": "vision_encoder.backbone.layers.*.layer_norm1",
    f"{_VIT}.blocks.*.norm2": "vision_encoder.backbone.layers.*.layer_norm2",
    f"{_FPN}.dconv_2x2_0": "vision_encoder.neck.fpn_layers.*.scale_layers.0",
    f"{_FPN}.dconv_2x2_1": "vision_encoder.neck.fpn_layers.*.scale_layers.2",
    f"{_FPN}.dconv_2x2": "vision_encoder.neck.fpn_layers.*.scale_layers.0",
    f"{_FPN}.conv_1x1": "vision_encoder.neck.fpn_layers.*.proj1",
    f"{_FPN}.conv_3x3": "vision_encoder.neck.fpn_layers.*.proj2",
    f"{_TEXT}.token_embedding": "text_encoder.text_model.embeddings.token_embedding",
    f"{_TEXT}.positional_embedding": "text_encoder.text_model.embeddings.position_embedding.weight",
    f"{_TEXT}.ln_final": "text_encoder.text_model.final_layer_norm",
    f"{_TEXT}.text_projection": "text_encoder.text_projection.weight",
    f"{_BLOCK}.ln_1": f"{_LAYER}.layer_norm1",
    f"{_BLOCK}.ln_2": f"{_LAYER}.layer_norm2",
    "geometry_encoder.label_embed": "geometry_encoder.label_embed",
    "geometry_encoder.cls_embed": "geometry_encoder.cls_embed",
    "geometry_encoder.boxes_pool_project": "geometry_encoder.boxes_pool_project",
    "geometry_encoder.img_pre_norm": "geometry_encoder.vision_layer_norm",
    "geometry_encoder.norm": "geometry_encoder.prompt_layer_norm",
    "geometry_encoder.encode_norm": "geometry_encoder.output_layer_norm",
    f"{_DECODER}.query_embed": "detr_decoder.query_embed",
    f"{_DECODER}.reference_points": "detr_decoder.reference_points",
    f"{_DECODER}.presence_token": "detr_decoder.presence_token",
    f"{_DECODER}.presence_token_out_norm": "detr_decoder.presence_layer_norm",
    f"{_DECODER}.norm": "detr_decoder.output_layer_norm",
    f"{_DECODER}.layers.*.norm1": "detr_decoder.layers.*.vision_cross_attn_layer_norm",
    f"{_DECODER}.layers.*.catext_norm": "detr_decoder.layers.*.text_cross_attn_layer_norm",
    f"{_DECODER}.layers.*.norm2": "detr_decoder.layers.*.self_attn_layer_norm",
    f"{_DECODER}.layers.*.norm3": "detr_decoder.layers.*.mlp_layer_norm",
    "dot_prod_scoring.prompt_mlp.out_norm": "dot_product_scoring.text_mlp_out_norm",
    "segmentation_head.pixel_decoder": "mask_decoder.pixel_decoder",
    "segmentation_head.mask_predictor.mask_embed": "mask_decoder.mask_embedder",
    "segmentation_head.instance_seg_head": "mask_decoder.instance_projection",
    "segmentation_head.semantic_seg_head": "mask_decoder.semantic_projection",
    "segmentation_head.cross_attn_norm": "mask_decoder.prompt_cross_attn_norm",
}
for _native, (_hf, _native_output, _output) in _ATTENTION.items():
    _NAMES |= {f"{_native}.{name}_proj": f"{_hf}.{name}_proj" for name in "qkv"}
    _NAMES[f"{_native}.{_native_output}"] = f"{_hf}.{_output}"
for _native, _hf in {
    "transformer.encoder.layers.*": "detr_encoder.layers.*",
    f"{_DECODER}.layers.*": "detr_decoder.layers.*",
    "geometry_encoder.encode.*": "geometry_encoder.layers.*",
}.items():
    _NAMES |= {f"{_native}.linear{number}": f"{_hf}.mlp.fc{number}" for number in (1, 2)}
    if _native != f"{_DECODER}.layers.*":
        _NAMES |= {f"{_native}.norm{number}": f"{_hf}.layer_norm{number}" for number in (1, 2, 3)}
for _native, _hf, _depth in (  # heads whose layers count from 0 there, and from 1 here
    (f"{_DECODER}.presence_token_head", "detr_decoder.presence_head", 3),
    (f"{_DECODER}.bbox_embed", "detr_decoder.box_head", 3),
    (f"{_DECODER}.ref_point_head", "detr_decoder.ref_point_head", 2),
    (f"{_DECODER}.boxRPB_embed_x", "detr_decoder.box_rpb_embed_x", 2),
    (f"{_DECODER}.boxRPB_embed_y", "detr_decoder.box_rpb_embed_y", 2),
    ("dot_prod_scoring.prompt_mlp", "dot_product_scoring.text_mlp", 2),
):
    _NAMES |= {f"{_native}.layers.{i}": f"{_hf}.layer{i + 1}" for i in range(_depth)}

WITHOUT_COUNTERPART = re.compile(r"geometry_encoder\.points_|.*\.attn\.freqs_cis$")
"""Names that transformers has not: points as prompts, and constants that it computes."""


def _compiled(names):
    """Return (pattern of a name or of what is in it, template) pairs."""
    return [
        (re.compile(re.escape(name).replace(r"\*", r"(\d+)") + r"(?=\.|$)"), template)
        for name, template in names.items()
    ]


_TO_HF = _compiled(_NAMES)
_TO_NATIVE = _compiled({hf: native for native, hf in reversed(_NAMES.items())})
_FUSED = _compiled({native: hf for native, (hf, *_) in _ATTENTION.items()})
_FUSED_REST = re.compile(r"\.?(qkv|in_proj)?(_weight|_bias|\.weight|\.bias)?$")


def _renamed(name, rules):
    """Return a name after the first rule that fits, or None."""
    for pattern, template in rules:
        if match := pattern.match(name):
            numbers = iter(match.groups())
            return re.sub(r"\*", lambda _: next(numbers), template) + name[match.end() :]  # noqa: B023
    return None


def to_hf(name):
    """Return the names in transformers of a module or weight of Meta's: none, one, or q, k and v.

    Three for what holds q, k and v in one matrix, in this order along its output: `qkv` of the ViT,
    `in_proj_weight` of attention, and an attention as PEFT adapts it.
    """
    if (hf := _renamed(name, _TO_HF)) is not None:
        return (hf,)
    for pattern, _ in _FUSED:
        match = pattern.match(name)
        rest = match and _FUSED_REST.fullmatch(name[match.end() :])
        if rest:
            hf, ending = _renamed(name[: match.end()], _FUSED), rest[2] or ""
            return tuple(f"{hf}.{part}_proj{ending.replace('_', '.')}" for part in "qkv")
    return ()


def to_native(name):
    """Return the name in Meta's code of a module of transformers', or None.

    Of the ViT's q, k and v, which Meta's code has in one `qkv`, it is `attn.q_proj` and so on.
    """
    return _renamed(name, _TO_NATIVE)
