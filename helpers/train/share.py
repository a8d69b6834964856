"""Give a result away: a model card, a merged model, and an upload to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import html
import json
import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import Sam3Model

from helpers.data.coco import read_split
from helpers.detect.detections import masks_at_image_size, reaches
from helpers.detect.predictor import GENERIC_PROMPT, Predictor
from helpers.errors import InputError, printable
from helpers.files import WALL_CRACKS, read_json, resolve, staged_folder, write_json, write_text
from helpers.model.lora import BASE_FILE, CONFIG_FILE, read_adapter_weights
from helpers.model.sam3 import base_config, load_base
from helpers.train.run import (
    CARD_FILE,
    MERGE_FILE,
    RUN_CONFIG,
    RUN_FILES,
    VERSIONS_FILE,
    Versions,
    load_run,
    read_run,
    read_run_file,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_IMAGES = 4
NUM_PROMPTS = 6
_TEMPLATE = Path(__file__).with_name("card.md")
_SAM_LICENSE = {
    "license": "other",
    "license_name": "sam-license",
    "license_link": "https://huggingface.co/facebook/sam3/blob/main/LICENSE",
}
_MEANING = {
    "AP": "average precision of the masks, mean over IoU 0.5 to 0.95",
    "AP50": "average precision of the masks, one counts as right at an IoU of 0.5",
    "AP75": "the same at an IoU of 0.75",
    "box_AP": "average precision of the boxes, mean over IoU 0.5 to 0.95",
    "cgF1": "SAM3's own metric, pmF1 x IL_MCC",
    "pmF1": "F1 of the masks on images that show the object, mean over IoU 0.5 to 0.95",
    "IL_MCC": "does it say yes and no rightly, image by image; -1 to 1",
    "union_iou": "IoU of all detected pixels with all true pixels",
    "max_score_present": "mean of the highest score where the object is in the image",
    "max_score_present_share_above": "share of those images with a score above the threshold",
    "max_score_absent": "mean of the highest score where the prompt is absent",
    "max_score_absent_share_above": "share of those questions with a score above the threshold",
    "num_present": "images x prompts where the object is there",
    "num_absent": "images x prompts where it is not",
    "score_threshold": "the threshold that counts here",
}
_MERGED_FILES = (
    MERGE_FILE,
    CARD_FILE,
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_ALSO = ("LICENSE*",)
_MISSING = {
    "base_model": "the base is a folder of this machine, and no name on the Hub",
    "library_name": "the Hub cannot show how to load the model",
    "license": "nobody may use it before you say how; the base and the photographs bind you",
    "datasets": "name the data if they are on the Hub, or describe them in the card",
}


def model_card(run, own_resolution, merge=None):
    """Write the model card of a run, or of the full model it was merged into.

    Every number is from the `RunFiles`. The code sets the resolution of the run if it differs from
    `own_resolution`, that of the published base; `merge` is the document of `merge`. A base in a
    local folder is not named in the metadata, since the Hub could not find it.
    """
    config, metrics, prompts = run.config, run.metrics, run.prompts
    name, revision = config.model.name, config.model.revision
    versions = read_run_file(run.folder / VERSIONS_FILE, Versions).get("packages", {})
    layers = run.adapter[run.adapter["modules"] > 0].drop(index="total", errors="ignore")
    valid = {key: metrics["valid"].get(key) for key in _MEANING}
    prompt = next(iter([*prompts["prompts"], *prompts["negatives"]]), "object")
    card = ModelCard.from_template(
        _metadata(name, merge),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        merge=merge,
        names=", ".join(_quoted(word) for word in prompts["prompts"]),
        base_text=_in_code(name) + (f" at revision {_in_code(revision)}" if revision else ""),
        base_code=_literal(name),
        source="name" if merge else f"base, revision={_literal(revision)}" if revision else "base",
        prompt_code=_literal(prompt),
        resolution=config.model.resolution,
        resize=config.model.resolution != own_resolution and not merge,  # merged: its own
        threshold=f"{config.evaluation.score_threshold:g}",
        mask_threshold=f"{config.evaluation.mask_threshold:g}",
        counts=", ".join(f"{_quoted(word)} on {n}" for word, n in prompts["prompts"].items()),
        negatives=", ".join(_quoted(word) for word in prompts["negatives"]),
        negatives_per_image=prompts["negatives_per_image"],
        metrics=metrics,
        lora=config.lora,
        total=run.adapter.loc["total"],
        places=", ".join(
            f"{key.replace('_', ' ')} {n:.0f}" for key, n in layers["modules"].items()
        ),
        learning_rate=config.effective_learning_rate,
        variant=config.loss.variant,
        seed=config.training.seed,
        versions=", ".join(f"{key} {value}" for key, value in versions.items()),
        fingerprint=config.fingerprint(),
        rows=[(k, f"{v:.4g}", _MEANING[k]) for k, v in valid.items() if v is not None],
        on_hub=is_on_hub(name),
        is_sam3=name.startswith("facebook/sam3"),
    )
    return str(card)


def _quoted(word):
    """Put a prompt in quotes, without anything that Markdown, HTML or a terminal would obey."""
    text = html.escape(printable(" ".join(word.split())), quote=False)
    return '"' + re.sub(r"([\\`*_\[\]#|!~])", r"\\\1", text) + '"'


def _in_code(text):
    """Put a name in backticks."""
    return f"`{printable(text).replace('`', '')}`"


def _literal(text):
    """Write a text as a string of Python and JSON that cannot end the block of code it stands in."""
    return json.dumps(text).replace("`", "\\u0060").replace("<", "\\u003c")


def is_on_hub(base_name):
    """Return whether a base is named as on the Hub, and not by a folder of this machine."""
    return not resolve(base_name).is_dir() and not _is_machine_path(base_name)


def _is_machine_path(text):
    """Return whether a text is a path that means something on one machine only."""
    is_absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return is_absolute or text.startswith(("~", "file:"))


def _metadata(base_name, merge):
    """Return the metadata block; a licence is named only where it is known."""
    known = _SAM_LICENSE if base_name.startswith("facebook/sam3") else {"license": "unknown"}
    on_hub = {"base_model": base_name} if is_on_hub(base_name) else {}
    if on_hub and merge:
        on_hub["base_model_relation"] = "finetune"
    return ModelCardData(
        library_name="transformers" if merge else "peft",
        pipeline_tag="image-segmentation",
        tags=["sam3", "image-segmentation", "open-vocabulary", *([] if merge else ["lora"])],
        **known,
        **on_hub,
    )


@dataclass(frozen=True)
class PushPlan:
    """What would be uploaded.

    Attributes
    ----------
    folder : pathlib.Path
    repo : str
        ``name`` or ``owner/name`` on the Hub.
    files : dict of str to int
        File name to its size in bytes. Only files that this package writes, and a licence.
    left_out : list of str
        What else is in the folder, links among it; a folder's name ends in ``/``.
    missing : list of str
        What a reader would look for in the card and not find.
    machine_paths : list of str
        File and path, where a file names a folder of this machine.
    """

    folder: Path
    repo: str
    files: dict
    left_out: list
    missing: list
    machine_paths: list

    def to_json(self):
        """Return the plan as plain values."""
        return asdict(self) | {"folder": str(self.folder)}


def plan_push(folder, repo):
    """Look at what an upload would send, without sending anything.

    Parameters
    ----------
    folder : os.PathLike
        A finished run, or a folder written by `merge`.
    repo : str
        ``name`` or ``owner/name`` on the Hub.

    Returns
    -------
    PushPlan

    Raises
    ------
    InputError
        If the name cannot be one on the Hub, or the folder is unfinished or damaged.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(str(error).strip(), where="--repo", fix="give owner/name") from error
    folder = resolve(folder)
    if (folder / MERGE_FILE).is_file():
        patterns, paths = _MERGED_FILES, _check_merged(folder)
    else:
        patterns, paths = RUN_FILES, _check_run(folder)
    present = sorted(folder.iterdir())
    files = [
        path
        for path in present
        if path.is_file()
        and not path.is_symlink()
        and any(fnmatch(path.name, pattern) for pattern in (*patterns, *_ALSO))
    ]
    return PushPlan(
        folder=folder,
        repo=repo,
        files={path.name: path.stat().st_size for path in files},
        left_out=[f"{p.name}{'/' if p.is_dir() else ''}" for p in present if p not in files],
        missing=_missing_from_card(folder),
        machine_paths=[f"{name}: {path}" for name, path in paths if _is_machine_path(path)],
    )


