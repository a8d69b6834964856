"""What somebody else trained, as a folder that plain transformers and PEFT load.

A native LoRA and a native checkpoint were trained with the geometry encoder's token behind every
prompt (`model.native_prompt`), with a LayerNorm of the ViT of eps 1e-5, where transformers has 1e-6
(logits differ by up to 4e-4), and with no clamp on the presence logit, where transformers clamps it
to -10 and 10. With the token, what is imported gives Meta's outputs to about 3e-5.
"""

import math
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import Sam3Config, Sam3Model

from helpers.config import yaml_text
from helpers.errors import InputError
from helpers.files import file_digest, read_json, resolve, staged_folder, write_json, write_text
from helpers.foreign.names import WITHOUT_COUNTERPART, to_hf, to_native
from helpers.foreign.weights import Matrices, lora_matrices, read_source
from helpers.model import lora as peft_lora
from helpers.model.sam3 import base_config

DEFAULT_BASE = "facebook/sam3"
ORIENTATIONS = ("native", "peft")
SOMPOTE_WEIGHTS, SOMPOTE_CONFIG = "best_lora_weights.pt", "config.yaml"
# Codes after which the status is 1; the other findings are only to be known.
FAULTS = ("lora_elsewhere", "adapter_at_zero", "adapter_partly_at_zero", "no_word_module")
FAULTS += ("wrapped_keys",)
_VIT_EPS = 1e-5  # of Meta's ViT
_VIT_MLP = re.compile(r"vision_encoder\.backbone\.layers\.\d+\.mlp\.fc[12]$")
# Natively without gradient: softmax over one token, and boxes where only words are asked.
_NEVER_TRAINED = re.compile(r"geometry_encoder\.(layers\.\d+\.self_attn\.[qk]_proj|boxes_)")
_VIT_QUERY = re.compile(r"\.trunk\.blocks\.\d+\.attn\.q_proj$")
_WORD_PARTS = ("text_encoder", "detr_encoder")  # where a new word can be learned
_PROCESSOR_FILES = ("*processor_config.json", "tokenizer*", "vocab.json", "merges.txt")
_PROCESSOR_FILES += ("special_tokens_map.json",)


class Finding(NamedTuple):
    """Something to know about imported weights; the code is a cause of the catalogue if there is one."""

    code: str
    message: str


@dataclass(frozen=True)
class ImportReport:
    """What was imported, and what is wrong with it."""

    kind: str  # "sompote_lora", "twin_lora", "peft_over_meta", "peft", "meta_full" or "hf_full"
    source: str
    folder: str
    base: str
    rank: int | None  # the most frequent one; None for a full checkpoint, as the next four
    alpha: float | None
    modules: int | None  # of the file that were imported
    hf_modules: int | None  # of transformers that this gives: q, k and v may share one of the file
    parts: dict | None  # component of the model to its hf_modules
    findings: tuple

    @property
    def status(self):
        """int: 1 if something is wrong with the file, else 0."""
        return int(any(finding.code in FAULTS for finding in self.findings))

    def to_json(self):
        """Return what ``python -m helpers import --json`` prints."""
        return asdict(self) | {"findings": [finding._asdict() for finding in self.findings]}

    def summary(self):
        """Return the report as text."""
        lines = [f"{self.source} is {self.kind}, imported for {self.base} into {self.folder}"]
        if self.rank is not None:
            parts = ", ".join(f"{part} {count}" for part, count in self.parts.items())
            lines.append(
                f"  rank {self.rank}, alpha {self.alpha:g}, {self.modules} modules, in transformers "
                f"{self.hf_modules}: {parts}"
            )
        for code, message in self.findings:
            lines.append(f"  {'wrong' if code in FAULTS else 'note'}: {code}: {message}")
        return "\n".join(lines)


