"""What somebody else trained, as a folder that plain transformers and PEFT load.

Meta's code was trained with the geometry encoder's token behind every prompt (`model.native_prompt`),
with an eps of 1e-5 in the LayerNorm of the ViT, where transformers has 1e-6 (logits differ by up to
4e-4), and without the clamp of presence logits to -10 and 10 that transformers has. The table
``data/native_names.csv`` was read in facebookresearch/sam3 at 99d02f2 and in transformers 5.23; a star
in it stands for the number of a layer.
"""

import pickle
import re
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import Sam3Config, Sam3Model
from transformers.trainer_utils import get_last_checkpoint

from helpers.config import read_yaml, yaml_text
from helpers.errors import InputError
from helpers.files import DATA, file_digest, read_json, resolve, staged_folder, write_json
from helpers.model import lora
from helpers.model.sam3 import base_config, load_processor, refuse_lfs_pointer

DEFAULT_BASE = "facebook/sam3"
SOMPOTE_FILES = ("best_lora_weights.pt", "config.yaml")
_VIT_EPS = 1e-5
_VIT_MLP = re.compile(r"vision_encoder\.backbone\.layers\.\d+\.mlp\.fc[12]")
_VIT_QUERY = re.compile(r"\.trunk\.blocks\.\d+\.attn\.q_proj$")
# Without gradient where only words are asked: a softmax over one token, and boxes.
_NEVER_TRAINED = re.compile(r"geometry_encoder\.(layers\.\d+\.self_attn\.[qk]_proj|boxes_)")
_LAYOUTS = {"native": "sompote", "peft": "twin"}
_USUAL_FILES = [f"{name}lora_weights.pt" for name in ("best_", "last_", "")]
_USUAL_FILES += ["checkpoint.pt", "checkpoints/checkpoint.pt"]
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
_PEFT_WEIGHTS = (lora.WEIGHTS_FILE, "adapter_model.bin")
_MODEL_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_TABLES = ("model", "state_dict", "lora_state_dict", "model_state_dict")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # a start that moves its weights
_MEMORY_MAPPED = 2**30  # bytes from which a file stays on disk; its checksums are not compared
_AGAIN = "copy or download the file again, and compare its size"
# What programs put before the names of Meta's and transformers' modules, and what the tracker has.
_PREFIX = re.compile(r"(module|_orig_mod|base_model\.model|(sam3_)?model|detector(_model)?)\.")
_TRACKER = re.compile(r"tracker(_model|_neck)?\.|.*\bsam2_convs\.")
_MATRIX = re.compile(r"(.+?)\.(?:lora\.)?lora_([AB])(?:\.default)?(?:\.weight)?")

OF_META = re.compile(r"(vision|language)_backbone|transformer\.\w+coder\.|dot_prod_|tion_head")
"""What only names of Meta's code contain."""
WITHOUT_COUNTERPART = re.compile(r"geometry_encoder\.points_|.*\.attn\.freqs_cis$")
"""Names that transformers has not: points as prompts, and constants that it computes."""
_FUSED = re.compile(r"(.+?)(?:\.qkv|\.in_proj)?([._](?:weight|bias))?")
_FINDINGS = pd.read_csv(DATA / "import_findings.csv", index_col="code")


class Finding(NamedTuple):
    """A row of data/import_findings.csv, completed."""

    code: str  # that of a cause, if there is one
    message: str


def _finding(code, **values):
    return Finding(code, _FINDINGS.message[code].format(**values))


@dataclass(frozen=True)
class ImportReport:
    """What was imported, and what is wrong with it."""

    kind: str  # "sompote_lora", "twin_lora", "peft_over_meta", "peft", "meta_full" or "hf_full"
    base: str
    findings: list
    rank: int | None = None  # the most frequent one; None for a full checkpoint, as all below
    alpha: float | None = None
    modules: int | None = None  # of the file that were imported
    parts: dict | None = None  # component to its modules in transformers: q, k and v may be apart

    @property
    def status(self):
        """int: 1 if something is wrong with the file, else 0."""
        return int(_FINDINGS.status[[finding.code for finding in self.findings]].any())

    def to_json(self):
        """Return what ``python -m helpers import --json`` prints."""
        return asdict(self) | {"findings": [finding._asdict() for finding in self.findings]}


