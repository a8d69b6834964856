"""Make patients for the diagnosis: ``python -m data.patients.make``.

Without arguments the patient of lesson 08: a training with one mistake, left as Sompote/SAM3_LoRA
leaves its own, weights, YAML and log. Who reads on knows the answer before the lesson asks. With
``--mistake`` another one, in a folder of your own.
"""

import argparse
import json
import shutil
from pathlib import Path

from helpers.config import read_yaml, yaml_text
from helpers.files import DATA, ROOT, TINY_BASE, WALL_CRACKS, resolve
from helpers.lab.careless import MISTAKES, Careless

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


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.patients.make", description=__doc__)
    parser.add_argument("--mistake", action="append", default=[], choices=MISTAKES)
    parser.add_argument(
        "--output", type=Path, help="folder to write, with --mistake or for a healthy run"
    )
    parser.add_argument("--layout", choices=("peft", "sompote"), default="peft")
    parser.add_argument("--data", type=resolve, default=WALL_CRACKS)
    parser.add_argument("--base", type=resolve, default=TINY_BASE)
    options = parser.parse_args()
    if options.output is None:
        if options.mistake:
            parser.error("name the folder to write with --output")
        print(make().relative_to(DATA.parent))
        return
    script = Careless(options.mistake, data_dir=options.data, base=options.base).train()
    for entry in script.log:
        print(json.dumps({name: round(value, 4) for name, value in entry.items()}))
    script.save(options.output, options.layout)


if __name__ == "__main__":
    main()