def import_source(source, output, config=None, base=None, alpha=None, orientation=None):
    """Write a LoRA as a PEFT folder, or a full checkpoint as a folder of `Sam3Model`.

    Parameters
    ----------
    source : os.PathLike
        Weights (``.pt``, ``.pth``, ``.bin``, ``.safetensors``), or the folder with them: of
        Sompote/SAM3_LoRA, Meta's trainer, PEFT or transformers.
    output : os.PathLike
        Folder to write; must be empty or missing. It stays so unless everything went well.
    config : os.PathLike, optional
        YAML of the training, with ``lora.rank`` and ``lora.alpha``; by default the one beside the
        weights.
    base : str, optional
        Base that names and shapes are compared with: a folder, or a name on the hub; by default what
        a PEFT folder names, else facebook/sam3, whose shapes need no file.
    alpha : float, optional
        Of the LoRA, where no file tells it.
    orientation : {"native", "peft"}, optional
        A as (in, r) or as (r, in), where the shapes leave it open.

    Returns
    -------
    ImportReport
        Its ``status`` is 1 if something is wrong with the weights that were imported.

    Raises
    ------
    InputError
        If there is nothing that could be imported exactly; then nothing is written.
    """
    source, output = resolve(source), resolve(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("is not an empty folder", where=output, fix="choose another --output")
    if orientation not in (None, *ORIENTATIONS):
        fix = f"use {' or '.join(ORIENTATIONS)}"
        raise InputError(f"there is no orientation {orientation!r}", where="orientation", fix=fix)
    found = read_source(source, None if config is None else resolve(config))
    write = _write_lora if found.is_lora else _write_full
    with staged_folder(output) as staging:
        facts = write(found, staging, base, alpha=alpha, orientation=orientation)
    return ImportReport(source=str(source), folder=str(output), **facts)


def _write_lora(found, staging, base, *, alpha, orientation):
    """Write a PEFT folder; returns what an `ImportReport` says of it."""
    modules = lora_matrices(found)
    base, findings = _base_of(found, base), _prefix_findings(found)
    peft_lora.check_tensors({found.keys[n]: t for n, t in found.tensors.items()}, found.path)
    model = _empty_base(base)
    layers = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names, unknown = _counterparts(modules, layers, found, base)
    if unknown:
        text = f"{len(unknown)} modules have no counterpart in transformers and are left out: "
        findings.append(Finding("no_counterpart", text + ", ".join(unknown)))
    modules = {name: pair for name, pair in modules.items() if name in names}
    orientation = "peft" if found.is_peft else orientation
    orientation = _orientation(modules, names, layers, orientation, found)
    if all(group == (name,) for name, group in names.items()):
        kind = "peft"
    elif found.is_peft:
        kind = "peft_over_meta"
    else:
        kind = "sompote_lora" if orientation == "native" else "twin_lora"
    if orientation == "native":
        modules = {name: Matrices(p.A.T, p.B.T, p.keys) for name, p in modules.items()}
    _refuse_other_shapes(modules, names, layers, found, base)
    ranks = Counter(len(pair.A) for pair in modules.values())
    rank, alpha = ranks.most_common(1)[0][0], _alpha(found, ranks, alpha)
    tensors, rank_of = {}, {}
    for name, (A, B, _) in modules.items():
        for hf, part in zip(names[name], B.chunk(len(names[name])), strict=True):
            rank_of[hf] = len(A)
            tensors[f"base_model.model.{hf}.lora_A.weight"] = A.float().contiguous()
            tensors[f"base_model.model.{hf}.lora_B.weight"] = part.float().contiguous()
    if len(rank_of) != sum(map(len, names.values())):
        message = "holds LoRA for the same weights twice, fused and apart"
        raise InputError(message, where=found.path, fix="remove one of the two")
    findings += _lora_findings(modules, names, found)
    identity = dict.fromkeys(("revision", "resolution", "fingerprint"))
    identity |= {"name": base, "native_prompt": kind != "peft"}
    if found.is_peft and kind == "peft":
        settings = {"lora_alpha": alpha, "base_model_name_or_path": base}
        write_json(staging / peft_lora.CONFIG_FILE, found.settings["peft"] | settings)
        if (found.path / peft_lora.BASE_FILE).is_file():
            identity = read_json(found.path / peft_lora.BASE_FILE)
    else:
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=sorted(rank_of),
            # PEFT compares endings, and the tower has a layer of this name, too.
            exclude_modules=["text_encoder.text_projection"],
            rank_pattern={name: r for name, r in rank_of.items() if r != rank},
            base_model_name_or_path=base,
            inference_mode=True,
        ).save_pretrained(staging, auto_mapping_dict=peft_lora.PLAIN_CLASS)
    peft_lora.write_tensors(staging / peft_lora.WEIGHTS_FILE, tensors)
    settings = PeftConfig.from_pretrained(staging)
    settings.base_model_name_or_path = None  # it would be compared with the empty base
    adapted = peft_lora.wrap(model, settings)
    peft_lora.refuse_other_keys(adapted, tensors, found.path)
    identity |= {"weights_sha256": file_digest(staging / peft_lora.WEIGHTS_FILE)}
    write_json(staging / peft_lora.BASE_FILE, identity)
    parts = Counter(peft_lora.component_of(name) or "scoring" for name in rank_of)
    counts = {"modules": len(modules), "hf_modules": len(rank_of), "parts": dict(parts)}
    own = {"kind": kind, "base": base, "findings": tuple(findings)}
    return own | {"rank": rank, "alpha": alpha} | counts


