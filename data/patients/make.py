"""Make the patient of lesson 08: ``python -m data.patients.make``.

A training with one mistake, left as Sompote/SAM3_LoRA leaves its own: weights, YAML and log. Who reads
on knows the answer before the lesson asks.
"""

import shutil
from pathlib import Path

from helpers.config import read_yaml, yaml_text
from helpers.files import DATA, ROOT, WALL_CRACKS
from helpers.lab.careless import Careless

FOLDER = Path(__file__).parent / "no_detections"
MISTAKE = "names of another model"
SETTINGS = {"learning_rate": 3e-4, "epochs": 3}


def make(folder=FOLDER):
    """Train with the mistake and write ``best_lora_weights.pt``, ``config.yaml``, ``val_stats.json``."""
    shutil.rmtree(folder, ignore_errors=True)
    Careless([MISTAKE], **SETTINGS).train().save(folder, layout="sompote")
    path = folder / "config.yaml"
    content = read_yaml(path)
    del content["model"]  # Sompote's YAML names no base
    content["training"]["data_dir"] = str(WALL_CRACKS.relative_to(ROOT))
    path.write_text(yaml_text(content), encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(make().relative_to(DATA.parent))
