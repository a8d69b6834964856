"""Every option of the command line, defined once; the commands name those they take."""

from helpers.files import in_current_folder


# A profile that is a file in the current folder, or a base that is a folder in it, becomes its path.
def _profile(text):
    path = in_current_folder(text)
    return str(path) if path.is_file() else text


def _base(text):
    path = in_current_folder(text)
    return str(path) if path.is_dir() else text


def _path(metavar, text):
    return {"type": in_current_folder, "metavar": metavar, "help": text}


def _flag(text):
    return {"action": "store_true", "help": text}


OPTIONS = {
    # what to work on
    "--adapter": _path("RUN", "run folder"),
    "--base": {"type": _base, "metavar": "NAME", "help": "base model: a folder or a hub name"},
    "--config": _path("FILE", "a configuration, such as those in configs/"),
    "--data": _path("DIR", "dataset, by default that of the run or config"),
    "--output": _path("DIR", "folder to write"),
    "--profile": {"type": _profile, "help": "tiny, sam3 or a file"},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "SECTION.KEY=VALUE",
        "help": "change a setting",
    },
    "--split": {"default": "test", "help": "split, by default test"},
    # what to ask
    "--image": _path("IMG", "a picture in which nothing is found"),
    "--words": {"metavar": "WORD,...", "help": "by default the categories of the dataset"},
    "--routing": _flag("ask the adapter for the words it was trained for only, else its base"),
    "--retention": {
        "metavar": "WORD,...",
        "help": "what the base knows: compare with its own answers, no labels needed",
    },
    "--prompt": {"help": "ask for this word in place of the category names"},
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
    "--format": {
        "choices": ("coco", "yolo", "voc", "masks", "labelme"),
        "help": "by default recognised; coco means Roboflow's export and per-image JSON, too",
    },
    "--category": {"metavar": "NOUN", "help": "what binary mask pictures show"},
    "--objects": {
        "choices": ("components", "whole", "values"),
        "default": "components",
        "help": "one object of a mask picture: a component (default), all of a class, each value",
    },
    "--polygons": {
        "choices": ("auto", "outline", "pixels"),
        "default": "auto",
        "help": "what corners (YOLO, LabelMe) are; auto (default): pixels if all are whole numbers",
    },
    "--seed": {"type": int, "default": 42, "help": "of the division, default 42"},
    # what somebody else trained
    "--alpha": {"type": float, "help": "of the LoRA, where no file tells it"},
    "--orientation": {
        "choices": ("native", "peft"),
        "help": "A as (in, r) or as (r, in), where the shapes leave it open",
    },
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
