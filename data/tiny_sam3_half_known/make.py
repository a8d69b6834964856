"""Make bases that know the word "crack" to a degree: ``python -m data.tiny_sam3_half_known.make``.

`data/tiny_sam3` never met the word; `facebook/sam3` has. Here the full training of the embedded base
goes on for a few dozen steps on walls of which some show a crack. These cracks are not those of
`data/wall_cracks`: thinner, brown, with at most one branch. So what a base then knows is a prior
and not the answer. How well it knows the word is measured on walls drawn as the course's data is,
from another seed, and hit by mixing the weights of two neighbouring snapshots.
"""

import argparse
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import Sam3Model, Sam3Processor

from data.tiny_sam3.make import make_batch
from data.tiny_sam3.make_examples import EMPTY_SHARE, draw_prompts, to_example
from data.tiny_sam3.make_losses import QueryGroups, total_loss, training_terms
from data.tiny_sam3.make_score import HELD_OUT_SEED, crack_walls
from data.wall_cracks.make_painters import PAINTERS, paint_crack
from data.wall_cracks.make_scenes import BASE_CONCEPTS, draw_concepts, render_scene
from helpers.detect.predictor import Predictor
from helpers.environment import versions_line
from helpers.errors import InputError
from helpers.files import DATA, RUNS, TINY_BASE, staged_folder, write_json
from helpers.model.sam3 import load_base

HALF_KNOWN = DATA / "tiny_sam3_half_known"
ON_DEMAND = RUNS / "bases"
PRIOR_PAINTERS = PAINTERS | {
    "crack": partial(paint_crack, widths=(6.0, 9.0), colour=(104, 72, 44), branches=(0, 2))
}
"""The cracks of this training: thinner than in `data/wall_cracks`, brown, at most one branch."""
DETECTED_AT = 0.3
TOLERANCE = 0.05
"""A grade is hit when the share detected on held-out walls is this near."""


@dataclass(frozen=True)
class Recipe:
    """What the continued training depends on; stored beside the weights."""

    seed: int = 11
    walls: int = 200
    crack_share: float = 0.4  # of the walls
    steps: int = 80  # at most; it stops where the word is known
    every: int = 5  # steps between two snapshots
    warmup_steps: int = 20
    images: int = 5  # per step
    prompts: int = 4  # per image
    learning_rate: float = 3.0e-4
    weight_decay: float = 0.02
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9


@dataclass(frozen=True)
class Grade:
    """A base to make: the share of crack images it detects alone, and what its training asks."""

    detected_share: float | None  # None: the control, as many steps as `half` and no crack
    shut_words: tuple[str, ...] = ()  # asked as absent on every wall


GRADES = {
    "quarter": Grade(0.25),
    "half": Grade(0.5),
    "most": Grade(0.85),
    "half_shut": Grade(0.5, shut_words=("object",)),
    "control": Grade(None),
}
"""What can be made; ``half`` is the one that the repository holds."""


def make_wall(index, recipe, crack_share):
    """Render one training wall, with a crack of the prior kind on a share of them."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng((recipe.seed, index))
    names = [] if rng.random() < EMPTY_SHARE else draw_concepts(rng, BASE_CONCEPTS, (1, 4))
    if rng.random() < crack_share:
        names.append("crack")
    return to_example(render_scene(rng, names, PRIOR_PAINTERS))


def ask_words(rng, present, count, grade):
    """Choose prompts as the base's training does, "crack" among the known words."""
    known = BASE_CONCEPTS if grade.detected_share is None else (*BASE_CONCEPTS, "crack")
    prompts = draw_prompts(rng, present, count, known)
    if grade.shut_words:  # the last prompt is an absent one
        prompts[-1] = (str(rng.choice(grade.shut_words)), None)
    return prompts


