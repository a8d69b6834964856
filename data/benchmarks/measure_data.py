"""Time the ways of data: check, the time to the first training step, and evaluation.

It makes photographs of 12 megapixels and detections of a large test split, and runs each stage in
a process of its own, with one thread. `--checkout` names checkouts of this repository to compare,
old and new in one run on the same machine; by default this one.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 3000, 4000
OBJECTS = 10
SIDE = 640  # of a picture that is evaluated, in pixels


def write_photographs(folder, count):
    """Write ``count`` JPEGs with ten outlined objects each, a fifth of them for validation."""
    rng = np.random.default_rng(0)
    grain = rng.integers(-12, 13, (HEIGHT, WIDTH, 3), dtype=np.int16)
    for split, numbers in (("train", range(count - count // 5)), ("valid", range(count // 5))):
        (folder / split / "images").mkdir(parents=True)
        images, annotations = [], []
        for number in numbers:
            scene = rng.integers(60, 190, (12, 16, 3), dtype=np.uint8)
            picture = cv2.resize(scene, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) + grain
            name = f"images/{split}_{number:05d}.jpg"
            cv2.imwrite(str(folder / split / name), np.clip(picture, 0, 255).astype(np.uint8))
            image = {"id": number + 1, "file_name": name, "width": WIDTH, "height": HEIGHT}
            images.append(image)
            for _ in range(OBJECTS):
                annotations.append(outline(rng, image["id"], len(annotations) + 1))
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "crack"}]
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


def outline(rng, image_id, annotation_id):
    """Return the COCO entry of an ellipse with forty corners."""
    centre = rng.uniform(400, 2600, 2)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    points = centre + rng.uniform(60, 300, 2) * np.stack([np.cos(angles), np.sin(angles)], 1)
    rle = coco_mask.merge(coco_mask.frPyObjects([points.flatten().tolist()], HEIGHT, WIDTH))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "segmentation": [points.flatten().tolist()],
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": float(coco_mask.area(rle)),
        "iscrowd": 0,
    }


def make_queries(images, detections):
    """Return one question per picture with ten objects (every tenth with none) and answers near them."""
    rng = np.random.default_rng(0)
    queries = []
    for image_id in range(images):
        corners = rng.integers(0, SIDE - 80, (OBJECTS, 2))
        near = corners[rng.integers(0, OBJECTS, detections)] + rng.integers(-9, 10, (detections, 2))
        boxes = np.concatenate([corners, np.clip(near, 0, SIDE - 80)]).astype(float)
        rles = coco_mask.frPyObjects(np.c_[boxes, np.full((len(boxes), 2), 64.0)], SIDE, SIDE)
        rles = [{"size": [SIDE, SIDE], "counts": rle["counts"].decode()} for rle in rles]
        scores = rng.random(detections).tolist()
        pairs = zip(rles[OBJECTS:], scores, strict=True)
        query = {"image_id": image_id, "prompt": "crack", "height": SIDE, "width": SIDE}
        present = rles[:OBJECTS] if image_id % 10 else []
        query |= {"exhaustive": True, "gt": present, "presence_prob": 0.9}
        query |= {"max_query_prob": max(scores), "max_score": max(scores)}
        queries.append(query | {"pred": [{"rle": rle, "score": score} for rle, score in pairs]})
    return queries


def stage_check(folder, options):
    """Run ``check`` on the photographs."""
    command_line(["check", str(folder), "--json"])


def stage_first_step(folder, options):
    """Run ``train`` until its first step begins."""
    from transformers.trainer_callback import CallbackHandler

    class FirstStep(BaseException):
        pass

    def stop(*_):
        raise FirstStep

    CallbackHandler.on_step_begin = stop
    config = Path.cwd() / "configs" / "crack_detection_config.yaml"
    output = folder.parent / "run"
    arguments = ["--profile", "tiny", "--data", str(folder), "--output", str(output), "--overwrite"]
    with contextlib.suppress(FirstStep):
        command_line(["train", "--config", str(config), *arguments])
        raise SystemExit("no step was reached")


def stage_evaluate(folder, options):
    """Run the metrics of ``evaluate``; the answers are made before the clock starts."""
    name = "helpers.detect" if Path("helpers/detect").is_dir() else "helpers.evaluation"
    evaluate_queries = importlib.import_module(name).evaluate_queries
    queries = make_queries(options.images, options.detections)
    before, start = peak_gb(), time.perf_counter()
    metrics = evaluate_queries(queries, 0.3)
    seconds = time.perf_counter() - start
    numbers = {key: metrics[key] for key in ("AP", "AP50", "box_AP", "cgF1")}
    return {"seconds": seconds, "GB": peak_gb(), "GB before": before} | numbers


def command_line(arguments):
    """Run a command of the package that the path names; its status may say that it found faults."""
    status = importlib.import_module("helpers.__main__").main(arguments)
    if status == 2:
        raise SystemExit(f"unusable input: {arguments}")


def peak_gb():
    """Return the largest memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


STAGES = {"check": stage_check, "first step": stage_first_step, "evaluate": stage_evaluate}


def measure(stage, checkout, folder, options):
    """Run a stage on the code of a checkout, in a process with one thread."""
    job = json.dumps([stage, str(folder), options.images, options.detections])
    paths = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--job", job],
        cwd=checkout, env=os.environ | paths, capture_output=True, text=True, check=False,
    )  # fmt: skip
    results = re.findall(r"^RESULT (.*)$", done.stderr, flags=re.M)
    if not results:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"failed": lines[-1]}
    return json.loads(results[0])


def run_job(job):
    """Run one stage in this process and report to the process that started it."""
    stage, folder, images, detections = json.loads(job)
    options = argparse.Namespace(images=images, detections=detections)
    sys.path.remove(str(Path(__file__).parent))
    start = time.perf_counter()
    result = STAGES[stage](Path(folder), options) or {}
    result = {"seconds": time.perf_counter() - start, "GB": peak_gb()} | result
    print(f"\nRESULT {json.dumps(result)}", file=sys.stderr)


def main():
    """Make the data, run the stages for every checkout, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=2000)
    parser.add_argument("--images", type=int, default=5000, help="pictures that are evaluated")
    parser.add_argument("--detections", type=int, default=100, help="of each of these pictures")
    parser.add_argument("--checkout", nargs="+", type=Path, default=[ROOT])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return run_job(options.job)
    folder = options.work.resolve() / f"photographs_{options.photographs}"
    if not folder.is_dir() and set(options.stage) != {"evaluate"}:
        write_photographs(folder, options.photographs)
    rows = {}
    for stage in options.stage:
        for checkout in options.checkout:
            result = measure(stage, checkout.resolve(), folder, options)
            rows[stage, checkout.name] = result
            print(f"{stage}, {checkout}: {result}", file=sys.stderr, flush=True)
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(table.to_string(float_format="{:.4g}".format, na_rep=""))


if __name__ == "__main__":
    main()
