"""Put a run or a merged model on the Hugging Face Hub, after a look at what would go up."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from helpers.adapters import WEIGHTS_FILE
from helpers.errors import InputError
from helpers.merging import MERGE_FILE
from helpers.paths import resolve
from helpers.run_folder import CARD_FILE, RUN_FILES, read_run

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
        A finished run, or a folder written by `helpers.merging.merge`.
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