def _base_of(found, base):
    """Return the base to import for; SAM 3.1 has other weights under the same names."""
    claimed = found.settings.get("base")
    if "sam3.1" in str(claimed):
        raise InputError(
            f"was trained on {claimed}, whose weights differ from those of {DEFAULT_BASE}",
            where=found.settings["where"],
            fix="train again on facebook/sam3: transformers' Sam3Model has no SAM 3.1",
        )
    return str(base or (claimed if found.is_peft else None) or DEFAULT_BASE)


def _empty_base(name):
    """Return a base without memory for its weights; that of the default needs no file."""
    config = Sam3Config() if name == DEFAULT_BASE else base_config(name)
    with torch.device("meta"):
        return Sam3Model(config)


def _counterparts(modules, layers, found, base):
    """Map each module of the file to its linear layers in the base; the rest has no counterpart."""
    names, unknown, strange, absent = {}, [], [], []
    for module in modules:
        hf = (module,) if module in layers else to_hf(module)
        if hf and all(name in layers for name in hf):
            names[module] = hf
        elif hf or to_native(module):
            absent.append(module)
        elif WITHOUT_COUNTERPART.match(module):
            unknown.append(module)
        else:
            strange.append(module)
    if strange or not names and not absent:
        example = (strange or unknown)[0]
        message = f"adapts {len(strange or unknown)} modules that SAM3 has not, such as {example}"
        raise InputError(message, where=found.path, fix="name a LoRA of SAM3")
    if absent:
        raise InputError(
            f"belongs to another base: {len(absent)} of {len(modules)} modules are not in {base}, "
            f"such as {absent[-1]}",
            where=found.path,
            fix="name the base it was trained on with --base",
        )
    return names, unknown


