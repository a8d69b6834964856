"""Runs as they are right after their start, and small copies of the course's data, for tests."""

import json
import shutil
from pathlib import Path

from helpers.config import load_config
from helpers.diagnose.diagnosis import pass_gate, rank
from helpers.diagnose.patient import Examination
from helpers.files import CONFIGS, WALL_CRACKS, write_json, write_text
from helpers.train.run import RUN_CONFIG

ONE_STEP = ("training.batch_size=4", "training.gradient_accumulation_steps=1")


def copy_walls(folder, sizes=(("train", 16), ("valid", 5))):
    """Copy the first images of each split of the course's data, in both layouts."""
    for split, count in sizes:
        source, target = WALL_CRACKS / split, Path(folder) / split
        for name in ("images", "annotations"):
            (target / name).mkdir(parents=True)
        content = json.loads((source / "_annotations.coco.json").read_text())
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        write_json(target / "_annotations.coco.json", content)
        for image in content["images"]:
            stem = Path(image["file_name"]).stem
            shutil.copy(source / image["file_name"], target / "images")
            shutil.copy(source / "annotations" / f"{stem}.json", target / "annotations")
    return Path(folder)


def start_run(folder, data_dir, *settings):
    """Write what a run writes before its first step, as far as its data can be read."""
    overrides = [("data.data_dir", data_dir), *ONE_STEP, *settings]
    config = load_config(CONFIGS / "crack_detection_config.yaml", "tiny", overrides)
    write_text(Path(folder) / RUN_CONFIG, config.to_yaml())
    return Path(folder)


def examine(run, gates, base, data_dir=None):
    """Pass a run through gates, with a base already loaded if given: (causes, results by name)."""
    examination = Examination(run, data_dir)
    if base is not None:
        examination.base = base
    results = [pass_gate(gate, examination) for gate in gates]
    return [cause.code for cause in rank(results)], {one.name: one for one in results}