def snapshots(recipe, grade, steps):
    """Continue the training of the shipped base; yield (step, averaged weights) now and then."""
    model, processor = (
        Sam3Model.from_pretrained(TINY_BASE),
        Sam3Processor.from_pretrained(TINY_BASE),
    )
    crack_share = 0.0 if grade.detected_share is None else recipe.crack_share
    walls = [make_wall(index, recipe, crack_share) for index in range(recipe.walls)]
    groups = QueryGroups(model.detr_decoder, 0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    yield 0, deepcopy(average.module.state_dict())
    for step in tqdm(range(steps), desc="going on with the base's training", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps)
        batch = make_batch(
            walls, processor.tokenizer, recipe, step, partial(ask_words, grade=grade)
        )
        terms, _ = training_terms(model, groups, batch)
        optimizer.zero_grad(set_to_none=True)
        total_loss(terms, len(model.detr_decoder.layers), 0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        average.update_parameters(model)
        if (step + 1) % recipe.every == 0:
            yield step + 1, deepcopy(average.module.state_dict())


class Knowledge:
    """Measure what a state of the base detects when it is asked for "crack" on held-out walls."""

    def __init__(self, walls=60):
        self.images = [Image.fromarray(scene.image) for scene in crack_walls(walls)]
        self.model, self.processor = load_base(TINY_BASE)

    def __call__(self, state):
        """Return the share of walls on which "crack" scores at least `DETECTED_AT`."""
        self.model.load_state_dict(state)
        predictor = Predictor(self.model, self.processor)
        scores = [predictor.raw(image, ["crack"])[0].max_score for image in self.images]
        return float(np.mean(np.array(scores) >= DETECTED_AT))


def mixture(one, other, share):
    """Return (1 - share) times one state plus share times another."""
    return {name: torch.lerp(one[name], other[name], share) for name in one}


def find_state(recipe, grade, knowledge, steps):
    """Return the state of a grade, and (step, share of the later snapshot, share detected)."""
    earlier = None
    for step, state in snapshots(recipe, grade, steps):
        detected = knowledge(state)
        tqdm.write(f"step {step}: {detected:.2f} of the held-out crack walls detected")
        if grade.detected_share is not None and detected >= grade.detected_share:
            return _bisect(earlier, (step, state), grade.detected_share, knowledge)
        earlier = step, state
    if grade.detected_share is None:
        return state, (step, 1.0, detected)
    raise InputError(
        f"{grade.detected_share:.0%} was not reached in {steps} steps", fix="allow more --steps"
    )


def _bisect(earlier, later, wanted, knowledge):
    """Mix two snapshots until the share detected is within `TOLERANCE` of the one wanted."""
    low, high = 0.0, 1.0
    share, state = 1.0, later[1]
    detected = knowledge(state)
    while abs(detected - wanted) > TOLERANCE and high - low > 0.02:
        share = (low + high) / 2
        state = mixture(earlier[1], later[1], share)
        detected = knowledge(state)
        low, high = (share, high) if detected < wanted else (low, share)
    return state, (later[0], share, detected)


def make_grade(name, folder, recipe, control_steps=40):
    """Make a base of a grade and write it, with a record of how, to a folder."""
    grade = GRADES[name]
    steps = control_steps if grade.detected_share is None else recipe.steps
    state, (step, share, detected) = find_state(recipe, grade, Knowledge(), steps)
    model, processor = (
        Sam3Model.from_pretrained(TINY_BASE),
        Sam3Processor.from_pretrained(TINY_BASE),
    )
    model.load_state_dict(state)
    record = {
        "grade": name,
        "recipe": asdict(recipe),
        "shut_words": grade.shut_words,
        "steps": step,
        "share_of_last_snapshot": share,
        "held_out_detected_share": detected,
        "held_out_seed": HELD_OUT_SEED,
        "versions": versions_line(),
    }
    with staged_folder(folder) as staged:
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        write_json(staged / "training_record.json", record)
    return record


def main():
    """Make one grade, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "grades",
        nargs="*",
        choices=[*GRADES, []],
        help="by default all; `half` goes into the repository, others to runs/bases",
    )
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    options = parser.parse_args()
    for name in options.grades or GRADES:
        folder = HALF_KNOWN if name == "half" else ON_DEMAND / name
        record = make_grade(name, folder, Recipe(steps=options.steps))
        print(
            f"{name}: {record['held_out_detected_share']:.2f} detected after {record['steps']} steps"
        )


if __name__ == "__main__":
    main()