def _orientation(modules, names, layers, orientation, found):
    """Return how A and B of a whole file lie, as the user or their shapes beside the base's say."""
    has_rank, has_shape = Counter(), Counter()
    for name, (A, B, _) in modules.items():
        expected = _layer_shape(names[name], layers)
        for option, pair in (("native", (A.T, B.T)), ("peft", (A, B))):
            rank_agrees = pair[0].shape[0] == pair[1].shape[1]
            has_rank[option] += rank_agrees
            has_shape[option] += rank_agrees and (pair[1].shape[0], pair[0].shape[1]) == expected
    if orientation is None and all(has_shape[option] == len(modules) for option in ORIENTATIONS):
        raise InputError(
            f"all A and B of {len(modules)} modules are square, so their orientation is open",
            where=found.path,
            fix="give --orientation native for A as (in, r), as Sompote/SAM3_LoRA saves it, or peft",
        )
    best = max(ORIENTATIONS, key=lambda option: (has_shape[option], has_rank[option]))
    orientation = orientation or best
    if has_rank[orientation] < len(modules):
        axes = (1, 0) if orientation == "native" else (0, 1)
        name, A, B = next(
            (name, tuple(pair.A.shape), tuple(pair.B.shape))
            for name, pair in modules.items()
            if pair.A.shape[axes[0]] != pair.B.shape[axes[1]]
        )
        message = f"A {A} and B {B} of {name} have no rank in common ({orientation} orientation)"
        raise InputError(message, where=found.path, fix="restore the file, or give --orientation")
    return orientation


def _layer_shape(names, layers):
    """Return (out, in) of layers that share an input, taken together."""
    return sum(layers[name][0] for name in names), layers[names[0]][1]


def _refuse_other_shapes(modules, names, layers, found, base):
    """Refuse matrices that do not fit the layers of the base, naming the shapes."""
    problems = []
    for module, (A, B, _) in modules.items():
        expected = _layer_shape(names[module], layers)
        actual = B.shape[0], A.shape[1]
        if actual != expected:
            problems.append(f"{module} is for {actual} (out, in), the base has {expected}")
    if problems:
        raise InputError(
            f"belongs to another base: {len(problems)} of {len(modules)} modules do not fit {base}, "
            f"such as {problems[0]}",
            where=found.path,
            fix="name the base it was trained on with --base",
        )


def _alpha(found, ranks, alpha):
    """Return alpha as the user or the settings of the training give it; it is never guessed."""
    settings, usual = found.settings, 2 * ranks.most_common(1)[0][0]
    where = settings.get("where")
    if alpha is None:
        rank, alpha = settings.get("rank"), settings.get("alpha")
        peft = settings.get("peft", {})
        if peft.get("use_rslora") or peft.get("alpha_pattern"):
            raise InputError("uses rslora or alpha_pattern", where=where, fix="give --alpha")
        if alpha is None:
            raise InputError(
                "alpha is not in the weights" if not where else f"{where} has no alpha",
                where=found.path,
                fix="give the YAML of the training with --config, or alpha with --alpha; usual is "
                f"twice the rank, here {usual}",
            )
        if rank is not None and rank not in ranks:
            raise InputError(
                f"the rank is {rank!r:.50} here and {', '.join(map(str, sorted(ranks)))} in the "
                f"weights, {found.path.name}: it is not the file of that training",
                where=where,
                fix=f"give its own YAML with --config, or alpha with --alpha (usual is {usual})",
            )
    is_number = type(alpha) in (int, float) and math.isfinite(alpha)
    if not is_number or not 0 < alpha <= peft_lora.MAX_SCALE * min(ranks):
        fix = f"give a number with --alpha; usual is twice the rank, here {usual}"
        raise InputError(f"alpha is {alpha!r:.100}", where=where or "--alpha", fix=fix)
    return alpha


def _prefix_findings(found):
    """Say what was taken off the names, and what was left out with the tracker."""
    findings = []
    for prefix, count in found.prefixes.items():
        if prefix in ("module.", "_orig_mod."):
            wrapper = "for several GPUs" if prefix == "module." else "by torch.compile"
            text = f"'{prefix}' was taken off {count} keys: it was saved while wrapped {wrapper}, "
            findings.append(Finding("wrapped_keys", text + "and loads nowhere as it is"))
        elif not found.is_peft:
            text = f"'{prefix}' was taken off {count} keys"
            findings.append(Finding("prefix_removed", text))
    if found.tracker:
        text = f"{found.tracker} tensors of the tracker (tracker.*, sam2_convs) were left out"
        findings.append(Finding("tracker_left_out", text))
    return findings


