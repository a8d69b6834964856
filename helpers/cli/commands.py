"""The commands of ``python -m helpers``.

Every command takes the parsed arguments and returns ``(exit status, JSON document, text)``.
Libraries are imported inside, so that ``--help`` answers at once.
"""

import argparse
import sys
from pathlib import Path

from helpers.cli.options import add_options
from helpers.errors import InputError, printable
from helpers.files import CONFIGS, in_current_folder, resolve

DEFAULT_CONFIG = CONFIGS / "crack_detection_config.yaml"
LARGE = 2  # sides of the model's input from which an image should be cut into tiles
_SIGNATURE = "sam3-lora-workbook predict"  # in a picture: a later call may replace it
_HEADLINES = "AP AP50 AP75 cgF1 pmF1 IL_MCC union_iou max_score_present max_score_absent".split()


def add_commands(add):
    """Add the parser of every command."""
    command = add(check)
    text = "folder with one folder per split, by default data.data_dir of --config"
    command.add_argument("data", nargs="?", type=in_current_folder, metavar="DATA", help=text)
    profile = "tiny, sam3 or a file; without --config tiny by default"
    own = {"config": "check as its training would read it", "profile": profile}
    add_options(command, "--config", "--profile", "--set", **own)

    command = add(convert)
    command.add_argument("source", metavar="SRC", help="dataset: a folder, or a COCO file")
    command.add_argument("output", metavar="DST", help="new folder, one folder per split in it")
    text = "divide anew into train, valid and test, for example 0.8 0.1 0.1"
    command.add_argument("--split", nargs="+", type=float, metavar="SHARE", help=text)
    own = ("--format", "--category", "--objects", "--polygons", "--seed")
    add_options(command, *own, "--tile", "--overlap")

    command = add(import_)
    text = "weights, or their folder: of Sompote/SAM3_LoRA, Meta's trainer, PEFT or transformers"
    command.add_argument("source", type=in_current_folder, metavar="SOURCE", help=text)
    config = "YAML of the training, by default the one beside the weights"
    own = ("--config", "--base", "--alpha", "--orientation")
    add_options(command, *own, required=["--output"], config=config)

    model = argparse.ArgumentParser(add_help=False)
    source = model.add_mutually_exclusive_group()
    adapter = "run folder, or folder of a PEFT adapter"
    config = "find the run in its output.output_dir"
    add_options(source, "--adapter", "--config", adapter=adapter, config=config)
    add_options(model, "--base", "--profile", profile="tiny (default) or sam3: whose base to use")

    output = "run folder, by default output.output_dir"
    own = ("--profile", "--data", "--set", "--resume", "--overwrite", "--retry-smaller")
    add_options(add(train), *own, "--output", "--dry-run", required=["--config"], output=output)

    command = add(predict, model)
    text = "files or folders"
    command.add_argument("--image", nargs="+", action="extend", required=True, help=text)
    command.add_argument("--prompt", action="append", default=[], help="noun; may be repeated")
    command.add_argument("--output", metavar="PNG", help="picture to draw")
    own = ("--threshold", "--mask-threshold", "--tile", "--overlap", "--routing")
    add_options(command, *own)

    add_options(add(knows, model), "--words", "--data", "--split", "--threshold")
    own = ("--data", "--split", "--prompt", "--threshold", "--routing", "--retention")
    add_options(add(evaluate, model), *own)
    add_options(add(report), required=["--adapter"])
    add_options(add(diagnose), "--data", "--image", "--prompt", required=["--adapter"])
    add_options(add(merge), "--dtype", "--base", required=["--adapter", "--output"])
    merged = "run folder, or folder of a merged model"
    add_options(add(push), "--yes", required=["--adapter", "--repo"], adapter=merged)


def check(args):
    """Check a dataset; status 1 if a finding is an error."""
    from helpers.checks.dataset import check_dataset
    from helpers.config import load_config
    from helpers.data.dataset import load_dataset
    from helpers.model.sam3 import load_base

    if args.data is None and args.config is None:
        raise InputError("neither a dataset nor a config is named", fix="name the folder to check")
    profile = args.profile or (None if args.config else "tiny")
    config = load_config(args.config or DEFAULT_CONFIG, profile=profile, overrides=args.set)
    model = processor = None
    if resolve(config.model.name).is_dir():  # else a gated model, which a data check does not need
        model, processor = load_base(config.model.name, resolution=config.model.resolution)
    report = check_dataset(load_dataset(config, args.data), model, processor)
    return (0 if report.ok else 1), report.to_json(), report.summary()


