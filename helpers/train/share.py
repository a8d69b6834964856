"""Give a result away: a model card, a merged model, and an upload to the Hugging Face Hub."""

import html
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import Sam3Model

from helpers.data.coco import read_split
from helpers.detect.detections import masks_at_image_size, reaches
from helpers.detect.predictor import GENERIC_PROMPT, Predictor
from helpers.errors import InputError, explain, printable
from helpers.files import WALL_CRACKS, read_json, resolve, staged_folder, write_json, write_text
from helpers.model import lora
from helpers.model.sam3 import base_config, load_base
from helpers.train import run as run_folder
from helpers.train.run import CARD_FILE, RUN_CONFIG, RUN_FILES

MERGE_FILE = "merge.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_IMAGES = 4
NUM_PROMPTS = 6
_MERGED_FILES = (MERGE_FILE, CARD_FILE, "config.json", "*processor_config.json", "tokenizer*")
_MERGED_FILES += ("model*.safetensors", "model.safetensors.index.json")
_MISSING = {
    "base_model": "the base is a folder of this machine, and no name on the Hub",
    "library_name": "the Hub cannot show how to load the model",
    "license": "nobody may use it before you say how; the base and the photographs bind you",
    "datasets": "name the data if they are on the Hub, or describe them in the card",
}


def model_card(run, own_resolution, merge=None):
    """Write the card of a run, or of its `merge`; `own_resolution` is that of the base itself."""
    versions = run_folder.read_run_file(run.folder / run_folder.VERSIONS_FILE)
    adapted = run.adapter[run.adapter["modules"] > 0].drop(index="total", errors="ignore")
    card = ModelCard.from_template(
        ModelCardData(),  # the template has its own block of metadata
        template_path=str(Path(__file__).with_name("card.md")),
        config=run.config,
        metrics=run.metrics,
        prompts=run.prompts,
        merge=merge,
        own_resolution=own_resolution,
        total=run.adapter.loc["total"],
        modules=adapted["modules"].to_dict(),
        versions=versions.get("packages", {}),
        on_hub=is_on_hub(run.config.model.name),
        quoted=_quoted,
        in_code=_in_code,
        literal=_literal,
    )
    return str(card)


def _quoted(word):
    """Put a prompt in quotes, without anything that Markdown, HTML or a terminal would obey."""
    text = html.escape(printable(" ".join(word.split())), quote=False)
    return '"' + re.sub(r"([\\`*_\[\]#|!~])", r"\\\1", text) + '"'


def _in_code(text):
    return f"`{printable(text).replace('`', '')}`"


def _literal(text):
    """Write a text as a string of Python and JSON that cannot end the block of code around it."""
    return json.dumps(text).replace("`", "\\u0060").replace("<", "\\u003c")


def is_on_hub(base_name):
    """Return whether a base is named as on the Hub, and not by a folder of this machine."""
    return not resolve(base_name).is_dir() and not _is_machine_path(base_name)


def _is_machine_path(text):
    """Return whether a text is a path that means something on one machine only."""
    is_absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return is_absolute or text.startswith(("~", "file:"))


@dataclass(frozen=True)
class PushPlan:
    """What would be uploaded."""

    folder: str
    repo: str  # ``name`` or ``owner/name`` on the Hub
    files: dict  # name to size in bytes: only what this package writes, and a licence
    left_out: list  # what else is in the folder, links among it; a folder's name ends in ``/``
    missing: list  # what a reader would look for in the card and not find
    machine_paths: list  # file and path, where a file names a folder of this machine


def plan_push(folder, repo):
    """Look at what an upload would send, without sending anything.

    Parameters
    ----------
    folder : os.PathLike
        A finished run, or a folder written by `merge`; InputError if it is damaged.
    repo : str
        ``name`` or ``owner/name`` on the Hub.

    Returns
    -------
    PushPlan
        With ``folder``, ``repo``, ``files``, ``left_out``, ``missing`` and ``machine_paths``.
    """
    with explain(HFValidationError, "is no name on the Hub", where="--repo", fix="give owner/name"):
        validate_repo_id(repo)
    folder = resolve(folder)
    is_merged = (folder / MERGE_FILE).is_file()
    paths = _check_merged(folder) if is_merged else _check_run(folder)
    patterns = (*(_MERGED_FILES if is_merged else RUN_FILES), "LICENSE*")
    files, left_out = {}, []
    for path in sorted(folder.iterdir()):
        is_own = any(fnmatch(path.name, pattern) for pattern in patterns)
        if is_own and path.is_file() and not path.is_symlink():
            files[path.name] = path.stat().st_size
        else:
            left_out.append(f"{path.name}{'/' if path.is_dir() else ''}")
    named = [f"{name}: {path}" for name, path in paths if _is_machine_path(path)]
    return PushPlan(str(folder), repo, files, left_out, _missing_from_card(folder), named)


