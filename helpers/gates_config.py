"""Gates on the settings of a run: whether they were used, and whether they suit the data."""

from __future__ import annotations

import torch
from transformers import get_scheduler

from helpers.errors import InputError
from helpers.evidence import Evidence, Gate
from helpers.paths import resolve
from helpers.run_folder import read_history
from helpers.schedules import schedule_frame

MAX_DROPOUT = 0.2
FEW_IMAGES, MAX_EPOCHS = 100, 50
RATE_TOLERANCE = 1e-3  # relative to the peak; healthy: below 1e-9


def regularisation(examination):
    """Compare dropout, images and epochs with what a small dataset bears."""
    config = examination.config
    images, epochs = len(examination.split("train").records), config.effective_num_epochs
    dropout = config.lora.dropout
    text = f"dropout {dropout:g}, {images} images, {epochs} epochs"
    evidence = []
    if dropout > MAX_DROPOUT:
        reason = f"lora.dropout is {dropout:g}: so much of the input of LoRA is left out"
        evidence.append(Evidence("extreme_regularisation", 0.9, reason))
    if images < FEW_IMAGES and epochs > MAX_EPOCHS:
        reason = f"{images} images were seen {epochs} times each"
        evidence.append(Evidence("extreme_regularisation", 0.8, reason))
    return text, evidence


def settings_in_log(examination):
    """Compare the logged steps and learning rates with what config and data come to."""
    config = examination.config
    if resolve(config.data.data_dir) != examination.data_dir:
        raise InputError("asked about another dataset than was trained on", where="data_dir")
    history = read_history(examination.folder)
    logged = {
        entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry
    }
    if not logged:
        raise InputError("no learning rate was logged", where=examination.folder)
    plan = schedule_frame({"run": config}, len(examination.train_dataset)).loc["run"]
    steps = int(plan["steps"])
    expected = _expected_rates(config, steps)
    peak = config.effective_learning_rate
    off = [
        step
        for step, rate in logged.items()
        if step > steps or abs(rate - expected[step - 1]) > RATE_TOLERANCE * peak
    ]
    last = max(entry["step"] for entry in history)
    text = (
        f"{last} steps logged, {steps} expected; highest learning rate logged "
        f"{max(logged.values()):g}, expected {max(expected):g}; {len(off)} of {len(logged)} "
        "logged learning rates are not those of the config"
    )
    if off or (examination.is_finished and last != steps):
        return text, [Evidence("dead_config_keys", 0.95, text)]
    return text, []


def _expected_rates(config, steps):
    """Return the learning rate that is logged after each step of a schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.effective_learning_rate)
    scheduler = get_scheduler(
        config.training.lr_scheduler,
        optimizer,
        num_warmup_steps=config.effective_warmup_steps,
        num_training_steps=steps,
    )
    return [config.effective_learning_rate * scheduler.lr_lambdas[0](step) for step in range(steps)]


CONFIG_GATES = (
    Gate(
        "regularisation",
        f"dropout up to {MAX_DROPOUT:g}; fewer than {FEW_IMAGES} images at most {MAX_EPOCHS} times",
        regularisation,
    ),
    Gate(
        "settings in the log", "steps and learning rates are those of the config", settings_in_log
    ),
)