def _check_run(folder):
    """Refuse a run that is unfinished or damaged; return the files and texts that may be paths."""
    config = read_run(folder).config
    read_adapter_weights(folder)
    for name in (CONFIG_FILE, BASE_FILE):
        read_json(folder / name, fix="train again")
    for path in (folder / name for name in RUN_FILES):
        if path.is_symlink():
            raise InputError("is a link, which is not sent", where=path, fix="put the file there")
    texts = [config.model.name, config.data.data_dir, config.output.output_dir]
    texts.append(config.training.feature_cache or "")
    base = [(name, config.model.name) for name in (CONFIG_FILE, BASE_FILE)]
    return [*((RUN_CONFIG, text) for text in texts), *base]


def _check_merged(folder):
    """Refuse a merged model without complete weights; return the files and texts with paths."""
    document = read_json(folder / MERGE_FILE, fix="merge again")
    weights = [path for path in folder.glob("model*.safetensors") if not path.is_symlink()]
    if not weights:
        raise InputError("holds no model.safetensors", where=folder, fix="merge again")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                empty = not file.keys()
        except (OSError, SafetensorError) as error:
            raise InputError(f"is damaged ({error})", where=path, fix="merge again") from error
        if empty:
            raise InputError("holds no weights", where=path, fix="merge again")
    return [(MERGE_FILE, str(document.get("base", "")))]