def _check_run(folder):
    """Refuse a run that is unfinished or damaged; return the files and texts that may be paths."""
    config = run_folder.read_run(folder).config
    lora.check_tensors(lora.read_adapter_weights(folder), folder / lora.WEIGHTS_FILE)
    files = lora.CONFIG_FILE, lora.BASE_FILE
    content, saved = (read_json(folder / name, fix="train again") for name in files)
    trained = {"r": config.lora.rank, "lora_alpha": config.lora.alpha}
    lora.check_config(content, trained, folder / lora.CONFIG_FILE)
    lora.check_bytes(folder / lora.WEIGHTS_FILE, saved)
    for path in (folder / name for name in RUN_FILES):
        if path.is_symlink():
            raise InputError("is a link, which is not sent", where=path, fix="put the file there")
    base, cache = config.model.name, config.training.feature_cache or ""
    texts = [base, config.data.data_dir, config.output.output_dir, cache]
    return [
        *((RUN_CONFIG, text) for text in texts),
        (lora.CONFIG_FILE, base),
        (lora.BASE_FILE, base),
    ]


def _check_merged(folder):
    """Refuse a merged model without complete weights; return the files and texts with paths."""
    weights = [path for path in folder.glob("model*.safetensors") if not path.is_symlink()]
    if not weights:
        raise InputError("holds no model.safetensors", where=folder, fix="merge again")
    for path in weights:
        damage = explain((OSError, SafetensorError), "is damaged", where=path, fix="merge again")
        with damage, safe_open(path, framework="pt") as file:
            if not (names := file.keys()):
                raise OSError("it holds no weights")
            for name in names:
                lora.check_tensors({name: file.get_tensor(name)}, path)
    base = read_json(folder / MERGE_FILE, fix="merge again").get("base", "")
    return [(MERGE_FILE, str(base))]


def push(plan):
    """Upload what a `PushPlan` lists to a repository, private if new, and return its address."""
    api = HfApi()
    try:
        url = api.create_repo(plan.repo, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type="model",
            folder_path=Path(plan.folder),
            allow_patterns=list(plan.files),
            commit_message="Upload from the SAM3 LoRA workbook",
        )
    except Exception as error:  # refused, offline, not logged in: classes of three libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "log in with 'hf auth login', with a token that may write, and try again"
        raise InputError(f"the Hub did not take it ({reason})", where=plan.repo, fix=fix) from error
    return str(url)


def _missing_from_card(folder):
    """List what the card lacks for somebody else to find, use and judge the model."""
    path = folder / CARD_FILE
    if not path.is_file():
        return [f"{CARD_FILE}: there is no model card"]
    fix = "correct the lines between the two '---'"
    with explain(Exception, "the metadata block cannot be read", where=path, fix=fix):
        data = ModelCard.load(path).data
    missing = [name for name in _MISSING if data.get(name) in (None, "", [], "unknown")]
    return [f"{name}: {_MISSING[name]}" for name in missing]


class Tolerance(NamedTuple):
    """How far two models may be apart and still count as the same."""

    logit: float
    score: float
    margin: float  # distance from the threshold within which one model alone may detect a query
    mask_iou: float  # smallest of two masks of the same query


# For a merge in float32, the same sums in another order: no score may cross the threshold. Seen are
# 3e-5 on five runs of the embedded base, and 6e-5 on 840 million random parameters at 336 pixels.
EXACT = Tolerance(logit=1e-3, score=1e-3, margin=0.0, mask_iou=0.999)
# For weights rounded to 8 bits; seen on those five runs: scores 0.012, masks 0.988.
CAST = Tolerance(logit=float("inf"), score=0.05, margin=0.05, mask_iou=0.9)


def is_same(comparison, tolerance):
    """Return whether two models count as the same by what `compare` says; NaN never does."""
    logit, score = (comparison[f"max_{name}_difference"] for name in ("logit", "score"))
    are_near = logit <= tolerance.logit and score <= tolerance.score
    has_masks = comparison["min_mask_iou"] >= tolerance.mask_iou
    return are_near and has_masks and comparison["num_changed"] == 0


class MergeDiffers(Exception):
    """The merged model detects something else; `document` is what `merge` would have returned."""

    def __init__(self, document):
        self.document = document
        super().__init__("the merged model differs from base and adapter")


