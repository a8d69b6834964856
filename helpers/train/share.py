"""Put a run or a merged model on the Hugging Face Hub, after a look at what would go up."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from helpers.errors import InputError
from helpers.files import read_json, resolve
from helpers.model.lora import WEIGHTS_FILE
from helpers.train.run import CARD_FILE, MERGE_FILE, RUN_FILES, VERSIONS_FILE, read_run

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
}

_CARD = """---
{metadata}
---

# SAM3 for {prompts}

{what}

## Use

```python
{code}
```

`found` has the `scores` above {threshold:g}, the threshold of this run, with their `boxes` (x0, y0,
x1, y1 in pixels) and `masks`.

## Training

{training}

## Metrics

Measured on the validation split, which also chose the checkpoint: expect a little less elsewhere.

| metric | value | meaning |
|---|---:|---|
{metrics}

## Limits

{limits}
"""


def model_card(run, own_resolution, merge=None):
    """Write the model card of a run, or of the full model it was merged into.

    Parameters
    ----------
    run : helpers.train.run.RunFiles
        Every number of the card is from its ``metrics``, ``prompts`` and ``config``.
    own_resolution : int
        Resolution of the base as it is published, see `helpers.model.sam3.base_config`. The code of the
        card sets that of the run if it differs.
    merge : dict, optional
        For a merged model: what `helpers.train.merge.merge` returns.

    Returns
    -------
    str
        Markdown with the metadata block of the Hugging Face Hub. A base in a local folder is not
        named in the metadata, since the Hub could not find it.
    """
    names = list(run.prompts["prompts"])
    prompts = ", ".join(f'"{name}"' for name in names) or "no prompt with objects"
    return _CARD.format(
        metadata=_metadata(run.config.model.name, merge).to_yaml(),
        prompts=prompts,
        what=_what(run, merge),
        code=_code(run, own_resolution, merge),
        threshold=run.config.evaluation.score_threshold,
        training="\n".join(f"- {line}" for line in _training(run)),
        metrics="\n".join(_metric_rows(run.metrics["valid"])),
        limits="\n".join(f"- {line}" for line in _limits(run, merge)),
    )


def is_on_hub(base_name):
    """Tell whether a base is named as on the Hub, and not by a folder of this machine."""
    return not resolve(base_name).is_dir() and not Path(base_name).is_absolute()


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


def _what(run, merge):
    """Say in a sentence or two what the folder holds."""
    base = run.config.model.name
    revision = run.config.model.revision
    base = f"`{base}`" + (f" at revision `{revision}`" if revision else "")
    if merge is None:
        return f"A LoRA adapter for {base}. `base.json` tells the exact base by a fingerprint."
    return (
        f"A full model: {base} with the LoRA adapter of a run merged in, in float32, and stored in "
        f"{merge['dtype']}. On {merge['num_images']} images its logits differ from those of base "
        f"and adapter by at most {merge['merged']['max_logit_difference']:.2g} before the change of type; "
        "`merge.json` has the comparison."
    )


def _code(run, own_resolution, merge):
    """Return the lines that use the result with plain transformers and PEFT."""
    settings, evaluation = run.config.model, run.config.evaluation
    prompt = next(iter([*run.prompts["prompts"], *run.prompts["negatives"]]), "object")
    resize = settings.resolution != own_resolution and not merge  # a merged model has its own
    revision = f", revision={json.dumps(settings.revision)}" if settings.revision else ""
    if merge:
        imports, source = [], "name"
        names = 'name = "."  # this folder, or its name on the Hub'
        model = "Sam3Model.from_pretrained(name, dtype=torch.float32)"
    else:
        imports, source = ["from peft import PeftModel"], f"base{revision}"
        names = f"base = {json.dumps(settings.name)}\n"
        names += 'adapter = "."  # this folder, or its name on the Hub'
        options = f"base{revision}, dtype=torch.float32{', config=config' if resize else ''}"
        model = f"PeftModel.from_pretrained(Sam3Model.from_pretrained({options}), adapter)"
    lines = [
        "import torch",
        *imports,
        f"from transformers import {'Sam3Config, ' if resize else ''}Sam3Model, Sam3Processor",
        "from transformers.image_utils import load_image",
        "",
        names,
        'image = load_image("photo.jpg")',
        "torch.set_grad_enabled(False)",
        *(_resize_lines(source, settings.resolution) if resize else []),
        "",
        f"model = {model}.eval()",
        f"processor = Sam3Processor.from_pretrained({source})",
        f"inputs = processor(images=image, text={json.dumps(prompt)}"
        f'{", size=size" if resize else ""}, return_tensors="pt")',
        "outputs = model(**inputs)",
        "[found] = processor.post_process_instance_segmentation(",
        f"    outputs, threshold={evaluation.score_threshold:g}, "
        f"mask_threshold={evaluation.mask_threshold:g}, target_sizes=[image.size[::-1]]",
        ")",
    ]
    return "\n".join(lines)


def _resize_lines(source, resolution):
    """Return the lines that bring the configuration of a base to the resolution of the run."""
    return [
        f'size = {{"height": {resolution}, "width": {resolution}}}',
        f"config = Sam3Config.from_pretrained({source})",
        'config = Sam3Config(**getattr(config, "detector_config", config.to_dict()))',
        f"config.image_size = {resolution}",
    ]


def _training(run):
    """Return what was trained, on what, and with which versions."""
    config, metrics, prompts = run.config, run.metrics, run.prompts
    asked = ", ".join(f'"{name}" on {count}' for name, count in prompts["prompts"].items())
    absent = ", ".join(f'"{name}"' for name in prompts["negatives"])
    adapted = run.adapter[run.adapter["modules"] > 0]
    where = ", ".join(
        f"{name.replace('_', ' ')} {row['modules']:.0f}"
        for name, row in adapted.drop(index="total").iterrows()
    )
    total = run.adapter.loc["total"]
    kept = metrics["best_step"] or f"{metrics['steps']}, the last"
    packages = read_json(run.folder / VERSIONS_FILE, fix="train again")["packages"]
    lines = [
        f"Prompts with objects, and the training images that show them: {asked or 'none'}.",
        f"{prompts['negatives_per_image']} absent prompts per image, drawn from {absent or 'none'}.",
        f"{metrics['objects']['train']} objects reached the loss in an epoch.",
        f"LoRA of rank {config.lora.rank} and alpha {config.lora.alpha:g} on "
        f"{total['modules']:.0f} linear layers ({where}): {total['parameters']:,.0f} parameters, "
        f"{total['share']:.2%} of all.",
        f"{metrics['epochs']:g} epochs, {metrics['steps']} steps, peak learning rate "
        f"{config.effective_learning_rate:g}, loss `{config.loss.variant}`, "
        f"{config.model.resolution} pixels, seed {config.training.seed}. Kept: step {kept}.",
        f"Training loss {metrics['train_loss']['first']:.4g} at first, "
        f"{metrics['train_loss']['last']:.4g} at last.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in packages.items()) + ".",
        f"Configuration `{config.fingerprint()}` (`config.yaml`)",
    ]
    if fingerprint := metrics.get("data_fingerprint"):
        lines[-1] += f", training data `{fingerprint}`"
    lines[-1] += "."
    return lines


def _metric_rows(valid):
    """Return a row for each metric that has a value."""
    threshold = valid.get("score_threshold")
    rows = [
        f"| {name} | {valid[name]:.4g} | {meaning} |"
        for name, meaning in _MEANING.items()
        if valid.get(name) is not None
    ]
    if threshold is not None:
        rows.append(f"| score_threshold | {threshold:g} | the threshold that counts here |")
    return rows


def _limits(run, merge):
    """Return what a user of the result has to know, the notes of the run among it."""
    limits = [f"{note[0].upper()}{note[1:]}." for note in run.metrics["notes"]]
    limits += [
        "One seed; another one gives other numbers.",
        "Prompts other than those above were never asked in training. A prompt that is absent from "
        "the image was only taught for the absent prompts listed above.",
        "Photographs unlike those of the training, other cameras, distances or materials, were not "
        "tried.",
        "Masks come from a grid coarser than the image, so a thin line has no exact outline.",
    ]
    if not is_on_hub(run.config.model.name) and not merge:
        limits.append(
            "The base is a folder where it was trained; the adapter is of no use without."
        )
    if run.config.model.name.startswith("facebook/sam3"):
        limits.append("SAM3 is under Meta's SAM License, which goes with what is derived from it.")
    else:
        limits.append("The licence is that of the base and of the photographs; it is not set here.")
    return limits


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
_SECRET_NAMES = (".env*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc", ".git-credentials")
_SECRETS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?:password|passwd|secret|api_?key|access_?token)['\"]?\s*[:=]\s*['\"]?[\w+/.=-]{12,}",
    re.IGNORECASE,
)
_MACHINE_PATH = re.compile(r"(?<![\w.:/<~*)-])/(?:[\w.-]+/)+[\w.-]+|\b[A-Z]:\\[\w.\\-]+")
_LARGEST_TEXT = 20_000_000
_BINARY = (".safetensors", ".bin", ".pt", ".pth", ".png", ".jpg", ".jpeg")


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
        What else is in the folder; a folder's name ends in ``/``.
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
        A finished run, or a folder written by `helpers.train.merge.merge`.
    repo : str
        ``name`` or ``owner/name`` on the Hub.

    Returns
    -------
    PushPlan

    Raises
    ------
    InputError
        If the name cannot be one on the Hub, if the folder is unfinished, or if anything in it,
        checkpoints aside, looks like a secret.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(str(error).strip(), where="--repo", fix="give owner/name") from error
    folder = resolve(folder)
    patterns = (*_expected_files(folder), *_ALSO)
    present = sorted(folder.iterdir())
    files = [path for path in present if path.is_file()]
    _refuse_secrets(files)
    chosen = [path for path in files if any(fnmatch(path.name, one) for one in patterns)]
    return PushPlan(
        folder=folder,
        repo=repo,
        files={path.name: path.stat().st_size for path in chosen},
        left_out=[f"{p.name}{'/' if p.is_dir() else ''}" for p in present if p not in chosen],
        missing=_missing_from_card(folder),
        machine_paths=[
            f"{path.name}: {found}"
            for path in chosen
            for found in dict.fromkeys(_MACHINE_PATH.findall(_text_of(path)))
        ],
    )


def push(plan):
    """Upload what a plan lists.

    Parameters
    ----------
    plan : PushPlan

    Returns
    -------
    str
        Address of the repository. A new one is private; an existing one stays as it is, and files
        of the same name in it are replaced.

    Raises
    ------
    InputError
        If the Hub cannot be reached or refuses.
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