def push(plan):
    """Upload what a `PushPlan` lists and return the address of the repository.

    A new repository is private; an existing one stays as it is, and files of the same name in it
    are replaced. An InputError says that the Hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        url = api.create_repo(plan.repo, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type="model",
            folder_path=plan.folder,
            allow_patterns=list(plan.files),
            commit_message="Upload from the SAM3 LoRA workbook",
        )
    except Exception as error:  # refused, offline, not logged in: classes of three libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the Hub did not take it ({reason})",
            where=plan.repo,
            fix="log in with 'hf auth login', with a token that may write, and try again",
        ) from error
    return str(url)


def _missing_from_card(folder):
    """List what the card lacks for somebody else to find, use and judge the model."""
    path = folder / CARD_FILE
    if not path.is_file():
        return [f"{CARD_FILE}: there is no model card"]
    try:
        data = ModelCard.load(path).data
    except Exception as error:  # YAML and Hub classes
        raise InputError(
            f"the metadata block cannot be read ({str(error).partition(chr(10))[0]})",
            where=path,
            fix="mend the lines between the two '---'",
        ) from error
    values = {name: data.get(name) for name in _MISSING}
    if values["license"] == "unknown":
        values["license"] = None
    return [f"{name}: {reason}" for name, reason in _MISSING.items() if not values[name]]


@dataclass(frozen=True)
class Tolerance:
    """How far two models may be apart and still count as the same.

    Largest differences of a logit and of a score, the distance from the threshold within which one
    model alone may detect a query, and the smallest IoU of two masks of the same query.
    """

    logit: float
    score: float
    margin: float
    mask_iou: float


# For a merge in float32, the same sums in another order: no score may cross the threshold. Seen are
# 3e-5 on five runs of the embedded base, and 6e-5 on 840 million random parameters at 336 pixels.
EXACT = Tolerance(logit=1e-3, score=1e-3, margin=0.0, mask_iou=0.999)
# For weights rounded to 8 bits; seen on those five runs: scores 0.012, masks 0.988.
CAST = Tolerance(logit=float("inf"), score=0.05, margin=0.05, mask_iou=0.9)


@dataclass(frozen=True)
class Comparison:
    """What differs between two models on the same questions, images times prompts.

    Detections are those of the first model; differences are over all queries, detected or not;
    changed are queries that one model detects outside the margin; the IoU is over what both detect.
    """

    num_questions: int
    num_detections: int
    max_logit_difference: float
    max_score_difference: float
    num_changed: int
    min_mask_iou: float

    def within(self, tolerance):
        """Return whether the two models count as the same; NaN never does."""
        return (
            self.max_logit_difference <= tolerance.logit
            and self.max_score_difference <= tolerance.score
            and self.num_changed == 0
            and self.min_mask_iou >= tolerance.mask_iou
        )


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
        Also in ``merge.json``: ``base``, ``revision``, ``resolution``, ``dtype``, ``prompts``,
        ``score_threshold``, ``mask_threshold``, ``config`` and ``data_fingerprint`` of the run,
        ``images`` (where the compared images are from), ``num_images``, ``merged`` and
        ``written``, two `Comparison` with base and adapter as dicts, and ``same``.

    Raises
    ------
    InputError
        If the output holds files, the type is unknown, or the run cannot be loaded.
    MergeDiffers
        If a comparison is not within its tolerance, `EXACT` or, for a cast, `CAST`.
    """
    output = resolve(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("is not an empty folder", where=output, fix="choose another --output")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"there is no type {dtype!r} here", fix=f"use one of {', '.join(DTYPES)}")
    run = load_run(folder, base=base, dtype=torch.float32)
    settings = run.config.model
    if dtype is None:
        own = base_config(base or settings.name, None if base else settings.revision).dtype
        dtype = str(own or torch.float32).removeprefix("torch.")
    was_missing = not output.exists()
    try:
        with staged_folder(output) as staging:
            document = _merge_into(staging, run, dtype)
            if not document["same"]:
                raise MergeDiffers(document)
            write_json(staging / MERGE_FILE, document)
            card = model_card(run, settings.resolution, merge=document)
            write_text(staging / CARD_FILE, card)
    except BaseException:
        if was_missing:
            with contextlib.suppress(OSError):  # the folder that the staging made
                output.rmdir()
        raise
    return document