def merge(folder, output, dtype=None, base=None):
    """Write a full model that plain `Sam3Model.from_pretrained` loads.

    Base and adapter are merged in float32, and the result is compared with them; then it is cast,
    written, loaded again from the written files, and compared once more.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.
    output : os.PathLike
        Folder to write; must be empty or missing. It stays so unless everything went well.
    dtype : {"float32", "bfloat16"}, optional
        Type of the written weights; by default that of the base's own files.
    base : str, optional
        Another place of the base than the run names.

    Returns
    -------
    dict
        Also in ``merge.json``: what was merged, what `compare` says of ``merged`` and ``written``
        with base and adapter, and ``same``. If that is not so, within `EXACT` or for a cast
        `CAST`, a `MergeDiffers` is raised instead.
    """
    output = resolve(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("is not an empty folder", where=output, fix="choose another --output")
    if dtype not in (None, *DTYPES):
        raise InputError(f"there is no type {dtype!r} here", fix=f"use one of {', '.join(DTYPES)}")
    run = run_folder.load_run(folder, base=base, dtype=torch.float32)
    settings = run.config.model
    if dtype is None:
        own = base_config(base or settings.name, None if base else settings.revision).dtype
        dtype = str(own or torch.float32).removeprefix("torch.")
    with staged_folder(output) as staging:
        document = _merge_into(staging, run, dtype)
        if not document["same"]:
            raise MergeDiffers(document)
        write_json(staging / MERGE_FILE, document)
        write_text(staging / CARD_FILE, model_card(run, settings.resolution, merge=document))
    return document


def _merge_into(staging, run, dtype):
    """Write the merged model and compare it twice; returns the document of `merge`."""
    evaluation, settings = run.config.evaluation, run.config.model
    thresholds = evaluation.score_threshold, evaluation.mask_threshold
    source, images = _sample_images(run.config)
    words = [*run.prompts["prompts"], *evaluation.absent_prompts]  # trained ones first
    words += [*run.prompts["negatives"], GENERIC_PROMPT]
    prompts = list(dict.fromkeys(words))[:NUM_PROMPTS]

    def answers(model, processor):
        predictor = Predictor(model, processor)
        return [raw for image in images for raw in predictor.raw(image, prompts)]

    expected = answers(run.model, run.processor)
    merged = run.model.merge_and_unload(safe_merge=True)
    in_memory = compare(expected, answers(merged, run.processor), *thresholds, EXACT.margin)
    _plain(merged).to(DTYPES[dtype]).save_pretrained(staging)
    run.processor.save_pretrained(staging)
    tolerance = EXACT if dtype == "float32" else CAST
    written = compare(expected, answers(*load_base(staging)), *thresholds, tolerance.margin)
    return {
        "base": settings.name,
        **settings.model_dump(include={"revision", "resolution"}),
        "dtype": dtype,
        "prompts": run.prompts,
        **evaluation.model_dump(include={"score_threshold", "mask_threshold"}),
        "config": run.config.fingerprint(),
        "data_fingerprint": run.metrics.get("data_fingerprint"),
        "images": source,
        "num_images": len(images),
        "merged": in_memory,
        "written": written,
        "same": is_same(in_memory, EXACT) and is_same(written, tolerance),
    }


def compare(expected, actual, score_threshold, mask_threshold, margin=0.0):
    """Compare two sequences of `RawPrediction` for the same questions, images times prompts."""
    logits, scores, ious, num_changed, num_detections = [0.0], [0.0], [1.0], 0, 0
    for first, second in zip(expected, actual, strict=True):
        for name in ("query_logits", "presence_logit", "mask_logits"):
            logits.append(np.abs(getattr(first, name) - getattr(second, name)).max())
        scores.append(np.abs(first.scores - second.scores).max())
        far = np.abs(first.scores - score_threshold) > margin
        kept, kept_too = (reaches(raw.scores, score_threshold) for raw in (first, second))
        num_changed += int(((kept != kept_too) & far).sum())
        num_detections += int(kept.sum())
        for query in np.flatnonzero(kept & kept_too):
            sizes = [(r.mask_logits[[query]], r.height, r.width) for r in (first, second)]
            mask, other = (masks_at_image_size(*size, mask_threshold) for size in sizes)
            union = (mask | other).sum()
            ious.append((mask & other).sum() / union if union else 1.0)
    return {
        "num_questions": len(expected),
        "num_detections": num_detections,  # of the first model
        "max_logit_difference": float(np.max(logits)),  # over all queries, detected or not
        "max_score_difference": float(np.max(scores)),
        "num_changed": num_changed,  # queries that one model alone detects outside the margin
        "min_mask_iou": float(np.min(ious)),  # over what both detect
    }


def _sample_images(config):
    """Return where the sample comes from, and images of the validation split or the course's."""
    try:
        name, split = "validation split", read_split(config.data.data_dir, config.data.val_split)
    except InputError:
        name, split = "data/wall_cracks", read_split(WALL_CRACKS, "valid")
    paths = [record.path for record in split.records]
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(NUM_IMAGES, len(paths))).astype(int))
    return name, [paths[index] for index in chosen]


def _plain(model):
    """Return the library's own class with the same weights, so that config.json names it."""
    with torch.device("meta"):
        plain = Sam3Model(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain
