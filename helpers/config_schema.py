"""The sections and keys of a configuration: their types, their ranges, what they mean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator

Name = Annotated[str, Field(min_length=1, pattern=r"\S")]
Noun = Annotated[StrictStr, Field(pattern=r"\S")]
Names = Annotated[tuple[Noun, ...], Field(strict=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]


def _refuse_duplicates(words, key):
    """Raise ValueError if two words differ only in case or surrounding space."""
    seen = [word.strip().casefold() for word in words]
    doubles = sorted({word for word in seen if seen.count(word) > 1})
    if doubles:
        raise ValueError(f"{key} lists {', '.join(doubles)} more than once")


class Section(BaseModel):
    """Base of all sections: no unknown key, no conversion of types, no change after loading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model: its name or folder, its revision and its square input size in pixels."""

    name: Name
    revision: Name | None
    resolution: Annotated[int, Field(ge=28, le=4032)]


class LoraSection(Section):
    """Where the low-rank updates sit and how wide they are; scale of the update: alpha / rank."""

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Positive
    dropout: Decay
    target_modules: Annotated[Names, Field(min_length=1)]
    apply_to_vision_encoder: bool
    apply_to_text_encoder: bool
    apply_to_geometry_encoder: bool
    apply_to_detr_encoder: bool
    apply_to_detr_decoder: bool
    apply_to_mask_decoder: bool

    @model_validator(mode="after")
    def _adapts_something(self):
        _refuse_duplicates(self.target_modules, "target_modules")
        if not any(
            getattr(self, key) for key in type(self).model_fields if key.startswith("apply_")
        ):
            raise ValueError("every apply_to_* is false, so nothing would be trained")
        return self


class DataSection(Section):
    """The images, the prompts asked about them, and the absent prompts added to each image."""

    data_dir: Name
    train_split: Name
    val_split: Name
    prompt: Name | None
    prompts_by_category: dict[Noun, Noun] = {}
    num_negatives: Annotated[int, Field(ge=0, le=100)]
    negative_prompts: Names

    @model_validator(mode="after")
    def _negatives_are_negative(self):
        _refuse_duplicates(self.negative_prompts, "negative_prompts")
        if self.prompt is not None and self.prompts_by_category:
            raise ValueError(
                "prompt replaces every category name, so prompts_by_category must be {}"
            )
        if self.prompt is not None:
            _refuse_duplicates((self.prompt, *self.negative_prompts), "prompt and negative_prompts")
        return self


class TrainingSection(Section):
    """Optimiser, schedule and precision, with the names `transformers.TrainingArguments` knows."""

    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    adam_beta1: Decay
    adam_beta2: Decay
    adam_epsilon: Positive
    max_grad_norm: Positive
    num_epochs: Count
    warmup_steps: CountOrNone
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    batch_size: Count
    gradient_accumulation_steps: Count
    mixed_precision: Literal["bf16", "fp16", "no"]
    gradient_checkpointing: bool
    feature_cache: Name | None = None
    num_workers: CountOrNone
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    logging_steps: Count
    save_total_limit: Count


class LossSection(Section):
    """Which loss is minimised: SAM3's own, or the one the failing script used."""

    variant: Literal["native", "early"]


class EvaluationSection(Section):
    """Thresholds in probability, the prompts asked although absent, and the deciding metric."""

    score_threshold: Probability
    mask_threshold: Probability
    absent_prompts: Names
    metric_for_best: Literal["cgF1", "pmF1", "AP", "AP50", "AP75"]

    @model_validator(mode="after")
    def _metric_can_be_computed(self):
        _refuse_duplicates(self.absent_prompts, "absent_prompts")
        if self.metric_for_best == "cgF1" and not self.absent_prompts:
            raise ValueError("metric_for_best cgF1 needs at least one entry in absent_prompts")
        return self


class OutputSection(Section):
    """Where a run is written."""

    output_dir: Name


class GuardSection(Section):
    """Which faults stop a training run as soon as they show; see `helpers.train.guards`."""

    no_objects: bool
    box_and_mask_terms: bool
    vanishing_loss: bool
    adapter_at_zero: bool
    not_finite: bool
    at_clamp: bool
    only_positive_prompts: bool
    dominant_term: bool


class ScaleSection(Section):
    """Multipliers of the schedule, set by a profile so that one config serves both bases."""

    learning_rate: Positive
    num_epochs: Positive
    warmup_steps: Annotated[float, Field(ge=0)]
