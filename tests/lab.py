"""A small laboratory for tests: a part of the wall data, and one gate asked of one run."""

import json
import shutil

from helpers.diagnose.diagnosis import pass_gate
from helpers.diagnose.patient import Examination
from helpers.files import WALL_CRACKS


def write_small_walls(folder, sizes=(("train", 8), ("valid", 6))):
    """Write the first pictures of the drawn walls, in the layout with one file per split."""
    for split, count in sizes:
        root = folder / split
        (root / "images").mkdir(parents=True)
        content = json.loads((WALL_CRACKS / split / "_annotations.coco.json").read_text())
        content["images"] = content["images"][:count]
        shown = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in shown]
        for image in content["images"]:
            shutil.copy(WALL_CRACKS / split / image["file_name"], root / "images")
        (root / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def ask(gates, name, run):
    """Ask the gate of some name about a run."""
    (gate,) = [gate for gate in gates if gate.name == name]
    return pass_gate(gate, run if isinstance(run, Examination) else Examination(run))


def causes(result):
    """Return the causes a gate's evidence speaks for."""
    return {one.cause for one in result.evidence}