def import_source(source, output, config=None, base=None, alpha=None, orientation=None):
    """Write a LoRA as a PEFT folder, or a full checkpoint as a folder of `Sam3Model`.

    ``source`` is a file of weights or the folder with it: of Sompote/SAM3_LoRA, Meta's trainer, PEFT
    or transformers. ``output`` must be empty or missing, and stays so unless everything went well.
    ``config`` is a YAML with ``lora.rank`` and ``lora.alpha``, by default the one beside the weights;
    ``base`` a folder or a name on the hub, by default what a PEFT folder or, if it is here, the YAML
    names, else facebook/sam3.
    ``alpha`` of the LoRA is needed where no file tells it, and ``orientation``, "native" for A as
    (in, r) or "peft" for (r, in), where the shapes leave it open.

    Returns an `ImportReport`. InputError if it cannot be imported exactly.
    """
    output = resolve(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("is not an empty folder", where=output, fix="choose another --output")
    found = read_source(resolve(source), None if config is None else resolve(config))
    if named := [name for name in (found.base, base) if "sam3.1" in str(name).lower()]:
        message = f"the base is {named[0]}, whose weights are others than those of sam3"
        fix = "train again on facebook/sam3; transformers has no SAM 3.1"
        raise InputError(message, where=found.where or "--base", fix=fix)
    used = {key: found.tensors[n] for n, key in found.keys.items() if "freqs_cis" not in n}
    lora.check_tensors(used, found.path)
    with staged_folder(output) as staging:
        if found.is_lora:
            return _write_lora(found, staging, base, alpha, orientation)
        return _write_full(found, staging, base)


def _write_lora(found, staging, base, alpha, orientation):
    """Write a PEFT folder and return its `ImportReport`."""
    is_stated = found.is_peft or (resolve(str(found.base)) / "config.json").is_file()
    base = str(base or (found.base if is_stated else None) or DEFAULT_BASE)
    modules, findings = lora_matrices(found), _key_findings(found)
    linear = [(n, m) for n, m in _empty_base(base).named_modules() if isinstance(m, nn.Linear)]
    shapes = {name: tuple(module.weight.shape) for name, module in linear}
    names = {name: (name,) if name in shapes else to_hf(name) for name in modules}
    if unknown := [name for name in modules if not names[name]]:
        if len(unknown) == len(modules) or not all(map(WITHOUT_COUNTERPART.match, unknown)):
            message = f"adapts {len(unknown)} modules that SAM3 has not, such as {unknown[-1]}"
            raise InputError(message, where=found.path, fix="name a LoRA of SAM3")
        findings.append(_finding("no_counterpart", count=len(unknown), names=", ".join(unknown)))
    layers = {
        name: (sum(shapes[hf][0] for hf in group), shapes[group[0]][1])
        for name, group in names.items()
        if group and all(hf in shapes for hf in group)
    }
    modules = {name: pair for name, pair in modules.items() if names[name]}
    orientation = "peft" if found.is_peft else orientation
    modules, orientation = _oriented(modules, layers, base, orientation, found.path)
    kind = "peft_over_meta" if found.is_peft else f"{_LAYOUTS[orientation]}_lora"
    if modules.keys() <= shapes.keys():
        kind = "peft"
    ranks = Counter(len(A) for A, _ in modules.values())
    rank, alpha = ranks.most_common(1)[0][0], _alpha(found, ranks, alpha)
    tensors, rank_of = {}, {}
    for name, (A, B) in modules.items():
        for hf, part in zip(names[name], B.chunk(len(names[name])), strict=True):
            rank_of[hf] = len(A)
            tensors[f"base_model.model.{hf}.lora_A.weight"] = A.float().contiguous().clone()
            tensors[f"base_model.model.{hf}.lora_B.weight"] = part.float().contiguous().clone()
    if len(rank_of) < sum(len(names[name]) for name in modules):
        message = "holds LoRA for the same q, k and v twice, in one matrix and apart"
        raise InputError(message, where=found.path, fix="remove one of the two")
    # PEFT compares endings, and the text tower has a `text_projection` of its own.
    others = [name for name in shapes.keys() - rank_of if name.endswith("text_projection")]
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(rank_of),
        exclude_modules=others,
        rank_pattern={name: own for name, own in rank_of.items() if own != rank},
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(staging, auto_mapping_dict=lora.PLAIN_CLASS)
    lora.write_tensors(staging / lora.WEIGHTS_FILE, tensors)
    identity = {"name": base, "native_prompt": kind != "peft", "fingerprint": None}
    if found.is_peft and (found.path / lora.BASE_FILE).is_file():
        identity = read_json(found.path / lora.BASE_FILE)
    identity["weights_sha256"] = file_digest(staging / lora.WEIGHTS_FILE)
    write_json(staging / lora.BASE_FILE, identity)
    parts = Counter(lora.component_of(name) or "scoring" for name in rank_of)
    findings += _lora_findings(modules, names, parts, found.settings.get("target_modules"))
    return ImportReport(kind, base, findings, rank, alpha, len(modules), dict(parts))


def _empty_base(name):
    """Return a base without memory for its weights; that of the default needs no file."""
    with torch.device("meta"):
        return Sam3Model(Sam3Config() if name == DEFAULT_BASE else base_config(name))


def _oriented(modules, layers, base, orientation, path):
    """Turn all A to (r, in) and B to (out, r), as the user or the shapes of the whole file say."""
    options = {"native": {name: (A.T, B.T) for name, (A, B) in modules.items()}, "peft": modules}
    misfits = {}
    for option in options if orientation is None else [orientation]:
        misfits[option] = [
            name
            for name, (A, B) in options[option].items()
            if len(A) != B.shape[1] or layers.get(name) != (len(B), A.shape[1])
        ]
    possible = [option for option, names in misfits.items() if not names]
    if len(possible) == 2:
        message = f"every A and B of {len(modules)} modules is square: their orientation is open"
        fix = "give --orientation native for A as (in, r), as Sompote/SAM3_LoRA has it, or peft"
        raise InputError(message, where=path, fix=fix)
    if not possible:
        best = min(misfits, key=lambda option: len(misfits[option]))
        name = max(misfits[best], key=lambda name: name not in layers)
        A, B = (tuple(matrix.shape) for matrix in modules[name])
        actual = f"is {layers[name]} (out, in) there" if name in layers else "is not there"
        message = f"does not belong to {base}: {len(misfits[best])} of {len(modules)} modules do "
        message += f"not fit; {name} {actual}, and A is {A}, B {B}"
        fix = "name the base it was trained on with --base, or restore the file"
        raise InputError(message, where=path, fix=fix)
    return options[possible[0]], possible[0]


def _alpha(found, ranks, alpha):
    """Return alpha as the user or the settings of the training give it; it is never guessed."""
    fix = f"give alpha with --alpha; usual is twice the rank, here {2 * ranks.most_common(1)[0][0]}"
    where = "--alpha"
    if alpha is None:
        where, settings, problem = found.where or found.path, found.settings, None
        alpha = settings.get("alpha")
        if alpha is None:
            problem = "alpha is not in the weights, and there is no YAML with it"
            if not any(B.any() for _, B in lora_matrices(found).values()):
                problem += "; every B is zero, so with any alpha it answers as its base"
        elif settings.get("use_rslora") or settings.get("alpha_pattern"):
            problem = "alpha is not the same for all modules (use_rslora, alpha_pattern)"
        elif settings.get("rank") not in (None, *ranks):
            problem = f"the rank is {settings['rank']!r:.50} here and {', '.join(map(str, ranks))}"
            problem += f" in the shapes of {found.path.name}: this is not the file of its training"
        if problem:
            fix = f"give the YAML of the training with --config, or {fix}"
            raise InputError(problem, where=where, fix=fix)
    if type(alpha) not in (int, float) or not 0 < alpha <= lora.MAX_SCALE * min(ranks):
        raise InputError(f"alpha is {alpha!r:.100}", where=where, fix=fix)
    return alpha


def _key_findings(found):
    """Say what was taken off the keys, and what was left out with the tracker."""
    findings = []
    for prefix, count in found.prefixes.items():
        code = "wrapped_keys" if prefix in ("module.", "_orig_mod.") else "prefix_removed"
        if not (found.is_peft and code == "prefix_removed"):
            findings.append(_finding(code, prefix=prefix, count=count))
    if found.tracker:
        findings.append(_finding("tracker_left_out", count=found.tracker))
    return findings


def _lora_findings(modules, names, parts, asked):
    """Say what a LoRA cannot have learned."""
    findings, count = [], len(modules)
    if all(_VIT_MLP.fullmatch(hf) for name in modules for hf in names[name]):
        asked = f" ({', '.join(map(str, asked))})" if isinstance(asked, list) else ""
        findings.append(_finding("lora_elsewhere", count=count, asked=asked))
    elif lora.WORD_PARTS.isdisjoint(parts):
        findings.append(_finding("no_word_module"))
    trained = [n for n in modules if not all(map(_NEVER_TRAINED.match, names[n]))]
    if zeros := [name for name in trained if not modules[name][1].any()]:
        code = "adapter_at_zero" if len(zeros) == len(trained) else "adapter_partly_at_zero"
        listed = {"zeros": len(zeros), "names": ", ".join(zeros)}
        findings.append(_finding(code, count=count, **listed))
    if "geometry_encoder" in parts:
        findings.append(_finding("missing_geometry_token"))
    return findings


def _write_full(found, staging, base):
    """Write the folder of a `Sam3Model` and return its `ImportReport`."""
    base = str(base or (found.path if found.path.is_dir() else DEFAULT_BASE))
    model, findings = _empty_base(base), _key_findings(found)
    expected, tensors = model.state_dict(), {}
    left_out = [name for name in found.tensors if WITHOUT_COUNTERPART.match(name)]
    for name in found.tensors.keys() - left_out:
        tensor, names = found.tensors[name], () if name in expected else to_hf(name)
        if name.endswith("trunk.pos_embed") and tensor.ndim > 1:
            tensor = tensor[:, 1:]  # the place of a class token, which neither has
        elif name.endswith("encoder.text_projection"):
            tensor = tensor.T
        parts = tensor.chunk(len(names)) if len(names) > 1 and tensor.ndim else [tensor]
        tensors |= zip(names or (name,), parts, strict=False)  # what lacks then is missing
    problems = {
        "missing": expected.keys() - tensors,
        "unexpected": tensors.keys() - expected,
        "of another shape": {
            f"{name} {tuple(tensors[name].shape)} in place of {tuple(expected[name].shape)}"
            for name in expected.keys() & tensors
            if tensors[name].shape != expected[name].shape
        },
    }
    texts = [f"{len(keys)} {kind}, such as {min(keys)}" for kind, keys in problems.items() if keys]
    if texts:
        message = f"is no complete checkpoint of {base}, in names of transformers: "
        fix = "name its base with --base; only an image model of SAM3 can be imported"
        raise InputError(message + "; ".join(texts), where=found.path, fix=fix)
    kind = "hf_full" if found.tensors.keys() == tensors.keys() else "meta_full"
    if kind == "meta_full":
        model.config.vision_config.backbone_config.layer_norm_eps = _VIT_EPS
        model.config.native_prompt = True
        findings.append(_finding("native_settings"))
        if "detector." not in found.prefixes:
            findings.append(_finding("weights_not_loaded"))
    if left_out:
        listed = ", ".join(sorted(left_out))
        findings.append(_finding("no_counterpart", count=len(left_out), names=listed))
    state = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    model.save_pretrained(staging)
    try:
        load_processor(base).save_pretrained(staging)
    except InputError:
        findings.append(_finding("no_processor"))
    return ImportReport(kind, base, findings)


def write_sompote(adapter, output, sections=None):
    """Write a PEFT folder in the layout of Sompote/SAM3_LoRA: the inverse of its import."""
    # Where A is the same for q, k and v of the ViT, they become one `qkv`; else they stay apart.
    found, output, layers = read_source(resolve(adapter)), resolve(output), {}
    matrices = lora_matrices(found)
    for name, (A, B) in matrices.items():
        if to_native(name) is None:
            fix = "train without this module"
            raise InputError(f"{name} is not in Meta's code", where=found.path, fix=fix)
        layers[to_native(name)] = A.T, B.T
    for name in filter(_VIT_QUERY.search, list(layers)):
        stem, A = name.removesuffix("q_proj"), layers[name][0]
        group = [f"{stem}{letter}_proj" for letter in "qkv"]
        if all(key in layers and layers[key][0].equal(A) for key in group):
            layers[f"{stem}qkv"] = A, torch.cat([layers.pop(key)[1] for key in group], dim=1)
    content = {
        f"{name}.lora.lora_{letter}": nn.Parameter(matrix.contiguous())
        for name, pair in layers.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    parts = {lora.component_of(name) for name in matrices}
    settings = {key: found.settings[key] for key in ("rank", "alpha")}
    settings["dropout"] = found.settings.get("lora_dropout", 0.0)
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    settings |= {f"apply_to_{part}": part in parts for part in lora.COMPONENTS}
    values = {"model": {"name": found.base}, "lora": settings} | (sections or {})
    with staged_folder(output) as staging:
        torch.save(content, staging / SOMPOTE_FILES[0])
        (staging / SOMPOTE_FILES[1]).write_text(yaml_text(values), encoding="utf-8")
    return output / SOMPOTE_FILES[0]


@dataclass
class Source:
    """What a file of weights holds, and what is known of its training."""

    path: Path
    tensors: dict  # without prefixes and tracker
    keys: dict  # of the tensors to their keys in the file
    prefixes: Counter  # that were taken off the keys
    tracker: int  # tensors of the tracker, left out
    is_peft: bool  # in a folder that PEFT wrote
    settings: dict = field(default_factory=dict)  # of a LoRA: rank, alpha, target_modules
    base: str | None = None  # that the settings name
    where: Path | None = None  # the settings stand there

    @property
    def is_lora(self):
        """True if any tensor is a matrix of LoRA."""
        return any("lora_" in name for name in self.tensors)


def read_source(source, config=None):
    """Find and read the weights in a file or folder, and the settings beside them or in `config`."""
    if not source.exists():
        raise InputError("no such file or folder", where=source, fix="check the path")
    path = _weights_in(source) if source.is_dir() else source
    files, folder = [path], path.parent
    if path.is_dir():  # read as PEFT and transformers do: the first form that is there
        names, folder = (_PEFT_WEIGHTS if _is_peft(path) else _MODEL_WEIGHTS), path
        files = next(filter(None, (sorted(path.glob(name)) for name in names)), None)
        if files is None:
            raise InputError(f"holds no {names[0]}", where=path, fix="copy the whole folder")
    tensors = {}
    for file in files:
        table, others = _tensors_in(_read_file(file), file)
        tensors |= table
    found = Source(path, *_without_prefixes(tensors, path), is_peft=_is_peft(folder))
    if isinstance(others.get("lora_config"), dict):
        found.settings, found.where = others["lora_config"], path
    elif found.is_lora and (config or not found.is_peft):
        found.where = config or yaml_beside(folder)
        content = {} if found.where is None else read_yaml(found.where)
        sections = [content.get(name) or {} for name in ("lora", "model")]
        if not all(isinstance(section, dict) for section in sections):
            fix = "give the YAML of the training"
            raise InputError("has no sections lora and model", where=found.where, fix=fix)
        found.settings, found.base = sections[0], sections[1].get("name")
    elif found.is_lora:
        found.where = folder / lora.CONFIG_FILE
        content = read_json(found.where)
        start = str(content.get("init_lora_weights")).lower()
        if content.get("use_dora") or start.startswith(_CHANGES_BASE):
            message = f"has use_dora or init_lora_weights {start}, which is more than LoRA"
            fix = "merge it into its base with PEFT, and import the merged model"
            raise InputError(message, where=found.where, fix=fix)
        found.settings = content | {"rank": content.get("r"), "alpha": content.get("lora_alpha")}
        found.base = content.get("base_model_name_or_path")
    return found


def _is_peft(folder):
    return (folder / lora.CONFIG_FILE).is_file()


def _weights_in(folder):
    """Return the file of weights in a folder, or the folder if it is PEFT's or transformers'."""
    for place in (folder, folder / "adapter"):
        is_model = (place / "config.json").is_file() and any(place.glob("*.safetensors"))
        if is_model or _is_peft(place):
            return place
    for name in _USUAL_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    files = [path for path in files if path.suffix != ".safetensors"] or files  # torch's own first
    if not files and (last := get_last_checkpoint(folder)):
        return _weights_in(Path(last))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "no weights"
        fix = f"name the file ({', '.join(_WEIGHTS)})"
        raise InputError(f"holds {names}, where one file is needed", where=folder, fix=fix)
    return files[0]


def _read_file(path):
    """Return the content of a file on the CPU; nothing in it is executed."""
    size, is_zip = path.stat().st_size, zipfile.is_zipfile(path)
    if not size:
        raise InputError("is empty", where=path, fix=_AGAIN)
    refuse_lfs_pointer(path)
    try:
        with path.open("rb") as file:
            if file.read(9)[8:] == b"{":  # safetensors, whatever its name
                return load_file(path)
        is_mapped = is_zip and size > _MEMORY_MAPPED
        if is_zip and not is_mapped and (name := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {name} differs")  # torch compares none
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # damaged files raise what they happen to break
        if isinstance(error, pickle.UnpicklingError) and (is_zip or "GLOBAL" in str(error)):
            message = "holds Python objects besides tensors; to load them would run their code"
            fix = "save the state_dict alone, where you trust the file"
            raise InputError(message, where=path, fix=fix) from error
        reason = str(error).partition("\n")[0][:100]
        message = f"is cut off, damaged or no file of torch or safetensors ({reason})"
        raise InputError(message, where=path, fix=_AGAIN) from error


def _tensors_in(content, path):
    """Return the table of tensors in the content of a file, and what else is in it."""
    others = content if isinstance(content, dict) else {}
    tables = [others[name] for name in _TABLES if isinstance(others.get(name), dict)]
    for table in (*tables, others):
        tensors = {str(key): v.detach() for key, v in table.items() if torch.is_tensor(v)}
        if tensors:
            return tensors, others
    keys = f" with the keys {', '.join(map(str, others)):.100}" if others else ""
    message = f"holds no tensor but a {type(content).__name__}{keys}"
    fix = "name a file of weights; one of LoRA is empty where no module was adapted"
    raise InputError(message, where=path, fix=fix)


def _without_prefixes(tensors, path):
    """Take off what stands before the names of modules, and leave out the tracker."""
    plain, keys, prefixes, num_tracker = {}, {}, Counter(), 0
    for key, tensor in tensors.items():
        name = key
        while match := _PREFIX.match(name):
            prefixes[match[0]] += 1
            name = name[match.end() :]
        name = name.replace(".base_layer.", ".")
        if _TRACKER.match(name):
            num_tracker += 1
        elif name in plain:
            message = f"{keys[name]} and {key} are the same weight"
            raise InputError(message, where=path, fix="remove one of the two copies")
        else:
            plain[name], keys[name] = tensor, key
    return plain, keys, prefixes, num_tracker


def lora_matrices(source):
    """Return A and B of each module of a LoRA file; InputError for half of one and for other things."""
    halves = {}
    for name, tensor in source.tensors.items():
        match = _MATRIX.fullmatch(name)
        if match is None or tensor.ndim != 2 or not tensor.numel():
            message = f"holds {source.keys[name]}, shape {tuple(tensor.shape)}, besides LoRA"
            fix = "only LoRA of linear layers can be imported"
            raise InputError(message, where=source.path, fix=fix)
        halves.setdefault(match[1], {})[match[2]] = name
    for names in halves.values():
        if len(names) < 2:
            other = "B" if "A" in names else "A"
            message = f"{source.keys[names.popitem()[1]]} has no lora_{other} beside it"
            raise InputError(message, where=source.path, fix=_AGAIN)
    tensors = source.tensors
    return {module: (tensors[names["A"]], tensors[names["B"]]) for module, names in halves.items()}


def yaml_beside(folder):
    """Return the one YAML file in a folder that has a section ``lora``, or None."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    files = [path for path in files if read_yaml(path).get("lora")]
    if len(files) > 1:
        message = f"holds several YAML files with a section lora: {files[0].name}, {files[1].name}"
        raise InputError(message, where=folder, fix="name that of the training with --config")
    return files[0] if files else None


def _pattern(name):
    """Return the pattern of a module in the table and of what is in it."""
    return re.compile(re.escape(name).replace(r"\*", r"(\d+)") + r"(?=\.|$)")


def _renamed(name, rules):
    """Return a name after the first rule that fits, or None."""
    for pattern, template in rules:
        if match := pattern.match(name):
            return template.replace("*", "{}").format(*match.groups()) + name[match.end() :]
    return None


_ROWS = pd.read_csv(DATA / "native_names.csv")
_TO_HF = [(_pattern(row.meta), row.transformers) for row in _ROWS.itertuples()]
_TO_NATIVE = [(_pattern(row.transformers), row.meta) for row in _ROWS.itertuples()]


def to_hf(name):
    """Return the names in transformers of a module or weight of Meta's: none, one, or q, k and v."""
    # One matrix holds the three in this order along its output.
    if (hf := _renamed(name, _TO_HF)) is not None:
        return (hf,)
    attention, ending = _FUSED.fullmatch(name).groups(default="")
    parts = [_renamed(f"{attention}.{letter}_proj", _TO_HF) for letter in "qkv"]
    return () if None in parts else tuple(part + ending.replace("_", ".") for part in parts)


def to_native(name):
    """Return the name in Meta's code of a module, or None; q, k and v of the ViT are named apart."""
    return _renamed(name, _TO_NATIVE)