def convert(args):
    """Write a dataset of any common format in the layout that the other commands read."""
    from helpers.convert.conversion import convert as run_conversion
    from helpers.convert.conversion import summary_text

    names = "format", "category", "objects", "polygons", "split", "seed", "tile", "overlap"
    settings = {name: getattr(args, name) for name in names}
    summary = run_conversion(args.source, args.output, **settings)
    return 0, summary, summary_text(summary)


def import_(args):
    """Make what somebody else trained readable; status 1 if something is wrong with it."""
    from helpers.foreign import import_source

    names = "config", "base", "alpha", "orientation"
    own = {name: getattr(args, name) for name in names}
    report = import_source(args.source, args.output, **own)
    return report.status, report.to_json(), report.summary()


def train(args):
    """Train and report; unusable input is refused before anything is written."""
    from helpers.config import load_config
    from helpers.train.report import report, report_text
    from helpers.train.run import RUN_CONFIG
    from helpers.train.training import dry_run, dry_run_text, train_within_memory
    from helpers.train.training import train as run_training

    overrides = list(args.set)
    if args.data is not None:
        overrides.append(("data.data_dir", args.data))
    config = load_config(args.config, profile=args.profile, overrides=overrides)
    if args.dry_run:
        result = dry_run(config)
        return (0 if result["fits"] else 1), result, dry_run_text(result)
    settings = {"output_dir": args.output, "resume": args.resume, "overwrite": args.overwrite}
    try:
        if args.retry_smaller:
            result = train_within_memory(config, on_retry=_say, **settings)
        else:
            result = run_training(config, **settings)
    except KeyboardInterrupt:
        if (resolve(args.output or config.output.output_dir) / RUN_CONFIG).is_file():
            _say("continue with --resume")
        raise
    content = report(result)
    return 0, content, report_text(content)


def predict(args):
    """Detect prompts on images, and draw them if asked to."""
    from helpers.detect.predictor import (
        GENERIC_PROMPT,
        PROMPTLESS_THRESHOLD,
        Predictor,
        untrained_prompts,
    )
    from helpers.detect.tiles import predict_tiled
    from helpers.show.pictures import save_prediction_figure

    images = _image_files(args.image)
    paths = {} if args.output is None else _picture_paths(args.output, images)
    model, processor, run, config, _ = load_model(args)
    settings = config.evaluation
    prompts, threshold, mask_threshold = args.prompt, args.threshold, args.mask_threshold
    if threshold is None:
        threshold = settings.score_threshold if prompts else PROMPTLESS_THRESHOLD
    if not prompts:
        prompts = [GENERIC_PROMPT]
        _say(
            f"no prompt given: asking for '{GENERIC_PROMPT}' at threshold {threshold:g}. The model "
            "outlines what that word means to it; no class comes back, and scores near 0 mean "
            "that it found nothing"
        )
    if run:
        asked = ("prompts", "negatives", "replayed")
        known = [word for name in asked for word in run.prompts.get(name, ())]
        for prompt, close in untrained_prompts(prompts, known).items():
            hint = f"; the closest trained prompt is '{close}'" if close else ""
            _say(f"warning: '{prompt}' was never asked in training{hint}")
    predictor = Predictor(model, processor, _routes(args, run))
    mask_threshold = settings.mask_threshold if mask_threshold is None else mask_threshold
    thresholds = {"threshold": threshold, "mask_threshold": mask_threshold}
    if args.tile is None:
        _hint_at_tiles(images, model)
        predictions = predictor.predict(images, prompts, **thresholds)
    else:
        tiles, predictions = {"tile": args.tile, "overlap": args.overlap}, []
        for path in images:
            predictions += predict_tiled(predictor, path, prompts, **tiles, **thresholds)
    document, lines = [prediction.to_dict() for prediction in predictions], []
    for image, path in paths.items():
        entries = [entry for entry in document if entry["image"] == str(image)]
        save_prediction_figure(path, image, entries, software=_SIGNATURE)
    for entry in document:
        count = len(entry["detections"])
        lines.append(
            f"{entry['image']}  '{entry['prompt']}': {count} detection{'' if count == 1 else 's'}, "
            f"max score {entry['max_score']:.3f} = presence {entry['presence_prob']:.3f} x "
            f"query {entry['max_query_prob']:.3f}"
        )
    return 0, document, "\n".join(lines)


