"""The commands of ``python -m helpers``.

Every command takes the parsed arguments and returns ``(exit status, JSON document)``; the template
of its name in ``helpers/answers/`` makes a text of the document.
Libraries are imported inside, so that ``--help`` answers at once.
"""

import argparse
import difflib
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from helpers.errors import InputError, printable
from helpers.files import CONFIGS, in_current_folder, resolve, write_json, write_text

DEFAULT_CONFIG = CONFIGS / "crack_detection_config.yaml"
_EPILOG = """exit status:
  0    done, nothing found wrong
  1    findings with errors, or a failure of the thing that was checked
  2    unusable input: a missing or damaged file, an impossible value, an adapter of another base
  3    diagnose: no cause found, but too little could be examined to call the run healthy
  130  interrupted with Ctrl-C

With --json, stdout is one JSON document and nothing else; remarks go to stderr.
"""
EXPLORED_MASKS = (0.3, 0.5, 0.7)  # mask thresholds of the page
LARGE = 2  # sides of the model's input from which an image should be cut into tiles
_SIGNATURE = "sam3-lora-workbook predict"  # in a picture: a later call may replace it
_PAGE_MARK = b'name="generator" content="sam3-lora-workbook"'  # a later call may replace it, too


# A profile that is a file in the current folder, or a base that is a folder in it, becomes its path.
def _path_if(is_there, text):
    path = in_current_folder(text)
    return str(path) if is_there(path) else text


def _page(text):
    path = in_current_folder(text)
    if path.exists() and not (path.is_file() and _PAGE_MARK in path.read_bytes()[:500]):
        raise argparse.ArgumentTypeError(f"{path} exists, and is no page of this command line")
    return path


def _threshold_or_auto(text):
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _words(text):
    return [word.strip() for word in text.split(",")]


def _text(text, **settings):
    return {"help": text, **settings}


def _path(metavar, text):
    return _text(text, type=in_current_folder, metavar=metavar)


def _flag(text):
    return _text(text, action="store_true")


OPTIONS = {
    # what to work on
    "--adapter": _path("RUN", "run folder"),
    "--base": _text("a folder or a hub name", type=partial(_path_if, Path.is_dir), metavar="NAME"),
    "--config": _path("FILE", "a configuration, such as those in configs/"),
    "--data": _path("DIR", "dataset, by default that of the run or config"),
    "--html": _text("page to write", type=_page, metavar="FILE"),
    "--log": _path("FILE", "training log: CSV, JSON lines or trainer_state.json, with a loss"),
    "--output": _path("DIR", "folder to write"),
    "--profile": _text("tiny, sam3 or a file", type=partial(_path_if, Path.is_file)),
    "--set": _text("change a setting", action="append", default=[], metavar="SECTION.KEY=VALUE"),
    "--split": {"default": "test", "help": "split, by default test"},
    # what to ask
    "--image": _path("IMG", "a picture in which nothing is found"),
    "--words": _text("by default the categories of the dataset", type=_words, metavar="WORD,..."),
    "--routing": _flag("ask the adapter for the words it was trained for only, else its base"),
    "--retention": _text("what the base knows by itself", type=_words, metavar="WORD,..."),
    "--prompt": {"help": "ask for this word in place of the category names"},
    "--goal": _text(
        "of the threshold: the highest F1 (default), or at least --least of one of the others",
        choices=("f1", "precision", "recall"),
        default="f1",
    ),
    "--least": {"type": float, "default": 0.9, "help": "precision or recall, default 0.9"},
    "--threshold": {"type": float, "help": "in [0, 1]; by default as the config says, 0.3"},
    "--mask-threshold": {"type": float, "help": "in [0, 1]; by default as the config says, 0.5"},
    "--tile": {"type": int, "metavar": "PIXELS", "help": "cut larger images into tiles"},
    "--overlap": {"type": float, "default": 0.2, "help": "of tiles, default 0.2"},
    # how to train
    "--resume": _flag("continue an interrupted run"),
    "--overwrite": _flag("replace a run in the folder"),
    "--retry-smaller": _flag("when memory runs out, checkpoint, then use smaller batches"),
    "--dry-run": _flag("one step on the fullest batch, no files; status 1 if memory runs out"),
    # how to convert
    "--format": _text(
        "by default recognised; coco means Roboflow's export and per-image JSON, too",
        choices=("coco", "yolo", "voc", "masks", "labelme"),
    ),
    "--category": _text("what binary mask pictures show", metavar="NOUN"),
    "--objects": _text(
        "one object of a mask picture: a component (default), all of a class, each value",
        choices=("components", "whole", "values"),
        default="components",
    ),
    "--polygons": _text(
        "what corners (YOLO, LabelMe) are; auto (default): pixels if all are whole numbers",
        choices=("auto", "outline", "pixels"),
        default="auto",
    ),
    "--seed": {"type": int, "default": 42, "help": "of the division, default 42"},
    # what somebody else trained
    "--alpha": {"type": float, "help": "of the LoRA, where no file tells it"},
    "--orientation": _text("A as (in, r) or (r, in)", choices=("native", "peft")),
    # what to give away
    "--dtype": {"help": "float32 or bfloat16, by default that of the base's files"},
    "--repo": {"metavar": "OWNER/NAME", "help": "name on the Hub"},
    "--yes": _flag("upload; by default only look"),
}


