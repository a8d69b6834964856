"""Ask a SAM3, with or without adapter, for prompts on images."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from helpers.data.dataset import PromptCollator
from helpers.data.images import open_upright
from helpers.data.records import plain_prompt
from helpers.detect.detections import PROBABILITIES, detect, raw_predictions
from helpers.errors import InputError, check_probability
from helpers.model.prompted import outputs_by_rows

GENERIC_PROMPT = "object"  # asked when no prompt is given: SAM3 has no promptless mode
PROMPTLESS_THRESHOLD = 1e-4  # score threshold then, low enough to see anything at all
_TAKEN_OVER = ("image", "prompt", "height", "width", *PROBABILITIES)


@dataclass(frozen=True)
class Prediction:
    """What was detected for one prompt on one image."""

    image: str
    prompt: str
    height: int  # of the upright image, in pixels
    width: int
    presence_prob: float  # in [0, 1], as the next two: over all queries, whatever the threshold
    max_query_prob: float
    max_score: float
    # Best first: dicts of score, box_xyxy (pixels, inside the image) and mask_rle (image size).
    detections: list

    def to_dict(self):
        """Return what ``python -m helpers predict --json`` prints for this prediction."""
        content = {name: getattr(self, name) for name in ("image", "prompt", *PROBABILITIES)}
        return content | {"detections": self.detections}


class Predictor:
    """Ask a model for prompts on images, on the device where it is.

    Parameters
    ----------
    model : helpers.model.sam3.PromptedSam3 or peft.PeftModel
        Put into eval mode.
    processor : transformers.Sam3Processor
        Of the same base, from `helpers.model.load_base` or a run.
    adapter_words : sequence of str, optional
        Routing: only these are asked of the adapter, all others of its base.
    """

    def __init__(self, model, processor, adapter_words=None):
        self.model, self.processor = model.eval(), processor
        self.adapter_words = adapter_words and {plain_prompt(word) for word in adapter_words}
        self.tokenize = PromptCollator(processor).tokenize

    @torch.no_grad()
    def raw(self, image, prompts, name=None):
        """Run the model on one image; the vision encoder runs once for all P prompts.

        Returns P `RawPrediction`, whose ``image`` is `name`, by default the path. A file is turned upright.
        """
        prompts = check_prompts(prompts)
        if isinstance(image, str | os.PathLike):
            name = str(image) if name is None else name
            image = open_upright(image)
        if self.adapter_words is None:
            return self._answers(image, prompts, name)
        own = [prompt for prompt in prompts if plain_prompt(prompt) in self.adapter_words]
        others = [prompt for prompt in prompts if prompt not in own]
        answers = dict(zip(own, self._answers(image, own, name), strict=True))
        with self.model.disable_adapter():
            answers |= zip(others, self._answers(image, others, name), strict=True)
        return [answers[prompt] for prompt in prompts]

    def _answers(self, image, prompts, name):
        if not prompts:
            return []
        width, height = image.size
        pixel_values = self.processor.image_processor(images=image, return_tensors="pt")
        batch = {"pixel_values": pixel_values["pixel_values"], **self.tokenize(prompts)}
        batch["image_index"] = torch.zeros(len(prompts), dtype=torch.long)
        device = next(self.model.parameters()).device
        described = [(name or "image", prompt, height, width) for prompt in prompts]
        return [
            raw
            for rows, outputs in outputs_by_rows(self.model, batch, device)
            for raw in raw_predictions(outputs, described[rows])
        ]

    def predict(self, images, prompts=None, threshold=None, mask_threshold=0.5):
        """Detect prompts on images: list of `Prediction`, all prompts of the first image first.

        Parameters
        ----------
        images : os.PathLike, PIL.Image.Image, or a sequence of them
        prompts : str or sequence of str, optional
            None is the promptless mode: the word "object" is asked, which means to the model
            whatever it learned about that word, and no class comes back.
        threshold, mask_threshold : float
            In [0, 1]; of scores by default 0.3, in the promptless mode 0.0001.
        """
        if threshold is None:
            threshold = PROMPTLESS_THRESHOLD if prompts is None else 0.3
        prompts = GENERIC_PROMPT if prompts is None else prompts
        check_probability(threshold, "threshold")
        check_probability(mask_threshold, "mask_threshold")
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        return [
            Prediction(
                **{name: getattr(raw, name) for name in _TAKEN_OVER},
                detections=detect(raw, threshold, mask_threshold),
            )
            for image in images
            for raw in self.raw(image, prompts)
        ]


def check_prompts(prompts):
    """Return prompts as a list, refusing an empty list and what is no text or blank."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, Sequence) or not prompts:
        raise InputError(f"the prompts are {prompts!r}", fix="give at least one noun phrase")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"the prompt {prompt!r} is empty", fix="give a noun such as 'crack'")
    return list(prompts)


def raw_outputs(model, processor, records, prompts):
    """Ask a model prompts on many images.

    Parameters
    ----------
    model, processor
        See `Predictor`.
    records : sequence of helpers.data.records.ImageRecord
    prompts : sequence of str, or dict
        The same for all, or ``image_id`` to those of the image.

    Yields
    ------
    helpers.detect.detections.RawPrediction
        One per image and prompt, of 66 MB at full size; its ``image`` is the ``image_id``.
    """
    predictor = Predictor(model, processor)
    for record in records:
        questions = prompts[record.image_id] if isinstance(prompts, dict) else prompts
        if questions:
            yield from predictor.raw(record.path, list(questions), name=record.image_id)


def untrained_prompts(prompts, trained):
    """Map each prompt that an adapter never saw to the closest of those it saw, or None."""
    known = {plain_prompt(prompt): prompt for prompt in trained}
    closest = {}
    for prompt in prompts:
        if plain_prompt(prompt) not in known:
            similar = difflib.get_close_matches(plain_prompt(prompt), known, n=1)
            closest[prompt] = known[similar[0]] if similar else None
    return closest
