"""What the commands of ``python -m helpers`` do; the parser is in `helpers.__main__`.

Every function takes the parsed arguments and returns ``(exit status, JSON document, text)``. The
libraries are imported inside, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from helpers.errors import InputError
from helpers.files import CONFIGS, resolve

DEFAULT_CONFIG = CONFIGS / "crack_detection_config.yaml"
LARGE = 2
"""Longest side of an image, in sides of the model's input, from which it should be cut into tiles."""
_HEADLINES = (
    "AP",
    "AP50",
    "AP75",
    "cgF1",
    "pmF1",
    "IL_MCC",
    "union_iou",
    "max_score_present",
    "max_score_absent",
)


class Loaded(NamedTuple):
    """A model ready to be asked, and the run it came from if there is one."""

    model: object
    processor: object
    run: object
    name: str


def train(args):
    """Train and report; unusable input is refused before anything is written."""
    from helpers.config import load_config
    from helpers.train.report import report, report_text
    from helpers.train.training import train as run_training
    from helpers.train.training import train_within_memory

    overrides = list(args.set)
    if args.data is not None:
        overrides.append(f"data.data_dir={resolve(args.data)}")
    config = load_config(args.config, profile=args.profile, overrides=overrides)
    output_dir = None if args.output is None else Path(args.output).expanduser().absolute()
    settings = {"output_dir": output_dir, "resume": args.resume, "overwrite": args.overwrite}
    if args.retry_smaller:
        result = train_within_memory(config, on_retry=_say, **settings)
    else:
        result = run_training(config, **settings)
    content = report(result)
    return 0, content, report_text(content)


def predict(args):
    """Detect prompts on images, and draw them if asked to."""
    from helpers.detect.predictor import GENERIC_PROMPT, PROMPTLESS_THRESHOLD, Predictor
    from helpers.detect.predictor import untrained_prompts as untrained
    from helpers.detect.tiles import predict_tiled

    images = _image_files(args.image)
    loaded = load_model(args)
    settings = loaded.run.config.evaluation if loaded.run else None
    threshold, mask_threshold = args.threshold, args.mask_threshold
    if not args.prompt:
        threshold = PROMPTLESS_THRESHOLD if threshold is None else threshold
        _say(
            f"no prompt given: asking for '{GENERIC_PROMPT}' at threshold {threshold:g}. The model "
            "outlines what that word means to it; no class comes back, and scores near 0 mean "
            "that it found nothing"
        )
    elif threshold is None:
        threshold = settings.score_threshold if settings else 0.3
    if mask_threshold is None:
        mask_threshold = settings.mask_threshold if settings else 0.5
    if loaded.run:
        known = [*loaded.run.prompts["prompts"], *loaded.run.prompts["negatives"]]
        for prompt, close in untrained(args.prompt or [GENERIC_PROMPT], known).items():
            hint = f"; the closest trained prompt is '{close}'" if close else ""
            _say(f"warning: '{prompt}' was never asked in training{hint}")
    predictor = Predictor(loaded.model, loaded.processor)
    thresholds = {"threshold": threshold, "mask_threshold": mask_threshold}
    if args.tile is None:
        _hint_at_tiles(images, loaded.model)
        found = predictor.predict(images, args.prompt or None, **thresholds)
    else:
        tiles = {"tile": args.tile, "overlap": args.overlap}
        asked = args.prompt or [GENERIC_PROMPT]
        found = [
            one
            for path in images
            for one in predict_tiled(predictor, path, asked, **tiles, **thresholds)
        ]
    document = [prediction.to_dict() for prediction in found]
    if args.output is not None:
        _draw(args.output, images, document)
    return 0, document, "\n".join(_line(entry) for entry in document)


def evaluate(args):
    """Judge a model on a split; status 1 if the split has nothing to find."""
    from helpers.config import load_config
    from helpers.data.dataset import load_dataset
    from helpers.detect.metrics import evaluate_queries
    from helpers.detect.predictor import untrained_prompts as untrained
    from helpers.detect.queries import predict_split

    loaded = load_model(args)
    config = loaded.run.config if loaded.run else load_config(DEFAULT_CONFIG)
    settings = config.evaluation
    data_dir = args.data or config.data.data_dir
    split = load_dataset(config, data_dir).split(args.split)
    if loaded.run:
        asked = [args.prompt] if args.prompt else split.categories
        for prompt in untrained(asked, loaded.run.prompts["prompts"]):
            _say(f"warning: '{prompt}' was never trained as a present prompt")
    queries = predict_split(
        loaded.model,
        loaded.processor,
        split,
        prompt=args.prompt,
        absent_prompts=settings.absent_prompts,
        mask_threshold=settings.mask_threshold,
    )
    threshold = settings.score_threshold if args.threshold is None else args.threshold
    metrics = evaluate_queries(queries, threshold)
    document = {"model": loaded.name, "data": str(data_dir), "split": split.name, **metrics}
    lines = [f"{loaded.name} on {data_dir}, {split.name}: {len(split.records)} images"]
    for name in _HEADLINES:
        value = metrics[name]
        reason = metrics.get(f"{name}_reason", "")
        lines.append(f"  {name:<18}{'undefined  ' + reason if value is None else f'{value:.4f}'}")
    return (0 if metrics["num_present"] else 1), document, "\n".join(lines)