def evaluate(args):
    """Judge a model on a split; status 1 if the split has nothing to find."""
    from helpers.data.dataset import load_dataset
    from helpers.detect.knowledge import retention
    from helpers.detect.metrics import evaluate_queries
    from helpers.detect.predictor import untrained_prompts
    from helpers.detect.queries import predict_split

    model, processor, run, config, name = load_model(args)
    settings = config.evaluation
    data_dir = args.data or config.data.data_dir
    split = load_dataset(config, data_dir).split(args.split)
    if run:
        words = [args.prompt] if args.prompt else split.categories
        for prompt in untrained_prompts(words, run.prompts["prompts"]):
            _say(f"warning: '{prompt}' was never trained as a present prompt")
    asked = {key: getattr(settings, key) for key in ("absent_prompts", "mask_threshold")}
    asked |= {"prompt": args.prompt, "adapter_words": _routes(args, run)}
    queries = predict_split(model, processor, split, **asked)
    threshold = settings.score_threshold if args.threshold is None else args.threshold
    metrics = evaluate_queries(queries, threshold)
    document = {"model": name, "data": str(data_dir), "split": split.name, **metrics}
    lines = [f"{name} on {data_dir}, {split.name}: {len(split.records)} images"]
    for metric in _HEADLINES:
        value, reason = metrics[metric], metrics.get(f"{metric}_reason", "")
        lines.append(f"  {metric:<18}{'undefined  ' + reason if value is None else f'{value:.4f}'}")
    if args.retention is not None:
        kept = retention(model, processor, split, _words(args.retention))
        if not kept["objects"]:
            message = f"the base detects none of {', '.join(kept['words'])}"
            raise InputError(message, where=f"{data_dir}, {split.name}", fix="name what it knows")
        document["retention"] = kept
        lines.append(
            f"  of {kept['objects']} objects that the base detects as {', '.join(kept['words'])}: "
            f"AP {kept['AP']:.4f}, AP50 {kept['AP50']:.4f}"
        )
        lines += [f"    {printable(word):<16}{ap:.4f}" for word, ap in kept["by_word"].items()]
    return (0 if metrics["num_present"] else 1), document, "\n".join(lines)


def knows(args):
    """Say how well a model knows words on images that show them; status 1 if one is locked."""
    from helpers.data.dataset import load_dataset
    from helpers.detect.knowledge import ADVICE, word_knowledge

    model, processor, _, config, name = load_model(args)
    split = load_dataset(config, args.data or config.data.data_dir).split(args.split)
    words = None if args.words is None else _words(args.words)
    own = {} if args.threshold is None else {"threshold": args.threshold}
    table = word_knowledge(model, processor, split, words, **own)
    lines = [f"{name} on {split.root}, {split.name}:"]
    for word, row in table.iterrows():
        lines.append(
            f"  {printable(word)}: detected on {row['detected']:.0%} of {row['images']} images "
            f"[{row['low']:.0%}, {row['high']:.0%}], presence {row['presence_prob']:.4f}, "
            f"best query {row['max_query_prob']:.3f}"
        )
        lines.append(f"    {ADVICE[row['knowledge']]}")
    document = {"model": name, "split": split.name, "words": table.to_dict(orient="index")}
    return int((table["knowledge"] == "locked").any()), document, "\n".join(lines)


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

    own = {"data_dir": args.data, "image": args.image, "prompt": args.prompt}
    diagnosis = examine(args.adapter, **own, progress=True)
    status = {"healthy": 0, "causes": 1, "undecided": 3}[diagnosis.verdict]
    return status, diagnosis.to_json(), diagnosis.summary()


def merge(args):
    """Write a full model; status 1, and nothing written, if it detects anything else."""
    from helpers.train.share import MergeDiffers
    from helpers.train.share import merge as merge_run

    try:
        document, status = merge_run(args.adapter, args.output, args.dtype, args.base), 0
    except MergeDiffers as verdict:
        document, status = verdict.document, 1
    lines = [
        f"compared with base and adapter on {document['num_images']} images "
        f"({document['images']}), {document['written']['num_questions']} questions:"
    ]
    for name, dtype in (("merged", "float32"), ("written", document["dtype"])):
        title, numbers = f"{name}, {dtype}", document[name]
        lines.append(
            f"  {title:<18}{numbers['num_detections']} detections, {numbers['num_changed']} changed; "
            f"logits differ by at most {numbers['max_logit_difference']:.2g}, scores by "
            f"{numbers['max_score_difference']:.2g}; masks agree to an IoU of at least "
            f"{numbers['min_mask_iou']:.3f}"
        )
    same = f"the same: {args.output} is a full model in {document['dtype']}"
    lines.append("not the same: nothing was written" if status else same)
    return status, document, "\n".join(lines)