def _merge_into(staging, run, dtype):
    """Write the merged model and compare it twice; returns the document of `merge`."""
    evaluation, settings = run.config.evaluation, run.config.model
    thresholds = evaluation.score_threshold, evaluation.mask_threshold
    source, images = _sample_images(run.config)
    prompts = [*run.prompts["prompts"], *evaluation.absent_prompts]  # trained ones first
    prompts += [*run.prompts["negatives"], GENERIC_PROMPT]
    prompts = list(dict.fromkeys(prompts))[:NUM_PROMPTS]

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
        "revision": settings.revision,
        "resolution": settings.resolution,
        "dtype": dtype,
        "prompts": run.prompts,
        "score_threshold": evaluation.score_threshold,
        "mask_threshold": evaluation.mask_threshold,
        "config": run.config.fingerprint(),
        "data_fingerprint": run.metrics.get("data_fingerprint"),
        "images": source,
        "num_images": len(images),
        "merged": asdict(in_memory),
        "written": asdict(written),
        "same": in_memory.within(EXACT) and written.within(tolerance),
    }


def compare(expected, actual, score_threshold, mask_threshold, margin=0.0):
    """Compare two sequences of `RawPrediction` for the same questions, in the same order.

    A query of the first whose score is within `margin` of the threshold may be detected or not.
    """
    logits, scores, ious, num_changed, num_detections = [0.0], [0.0], [1.0], 0, 0
    for first, second in zip(expected, actual, strict=True):
        for name in ("query_logits", "presence_logit", "mask_logits"):
            logits.append(float(np.abs(getattr(first, name) - getattr(second, name)).max()))
        scores.append(float(np.abs(first.scores - second.scores).max()))
        detected, detected_too = (reaches(raw.scores, score_threshold) for raw in (first, second))
        far = np.abs(first.scores - score_threshold) > margin
        num_changed += int(((detected != detected_too) & far).sum())
        num_detections += int(detected.sum())
        for query in np.flatnonzero(detected & detected_too):
            mask, mask_too = (
                masks_at_image_size(raw.mask_logits[[query]], raw.height, raw.width, mask_threshold)
                for raw in (first, second)
            )
            union = (mask | mask_too).sum()
            ious.append(float((mask & mask_too).sum() / union) if union else 1.0)
    return Comparison(
        num_questions=len(expected),
        num_detections=num_detections,
        max_logit_difference=float(np.max(logits)),
        max_score_difference=float(np.max(scores)),
        num_changed=num_changed,
        min_mask_iou=float(np.min(ious)),
    )


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