def add_options(command, *names, required=(), **helps):
    """Add options to a parser; `helps` replaces the help of one, ``data="a folder"``."""
    for name in (*required, *names):
        settings = OPTIONS[name] | ({"required": True} if name in required else {})
        settings["help"] = helps.get(name.strip("-"), settings["help"])
        command.add_argument(name, **settings)


def build_parser():
    """Return the argparse.ArgumentParser of all commands."""
    form = {"epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="python -m helpers",
        description="SAM3 with LoRA: check data, train, detect, evaluate.",
        **form,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(function, *parents):
        command = subparsers.add_parser(
            function.__name__.rstrip("_"),  # a keyword of Python cannot be a name
            parents=parents,
            help=function.__doc__.splitlines()[0],
            description=function.__doc__,
            **form,
        )
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(function=function)
        return command

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
    text = "in [0, 1], by default as the config says, 0.3; auto: as calibrate chose it"
    command.add_argument("--threshold", type=_threshold_or_auto, help=text)
    add_options(command, "--mask-threshold", "--tile", "--overlap", "--routing")

    add_options(add(knows, model), "--words", "--data", "--split", "--threshold")
    own = ("--data", "--split", "--prompt", "--threshold", "--routing", "--retention", "--html")
    page = "page to write, with a threshold slider over all pictures"
    add_options(add(evaluate, model), *own, html=page)
    own = {"html": "page to write, with pictures, curves, mistakes, diagnosis"}
    command = add(report)
    add_options(command, "--html", "--data", "--retention", required=["--adapter"], **own)
    text = "second run, judged beside the first in place of its base"
    command.add_argument("--compare", type=in_current_folder, metavar="RUN", help=text)
    command = add(calibrate)
    own = {"split": "never the test split; by default the validation split of the run"}
    add_options(command, "--data", "--split", "--goal", "--least", required=["--adapter"], **own)
    command.set_defaults(split=None)
    command = add(diagnose)
    text = "run folder, PEFT folder, *_lora_weights.pt, checkpoint.pt, model folder, log or dataset"
    command.add_argument("source", nargs="?", type=in_current_folder, metavar="SOURCE", help=text)
    own = {"adapter": "the same as SOURCE", "config": "YAML of the training, whatever wrote it"}
    own |= {"words": "what the training asked for", "data": "its dataset"}
    names = ("--adapter", "--config", "--data", "--log", "--base", "--words", "--image", "--prompt")
    add_options(command, *names, "--alpha", "--orientation", "--html", **own)
    add(causes).add_argument("code", nargs="?", metavar="CODE", help="a cause, by default all")
    add_options(add(overfit), "--profile", "--data", "--set", required=["--config"])
    add_options(add(merge), "--dtype", "--base", required=["--adapter", "--output"])
    merged = "run folder, or folder of a merged model"
    add_options(add(push), "--yes", required=["--adapter", "--repo"], adapter=merged)
    return parser


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
    return (0 if report.ok else 1), report.to_json()


def convert(args):
    """Write a dataset of any common format in the layout that the other commands read."""
    from helpers.convert import conversion

    names = "format", "category", "objects", "polygons", "split", "seed", "tile", "overlap"
    settings = {name: getattr(args, name) for name in names}
    return 0, conversion.convert(args.source, args.output, **settings)


def import_(args):
    """Make what somebody else trained readable; status 1 if something is wrong with it."""
    from helpers.foreign import import_source

    own = {name: getattr(args, name) for name in ("config", "base", "alpha", "orientation")}
    report = import_source(args.source, args.output, **own)
    return report.status, report.to_json()


def train(args):
    """Train and report; unusable input is refused before anything is written."""
    from helpers.config import load_config
    from helpers.train import report, run, training

    overrides = [*args.set, *([] if args.data is None else [("data.data_dir", args.data)])]
    config = load_config(args.config, profile=args.profile, overrides=overrides)
    if args.dry_run:
        result = training.dry_run(config)
        return (0 if result["fits"] else 1), result
    settings = {"output_dir": args.output, "resume": args.resume, "overwrite": args.overwrite}
    try:
        if args.retry_smaller:
            result = training.train_within_memory(config, on_retry=_say, **settings)
        else:
            result = training.train(config, **settings)
    except KeyboardInterrupt:
        if (resolve(args.output or config.output.output_dir) / run.RUN_CONFIG).is_file():
            _say("continue with --resume")
        raise
    return 0, report.report(result)


def predict(args):
    """Detect prompts on images, and draw them if asked to."""
    from helpers import detect
    from helpers.show.pictures import save_prediction_figure

    images = _image_files(args.image)
    paths = {} if args.output is None else _picture_paths(args.output, images)
    model, processor, run, config, _ = load_model(args)
    settings = config.evaluation
    prompts, threshold, mask_threshold = args.prompt, args.threshold, args.mask_threshold
    if threshold is None:
        threshold = settings.score_threshold if prompts else detect.PROMPTLESS_THRESHOLD
    if threshold == "auto" and not prompts:
        raise InputError("a threshold is chosen word by word", fix="name a word with --prompt")
    if not prompts:
        prompts = [detect.GENERIC_PROMPT]
        _say(
            f"no prompt given: asking for '{prompts[0]}' at threshold {threshold:g}. The model "
            "outlines what that word means to it; no class comes back, and scores near 0 mean "
            "that it found nothing"
        )
    own = {}
    if threshold == "auto":
        own = _calibrated(run, prompts, settings.score_threshold)
        threshold = min(own.values())
    if run:
        asked = ("prompts", "negatives", "replayed")
        known = [word for name in asked for word in run.prompts.get(name, ())]
        for prompt, close in detect.untrained_prompts(prompts, known).items():
            hint = f"; the closest trained prompt is '{close}'" if close else ""
            _say(f"warning: '{prompt}' was never asked in training{hint}")
    predictor = detect.Predictor(model, processor, _routes(args, run))
    mask_threshold = settings.mask_threshold if mask_threshold is None else mask_threshold
    thresholds = {"threshold": threshold, "mask_threshold": mask_threshold}
    if args.tile is None:
        _hint_at_tiles(images, model)
        predictions = predictor.predict(images, prompts, **thresholds)
    else:
        tiles, predictions = {"tile": args.tile, "overlap": args.overlap}, []
        for path in images:
            predictions += detect.predict_tiled(predictor, path, prompts, **tiles, **thresholds)
    document = [prediction.to_dict() for prediction in predictions]
    for entry in document:
        least = own.get(entry["prompt"], threshold)
        entry["detections"] = [one for one in entry["detections"] if one["score"] >= least]
    for image, path in paths.items():
        entries = [entry for entry in document if entry["image"] == str(image)]
        save_prediction_figure(path, image, entries, software=_SIGNATURE)
    return 0, document


def evaluate(args):
    """Judge a model on a split; status 1 if the split has nothing to find."""
    from helpers import detect
    from helpers.convert.conversion import finding_notes
    from helpers.data.dataset import load_dataset
    from helpers.detect.predictor import check_prompts

    model, processor, run, config, name = load_model(args)
    settings = config.evaluation
    data_dir = args.data or config.data.data_dir
    split = load_dataset(config, data_dir).split(args.split)
    for note in finding_notes([split]):
        _say(f"warning: {note}")
    words = split.categories if args.prompt is None else check_prompts([args.prompt])
    if run:
        for prompt in detect.untrained_prompts(words, run.prompts["prompts"]):
            _say(f"warning: '{prompt}' was never trained as a present prompt")
    asked = {"absent_prompts": settings.absent_prompts, "prompt": args.prompt}
    levels = sorted({settings.mask_threshold, *(EXPLORED_MASKS if args.html else ())})
    asked |= {"adapter_words": _routes(args, run)}
    answers = detect.predict_split_at(model, processor, split, levels, **asked)
    queries = answers[settings.mask_threshold]
    threshold = settings.score_threshold if args.threshold is None else args.threshold
    metrics = detect.evaluate_queries(queries, threshold)
    if args.html is not None:
        from helpers.detect.thresholds import read_thresholds
        from helpers.show import explorer_panel

        own = {"validation": queries} if split.name == config.data.val_split else {}
        own["calibrated"] = run and read_thresholds(run.folder, is_needed=False)
        panel = explorer_panel({name: answers}, split, score_threshold=threshold, **own)
        write_text(args.html, panel.to_html(f"Thresholds on {split.name}"))
    document = {"model": name, "data": str(data_dir), "split": split.name}
    document |= {"num_images": len(split.records), **metrics}
    if args.retention is not None:
        kept = detect.retention(model, processor, split, args.retention)
        if not kept["objects"]:
            message = f"the base detects none of {', '.join(kept['words'])}"
            raise InputError(message, where=f"{data_dir}, {split.name}", fix="name what it knows")
        document["retention"] = kept
    return (0 if metrics["num_present"] else 1), document


def knows(args):
    """Say how well a model knows words on images that show them; status 1 if one is locked."""
    from helpers.data.dataset import load_dataset
    from helpers.detect.knowledge import word_knowledge

    model, processor, _, config, name = load_model(args)
    split = load_dataset(config, args.data).split(args.split)
    own = {} if args.threshold is None else {"threshold": args.threshold}
    table = word_knowledge(model, processor, split, args.words, **own)
    document = {"model": name, "data": str(split.root), "split": split.name}
    document |= {"words": table.to_dict(orient="index")}
    return int((table["knowledge"] == "locked").any()), document


def _calibrated(run, prompts, default):
    """Return the threshold of each prompt that `calibrate` kept in a run, and say what is used."""
    from helpers.detect.thresholds import THRESHOLDS_FILE, read_thresholds

    if run is None:
        raise InputError("--threshold auto needs a run", fix="name a run folder with --adapter")
    chosen = {word: row["threshold"] for word, row in read_thresholds(run.folder).items()}
    for prompt in prompts:
        if prompt in chosen:
            _say(f"'{prompt}': threshold {chosen[prompt]:.3g}, from {THRESHOLDS_FILE} of the run")
        else:
            _say(f"'{prompt}': threshold {default:g} of the config, as it was never calibrated")
    return {prompt: chosen.get(prompt, default) for prompt in prompts}


def calibrate(args):
    """Choose a score threshold for each word on the validation split, and keep it in the run."""
    from helpers import detect
    from helpers.data.dataset import load_dataset
    from helpers.detect.thresholds import THRESHOLDS_FILE
    from helpers.train.run import load_run

    run = load_run(args.adapter)
    data, settings = run.config.data, run.config.evaluation
    name, data_dir = args.split or data.val_split, args.data or data.data_dir
    if name in ("test", data.train_split):
        message = f"a threshold chosen on {name!r} flatters the run that is judged there"
        raise InputError(message, where="--split", fix=f"choose on {data.val_split!r}")
    split = load_dataset(run.config, data_dir).split(name)
    asked = {"absent_prompts": settings.absent_prompts, "mask_threshold": settings.mask_threshold}
    queries = detect.predict_split(run.model, run.processor, split, **asked)
    table = detect.choose_thresholds(queries, args.goal, args.least)
    chosen = {"split": name, "goal": args.goal, "least": None if args.goal == "f1" else args.least}
    chosen |= {"words": table.to_dict(orient="index")}
    write_json(run.folder / THRESHOLDS_FILE, chosen)  # without paths, since `push` sends it
    return 0, {"run": str(run.folder), "data": str(data_dir), **chosen}


def report(args):
    """Summarise a finished run, also as a page to send to a colleague."""
    from helpers.train import report, run

    content = report.report(run.read_run(args.adapter))
    if args.html is not None:
        write_text(args.html, _report_page(args))
    elif args.compare or args.data or args.retention:
        message = "--compare, --data and --retention are for the page"
        raise InputError(message, fix="name a page with --html")
    return 0, content


def _report_page(args):
    """Ask a run, and its base or another run, about their test split, and write all of it down."""
    from helpers import detect
    from helpers.data.dataset import load_dataset
    from helpers.diagnose.diagnosis import diagnose as examine
    from helpers.show import report_page
    from helpers.train.run import load_run

    run = load_run(args.adapter)
    data_dir, settings = args.data or run.config.data.data_dir, run.config.evaluation
    dataset = load_dataset(run.config, data_dir)
    test, valid = dataset.split("test"), dataset.split(run.config.data.val_split)
    levels = sorted({settings.mask_threshold, *EXPLORED_MASKS})
    asked = {"absent_prompts": settings.absent_prompts}

    def answers(one, split):
        return detect.predict_split_at(one.model, one.processor, split, levels, **asked)

    by_model = {str(args.adapter): answers(run, test)}
    other = load_run(args.compare) if args.compare else run
    with nullcontext() if args.compare else run.model.disable_adapter():
        by_model[str(args.compare or "its base")] = answers(other, test)
    validation = answers(run, valid)[settings.mask_threshold]
    sources = {
        "named with --retention": args.retention,
        "replayed in its training": run.prompts["replayed"],
        "denied in its training where they are absent": run.prompts["negatives"],
    }
    why = next((one for one, words in sources.items() if words), None)
    kept = why and detect.retention(run.model, run.processor, test, sources[why]) | {"why": why}
    options = [f"--{one} {vars(args)[one]}" for one in ("compare", "data") if vars(args)[one]]
    options += [f"--retention {','.join(args.retention)}"] if args.retention else []
    command = " ".join([f"report --adapter {args.adapter} --html {args.html}", *options])
    parts = {"validation": validation, "commands": [f"python -m helpers {command}"]}
    diagnosis = examine(args.adapter, data_dir=data_dir, progress=True).parts()
    return report_page(run, test, by_model, retention=kept, diagnosis=diagnosis, **parts)


def diagnose(args):
    """Say why a run detects nothing; status 1 for causes, 3 if too little could be examined."""
    from helpers.diagnose.diagnosis import diagnose as examine

    if (args.source is None) == (args.adapter is None):
        raise InputError("name one SOURCE", fix="name a run, an adapter, a log or a dataset")
    names = ("config", "log", "base", "image", "prompt", "alpha", "orientation")
    given = {name: getattr(args, name) for name in names} | {"data_dir": args.data}
    given["words"] = args.words or []
    diagnosis = examine(args.source or args.adapter, **given, progress=True)
    if args.html is not None:
        write_text(args.html, diagnosis.to_html())
    status = {"healthy": 0, "causes": 1, "undecided": 3}[diagnosis.verdict]
    return status, diagnosis.to_json()


def causes(args):
    """Print the catalogue of causes, or one with its test and fix."""
    from helpers.causes import TABLE

    if args.code is None:
        return 0, {code: cause._asdict() for code, cause in TABLE.items()}
    if args.code not in TABLE:
        close = difflib.get_close_matches(args.code, TABLE, n=1, cutoff=0.3)
        fix = "list them with 'python -m helpers causes'"
        fix = f"did you mean '{close[0]}'?" if close else fix
        raise InputError(f"there is no cause {args.code!r}", fix=fix)
    return 0, {"code": args.code, **TABLE[args.code]._asdict()}


def overfit(args):
    """Train on one batch alone; status 1 if its loss does not come near zero."""
    from helpers.config import load_config
    from helpers.diagnose.live_gates import overfit_one_batch, patient_of_config

    overrides = [*args.set, *([] if args.data is None else [("data.data_dir", args.data)])]
    config = load_config(args.config, profile=args.profile, overrides=overrides)
    rate = config.effective_learning_rate
    result = overfit_one_batch(patient_of_config(config), learning_rate=rate, progress=True)
    return (0 if result["learned"] else 1), result


def merge(args):
    """Write a full model; status 1, and nothing written, if it detects anything else."""
    from helpers.train import share

    try:
        document, status = share.merge(args.adapter, args.output, args.dtype, args.base), 0
    except share.MergeDiffers as verdict:
        document, status = verdict.document, 1
    return status, document | {"output": str(args.output)}


def push(args):
    """Show what an upload to the Hugging Face Hub would send; with --yes, send it."""
    from helpers.train import share

    plan = share.plan_push(args.adapter, args.repo)
    url = share.push(plan) if args.yes else None
    return 0, vars(plan) | {"url": url}


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
    from helpers.convert.source import note_of
    from helpers.data.images import IMAGE_SUFFIXES

    files = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
            images = [entry for entry in inside if entry.suffix.lower() in IMAGE_SUFFIXES]
            if not images:
                raise InputError("the folder holds no image", where=path, fix="name image files")
            files += images
            others = [entry.name for entry in inside if entry not in images]
            for note in note_of(others, f"other files and folders in {path} are not looked at"):
                _say(f"note: {note}")
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
    """Return where the picture of each image goes; refuse to write over anything of the user's."""
    output = Path(output).expanduser()
    if output.is_dir():
        raise InputError("is a folder", where=output, fix=f"name a file: {output / 'answer.png'}")
    paths = {}
    for image, label in zip(images, _labels(images), strict=True):
        name = output.name if label is None else f"{output.stem}_{label}{output.suffix}"
        path, fix = output.with_name(name), "choose another --output"
        if path.exists() and any(path.samefile(other) for other in images):
            raise InputError("would overwrite the image", where=path, fix=fix)
        if path.is_symlink() or (path.exists() and not _is_own_picture(path)):
            raise InputError("exists, and was not drawn by predict", where=path, fix=fix)
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