def report(args):
    """Summarise a finished run."""
    from helpers.train.report import report as gather
    from helpers.train.report import report_text
    from helpers.train.run import read_run

    content = gather(read_run(args.adapter))
    return 0, content, report_text(content)


def diagnose(args):
    """Say why a run detects nothing; status 1 for causes, 3 if too little could be examined."""
    from helpers.diagnose.diagnosis import diagnose as examine

    diagnosis = examine(
        args.adapter,
        data_dir=args.data,
        image=args.image,
        prompt=args.prompt,
        progress=True,
    )
    status = {"healthy": 0, "causes": 1, "undecided": 3}[diagnosis.verdict]
    return status, diagnosis.to_json(), diagnosis.summary()


def load_model(args):
    """Load what ``--adapter``, ``--config``, ``--base`` and ``--profile`` describe.

    Parameters
    ----------
    args : argparse.Namespace
        ``adapter``: a run folder or any folder with a PEFT adapter. ``config``: its output folder
        holds the run. Without both the base alone is loaded: ``base``, else that of ``profile``,
        else the embedded one.

    Returns
    -------
    Loaded
        On the GPU if there is one.

    Raises
    ------
    InputError
        If any of it is missing, damaged, or does not belong together.
    """
    import torch

    from helpers.config import load_config
    from helpers.train.run import load_run

    folder = args.adapter
    if args.config is not None:
        folder = load_config(args.config, profile=args.profile).output.output_dir
    if folder is None:
        model, processor, name = _base(args)
        run, name = None, f"base {name}"
    elif _is_bare_adapter(resolve(folder)):
        from helpers.model.lora import load_adapter

        model, processor, _ = _base(args, adapter=resolve(folder))
        model, run, name = load_adapter(model, resolve(folder)), None, str(folder)
    else:
        run = load_run(folder, base=args.base)
        model, processor, name = run.model, run.processor, str(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Loaded(model.to(device), processor, run, name)


def _is_bare_adapter(folder):
    """Tell whether a folder holds a PEFT adapter but not the rest of a run."""
    from helpers.model.lora import CONFIG_FILE
    from helpers.train.run import RUN_CONFIG

    return (folder / CONFIG_FILE).is_file() and not (folder / RUN_CONFIG).is_file()


def _base(args, adapter=None):
    """Load the base that the arguments name, or that an adapter was made for; also its name."""
    from helpers.config import load_config
    from helpers.files import read_json
    from helpers.model.lora import BASE_FILE
    from helpers.model.sam3 import load_base

    if args.base is not None:
        name, settings = args.base, {}
    elif args.profile is None and adapter is not None and (adapter / BASE_FILE).is_file():
        made_for = read_json(adapter / BASE_FILE, fix="name the base with --base")
        name = str(made_for.get("name"))
        settings = {key: made_for.get(key) for key in ("revision", "resolution")}
    else:
        settings = load_config(DEFAULT_CONFIG, profile=args.profile or "tiny").model.model_dump()
        name = settings.pop("name")
    return *load_base(name, **settings), name


def _image_files(paths):
    """Return the images that paths name; a folder stands for the images directly in it."""
    from helpers.data.images import IMAGE_SUFFIXES

    files = []
    for given in paths:
        path = Path(given).expanduser()
        path = path if path.exists() else resolve(given)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise InputError("the folder holds no image", where=path, fix="name image files")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError("no such image", where=path, fix="check the path")
    return files


def _hint_at_tiles(images, model):
    """Say of which images the model sees so little that thin objects vanish."""
    from helpers.data.images import upright_size
    from helpers.model.prompted import base_of

    resolution = base_of(model).resolution
    sizes = {path: max(upright_size(path)[0]) for path in images}
    large = {path: side for path, side in sizes.items() if side > LARGE * resolution}
    if large:
        path, side = max(large.items(), key=lambda item: item[1])
        others = f" and {len(large) - 1} more" if len(large) > 1 else ""
        _say(
            f"hint: {path}{others} is shrunk from {side} pixels to {resolution}, and what is thin may "
            f"vanish; --tile {resolution} looks at every pixel, --tile with the side of the training "
            "images shows objects as large as they were there"
        )


def _draw(output, images, document):
    """Write one picture per image; with several images the name of each is put into the file's."""
    from helpers.show.pictures import save_prediction_figure

    output = Path(output).expanduser()
    for image in images:
        path = output
        if len(images) > 1:
            path = output.with_name(f"{output.stem}_{image.stem}{output.suffix}")
        if path.resolve() == image.resolve():
            raise InputError("would overwrite the image", where=path, fix="choose another --output")
        entries = [entry for entry in document if entry["image"] == str(image)]
        save_prediction_figure(path, image, entries)


def _line(entry):
    """Describe one prediction in a line."""
    count = len(entry["detections"])
    return (
        f"{entry['image']}  '{entry['prompt']}': {count} detection{'' if count == 1 else 's'}, "
        f"max score {entry['max_score']:.3f} = presence {entry['presence_prob']:.3f} x "
        f"query {entry['max_query_prob']:.3f}"
    )


def _say(text):
    """Print a remark for people on stderr."""
    print(text, file=sys.stderr)
