"""What happens beside the training loop: epochs, audit of the adapter, curves, progress bar."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm
from transformers import TrainerCallback

from helpers.adapters import adapter_report
from helpers.files import write_text

CURVES_FILE = "curves.csv"


class SetEpoch(TrainerCallback):
    """Tell the training data which epoch it is, so that a resumed run draws the same prompts."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Pass the number of the epoch on."""
        self.dataset.set_epoch(int(state.epoch or 0))


class FirstStepAudit(TrainerCallback):
    """Keep the adapter report of the first step, the only moment all its gradients are seen.

    Attributes
    ----------
    report : pandas.DataFrame or None
        See `helpers.adapters.adapter_report`.
    """

    def __init__(self):
        self.report = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Measure once, after clipping and before the step."""
        if self.report is None:
            self.report = adapter_report(model)


class CurvesFile(TrainerCallback):
    """Write the log to ``curves.csv`` after every validation, one row per entry."""

    def __init__(self, folder):
        self.path = Path(folder) / CURVES_FILE

    def on_evaluate(self, args, state, control, **kwargs):
        """Write what was logged so far."""
        self.write(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Write everything."""
        self.write(state)

    def write(self, state):
        """Replace the file, if anything was logged; its columns have one order, resumed or not."""
        if state.is_world_process_zero and state.log_history:
            table = pd.DataFrame(state.log_history)
            first = [name for name in ("step", "epoch", "loss", "eval_loss") if name in table]
            names = [*first, *sorted(set(table) - set(first))]
            write_text(self.path, table[names].to_csv(index=False))


class ProgressBar(TrainerCallback):
    """A progress bar on stderr with the loss; stdout stays free."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar where the run stands."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            file=sys.stderr,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Advance by one optimiser step."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the latest training loss."""
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        self.bar.close()