def _lora_findings(modules, names, found):
    """Say what a LoRA cannot have learned."""
    hf_names = [name for group in names.values() for name in group]
    parts, findings = {peft_lora.component_of(name) for name in hf_names}, []
    if all(_VIT_MLP.match(name) for name in hf_names):
        text = (
            f"only {len(names)} modules are adapted, all fc1 or fc2 of the ViT, and nothing that "
        )
        text += "reads a word. This is the silent no-op of Sompote/SAM3_LoRA before 2025-12-18"
        promised = found.settings.get("lora", {}).get("target_modules")
        text += f"; the YAML asks for {', '.join(map(str, promised))}" if promised else ""
        findings.append(Finding("lora_elsewhere", text))
    elif parts.isdisjoint(_WORD_PARTS):
        text = "no module of the text encoder or the DETR encoder is adapted, so a word that the "
        text += "base does not know cannot be learned"
        findings.append(Finding("no_word_module", text))
    trained = [n for n in modules if not all(_NEVER_TRAINED.match(hf) for hf in names[n])]
    zeros = [name for name in trained if not modules[name].B.any()]
    if zeros and len(zeros) == len(trained):
        text = f"B is zero in all {len(modules)} modules: it answers as its base. The optimiser "
        text += "had no parameter of LoRA, or the learning rate was 0"
        findings.append(Finding("adapter_at_zero", text))
    elif zeros:
        text = f"B is zero in {len(zeros)} of {len(modules)} modules, where it was never trained: "
        text += ", ".join(zeros)
        if not found.is_peft and all(name.endswith(".out_proj") for name in zeros):
            text += ". LoRA on out_proj inside nn.MultiheadAttention has no effect in Meta's code"
        findings.append(Finding("adapter_partly_at_zero", text))
    if "geometry_encoder" in parts:
        text = "the geometry encoder is adapted, so scores are those of the training only with its "
        text += "token behind the prompt (model.native_prompt), which transformers leaves out"
        findings.append(Finding("missing_geometry_token", text))
    return findings


def _write_full(found, staging, base, **_):
    """Write the folder of a `Sam3Model`; returns what an `ImportReport` says of it."""
    folder = found.path if found.path.is_dir() else None
    base = str(base or folder or DEFAULT_BASE)
    model, findings = _empty_base(str(folder or base)), _prefix_findings(found)
    expected, tensors, left_out, unexpected = model.state_dict(), {}, 0, []
    values = {key: found.tensors[n] for n, key in found.keys.items() if not n.endswith("freqs_cis")}
    peft_lora.check_tensors(values, found.path)
    for name, tensor in found.tensors.items():
        names = (name,) if name in expected else to_hf(name)
        if WITHOUT_COUNTERPART.match(name):
            left_out += 1
        elif not names:
            unexpected.append(found.keys[name])
        else:
            if name.endswith("trunk.pos_embed"):
                tensor = tensor[:, 1:]  # the place of a class token, which neither has
            elif name.endswith("encoder.text_projection"):
                tensor = tensor.T
            tensors |= zip(names, tensor.chunk(len(names)), strict=True)
    if not tensors:
        message = "holds no weights of SAM3's image model"
        message += f": names are such as {unexpected[0]}" if unexpected else ""
        raise InputError(message, where=found.path, fix="name weights of SAM3")
    problems = [f"{len(unexpected)} unexpected, such as {unexpected[0]}"] if unexpected else []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"{len(missing)} missing, such as {to_native(missing[0]) or missing[0]}")
    foreign = [name for name in tensors if name not in expected]
    if foreign:
        problems.append(f"{len(foreign)} that the base has not, such as {foreign[-1]}")
    for name in (name for name in tensors if name in expected):
        shapes = tuple(tensors[name].shape), tuple(expected[name].shape)
        if shapes[0] != shapes[1]:
            problems.append(f"{name} is {shapes[0]}, the base has {shapes[1]}")
            break
    if problems:
        message = f"is no complete checkpoint of {base}: {'; '.join(problems)}"
        raise InputError(message, where=found.path, fix="name its base with --base")
    is_native = any(to_hf(name) and name not in expected for name in found.tensors)
    if is_native:
        model.config.vision_config.backbone_config.layer_norm_eps = _VIT_EPS
        model.config.native_prompt = True
        text = "the config says layer_norm_eps 1e-5 for the ViT, as Meta's code has it, and "
        findings.append(Finding("native_settings", text + "native_prompt: true"))
    if left_out:
        text = f"{left_out} tensors have no counterpart in transformers (points_*, freqs_cis)"
        findings.append(Finding("no_counterpart", text))
    if is_native and "detector." not in found.prefixes:
        text = "no key starts with 'detector.': Meta's own loader takes none of them and says "
        findings.append(Finding("weights_not_loaded", text + "nothing; here all are loaded"))
    state = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    model.save_pretrained(staging)
    place = resolve(folder or base)
    files = [path for name in _PROCESSOR_FILES for path in place.glob(name)]
    for path in files:
        shutil.copy(path, staging / path.name)
    if not files:
        text = "no processor is in the base; load that of facebook/sam3"
        findings.append(Finding("no_processor", text))
    facts = dict.fromkeys(("rank", "alpha", "modules", "hf_modules", "parts"))
    kind = "meta_full" if is_native else "hf_full"
    return facts | {"kind": kind, "base": base, "findings": tuple(findings)}


