"""Names of modules and weights in Meta's SAM3, and in transformers' `Sam3Model`.

The table ``data/native_names.csv`` was read in facebookresearch/sam3 at 99d02f2 and in transformers
5.23; a star in it stands for the number of a layer.
"""

import csv
import re

from helpers.files import DATA

WITHOUT_COUNTERPART = re.compile(r"geometry_encoder\.points_|.*\.attn\.freqs_cis$")
"""Names that transformers has not: points as prompts, and constants that it computes."""
_FUSED = re.compile(r"(.+?)(?:\.qkv|\.in_proj)?([._](?:weight|bias))?")


def _rules(rows):
    """Return (pattern of a name and of what is in it, template) pairs."""
    return [
        (re.compile(re.escape(name).replace(r"\*", r"(\d+)") + r"(?=\.|$)"), template)
        for name, template in rows
    ]


def _renamed(name, rules):
    """Return a name after the first rule that fits, or None."""
    for pattern, template in rules:
        if match := pattern.match(name):
            for number in match.groups():
                template = template.replace("*", number, 1)
            return template + name[match.end() :]
    return None


with (DATA / "native_names.csv").open(encoding="utf-8", newline="") as _file:
    _ROWS = [(row["meta"], row["transformers"]) for row in csv.DictReader(_file)]
_TO_HF = _rules(_ROWS)
_TO_NATIVE = _rules((hf, native) for native, hf in _ROWS)


def to_hf(name):
    """Return the names in transformers of a module or weight of Meta's: none, one, or q, k and v.

    Three for what holds q, k and v in one matrix, in this order along its output: `qkv` of the ViT
    or of a fork, `in_proj_weight` of attention, and an attention as PEFT adapts it.
    """
    if (hf := _renamed(name, _TO_HF)) is not None:
        return (hf,)
    attention, ending = _FUSED.fullmatch(name).groups(default="")
    parts = [_renamed(f"{attention}.{letter}_proj", _TO_HF) for letter in "qkv"]
    return () if None in parts else tuple(part + ending.replace("_", ".") for part in parts)


def to_native(name):
    """Return the name in Meta's code of a module of transformers', or None.

    Of the ViT's q, k and v, which Meta's code has in one `qkv`, it is `attn.q_proj` and so on.
    """
    return _renamed(name, _TO_NATIVE)