def _expected_files(folder):
    """Return the names of what belongs to a run or to a merged model, refusing unfinished ones."""
    if (folder / MERGE_FILE).is_file():
        return _MERGED_FILES
    read_run(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"holds no {WEIGHTS_FILE}", where=folder, fix="train again")
    return RUN_FILES


def _refuse_secrets(files):
    """Raise InputError for a file that looks like a secret by its name or content."""
    for path in files:
        by_name = any(fnmatch(path.name, pattern) for pattern in _SECRET_NAMES)
        found = None if by_name else _SECRETS.search(_text_of(path))
        if by_name or found:
            line = "" if by_name else f":{_text_of(path)[: found.start()].count(chr(10)) + 1}"
            raise InputError(
                "looks like a secret; nothing is uploaded from this folder",
                where=f"{path}{line}",
                fix="remove it from the folder, and revoke it if it was ever shared",
            )


def _text_of(path):
    """Return the text of a file; nothing for weights and pictures."""
    if path.suffix in _BINARY or path.stat().st_size > _LARGEST_TEXT:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _missing_from_card(folder):
    """List what the card lacks for somebody else to find, use and judge the model."""
    path = folder / CARD_FILE
    if not path.is_file():
        return [f"{CARD_FILE}: there is no model card"]
    try:
        data = ModelCard.load(path).data
    except Exception as error:  # YAML and Hub classes
        raise InputError(
            f"the metadata block cannot be read ({str(error).splitlines()[0]})",
            where=path,
            fix="mend the lines between the two '---'",
        ) from error
    reasons = {
        "base_model": "the base is a folder of this machine, and no name on the Hub",
        "library_name": "the Hub cannot show how to load the model",
        "license": "nobody may use it before you say how; the base and the photographs bind you",
        "datasets": "name the data if they are on the Hub, or describe them in the card",
    }
    values = {name: data.get(name) for name in reasons}
    if values["license"] == "unknown":
        values["license"] = None
    return [f"{name}: {reason}" for name, reason in reasons.items() if not values[name]]