def write_sompote(adapter, output, sections=None):
    """Write a PEFT folder in the layout of Sompote/SAM3_LoRA: the inverse of its import.

    Parameters
    ----------
    adapter : os.PathLike
        Folder of a PEFT adapter on `Sam3Model`.
    output : os.PathLike
        Folder, which gets ``best_lora_weights.pt`` and ``config.yaml``.
    sections : dict, optional
        More of the YAML, such as ``{"training": {"data_dir": ...}}``.

    Returns
    -------
    pathlib.Path
        The weights. Where A is the same for q, k and v of the ViT, they become one `qkv`; else they
        are written apart, which only `import_source` reads.
    """
    adapter, output = resolve(adapter), resolve(output)
    settings = read_json(adapter / peft_lora.CONFIG_FILE, fix="name the folder of an adapter")
    matrices, layers = lora_matrices(read_source(adapter)), {}
    for name, pair in matrices.items():
        native = to_native(name)
        if native is None:
            fix = "train without this module"
            raise InputError(f"{name} is not in Meta's code", where=adapter, fix=fix)
        layers[native] = pair.A.T, pair.B.T
    for name in [name for name in layers if _VIT_QUERY.search(name)]:
        group = [name[: -len("q_proj")] + f"{letter}_proj" for letter in "qkv"]
        if all(key in layers and layers[key][0].equal(layers[name][0]) for key in group):
            A, *B = layers[name][0], *(layers.pop(key)[1] for key in group)
            layers[name[: -len("q_proj")] + "qkv"] = A, torch.cat(B, dim=1)
    content = {
        f"{name}.lora.lora_{letter}": nn.Parameter(matrix.contiguous())
        for name, pair in layers.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    parts = {peft_lora.component_of(name) for name in matrices}
    lora = {"rank": settings["r"], "alpha": settings["lora_alpha"]}
    lora |= {"dropout": settings.get("lora_dropout", 0.0)}
    lora["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    lora |= {f"apply_to_{part}": part in parts for part in peft_lora.COMPONENTS}
    values = {"model": {"name": settings.get("base_model_name_or_path")}, "lora": lora}
    with staged_folder(output) as staging:
        torch.save(content, staging / SOMPOTE_WEIGHTS)
        write_text(staging / SOMPOTE_CONFIG, yaml_text(values | (sections or {})))
    return output / SOMPOTE_WEIGHTS