def push(args):
    """Show what an upload to the Hugging Face Hub would send; with --yes, send it."""
    from helpers.train.share import plan_push
    from helpers.train.share import push as upload

    plan = plan_push(args.adapter, args.repo)
    url = upload(plan) if args.yes else None
    document = vars(plan) | {"url": url}
    total = sum(plan.files.values())
    lines = [f"{plan.folder} -> {plan.repo}: {len(plan.files)} files, {total / 1e6:.1f} MB"]
    lines += [f"  {size:>13,}  {name}" for name, size in plan.files.items()]
    for title, entries in (
        ("left out", plan.left_out),
        ("missing from the card", plan.missing),
        ("names a folder of this machine", plan.machine_paths),
    ):
        lines += [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
    lines.append(f"uploaded to {url}" if url else "nothing was sent; add --yes to upload")
    return 0, document, "\n".join(lines)


def _words(text):
    """Return the words of a list that is separated by commas."""
    return [word.strip() for word in text.split(",")]


def _routes(args, run):
    """Return the words that go to the adapter, or None without routing."""
    if not args.routing:
        return None
    if run is None:
        message = "--routing needs the words that the adapter was trained for"
        raise InputError(message, fix="name a run folder, which holds them, with --adapter")
    return list(run.prompts["prompts"])


def load_model(args):
    """Return the model that the arguments describe, on its device, its processor, run, config, name."""
    from helpers.config import load_config
    from helpers.model.lora import load_adapter
    from helpers.model.sam3 import best_device
    from helpers.train.run import is_bare_adapter, load_run

    folder = args.adapter
    if args.config is not None:
        folder = load_config(args.config, profile=args.profile).output.output_dir
    if folder is None:
        model, processor, name = _base(args)
        run, name = None, f"base {name}"
    elif is_bare_adapter(resolve(folder)):
        model, processor, _ = _base(args, adapter=resolve(folder))
        model, run, name = load_adapter(model, resolve(folder)), None, str(folder)
    else:
        run = load_run(folder, base=args.base)
        model, processor, name = run.model, run.processor, str(folder)
    config = run.config if run else load_config(DEFAULT_CONFIG)
    return model.to(best_device()), processor, run, config, name


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
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
            inside = [entry for entry in inside if entry.suffix.lower() in IMAGE_SUFFIXES]
            if not inside:
                raise InputError("the folder holds no image", where=path, fix="name image files")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError("no such image", where=path, fix="check the path")
    return list(dict.fromkeys(files))


def _hint_at_tiles(images, model):
    """Say which images the model sees so small that thin objects vanish."""
    from helpers.data.images import upright_size
    from helpers.model.prompted import base_of

    resolution = base_of(model).resolution
    sizes = {path: max(upright_size(path)[0]) for path in images}
    large = [path for path, side in sizes.items() if side > LARGE * resolution]
    if large:
        path = max(large, key=sizes.get)
        others = f" and {len(large) - 1} more" if len(large) > 1 else ""
        _say(
            f"hint: {path}{others} is shrunk from {sizes[path]} pixels to {resolution}, and what is "
            f"thin may vanish; --tile {resolution} looks at every pixel, --tile with the side of the "
            "training images shows objects as large as they were there"
        )


def _picture_paths(output, images):
    """Return where the picture of each image goes; refuse to write over anything of the user's.

    With several images the stem of each joins the name, with as many of its folders as keep the
    names apart.
    """
    output = Path(output).expanduser()
    if output.is_dir():
        raise InputError("is a folder", where=output, fix=f"name a file: {output / 'answer.png'}")
    paths = {}
    for image, label in zip(images, _labels(images), strict=True):
        name = output.name if label is None else f"{output.stem}_{label}{output.suffix}"
        path = output.with_name(name)
        problem = None
        if path.exists() and any(path.samefile(other) for other in images):
            problem = "would overwrite the image"
        elif path.exists() and not _is_own_picture(path):
            problem = "exists, and was not drawn by predict"
        if problem:
            raise InputError(problem, where=path, fix="choose another --output")
        paths[image] = path
    return paths


def _labels(images):
    """Return a name for each image that no other has, compared without case; None for one alone."""
    if len(images) == 1:
        return [None]
    parts = [image.absolute().with_suffix("").parts[1:] for image in images]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["_".join(part[-depth:]) for part in parts]
        if len({label.casefold() for label in labels}) == len(labels):
            return labels
    # a/b_c.png and a_b/c.png, or x.png and x.jpg: a number tells them apart
    return [f"{part[-1]}_{number}" for number, part in enumerate(parts, start=1)]


def _is_own_picture(path):
    """True if a file is empty or a picture that an earlier call drew."""
    from PIL import Image

    if path.stat().st_size == 0:
        return True
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == _SIGNATURE
    except (OSError, ValueError):
        return False


def _say(text):
    """Print a remark for people on stderr."""
    print(printable(text), file=sys.stderr)
