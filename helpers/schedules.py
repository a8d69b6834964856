"""What a config's epochs, batches and warm-up come to on a dataset, and curves of several runs."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from helpers.checklist import epoch_means
from helpers.training_curves import draw_lines


def schedule_frame(configs, num_images):
    """Compute the optimiser steps of some configs, and how far their warm-up gets.

    Parameters
    ----------
    configs : dict of str to helpers.config.Config
        By name; the profile's multipliers count.
    num_images : int
        Training images with a query.

    Returns
    -------
    pandas.DataFrame
        One row per config: ``images per step``, ``epochs``, ``steps`` (of the optimiser, in all),
        ``warm-up steps``, ``peak`` (learning rate the config asks for) and ``reached`` (share of
        it that the linear warm-up attains before the run ends, 1 if it ends in time).
    """
    rows = {}
    for name, config in configs.items():
        training = config.training
        batches = math.ceil(num_images / training.batch_size)
        per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
        steps, warmup = per_epoch * config.effective_num_epochs, config.effective_warmup_steps
        rows[name] = {
            "images per step": training.batch_size * training.gradient_accumulation_steps,
            "epochs": config.effective_num_epochs,
            "steps": steps,
            "warm-up steps": warmup,
            "peak": config.effective_learning_rate,
            "reached": min(steps / warmup, 1.0) if warmup else 1.0,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("config")


def runs_figure(histories, names):
    """Draw some logged numbers of several runs by epoch, on common axes.

    Parameters
    ----------
    histories : dict of str to list of dict
        Name of a run to its ``trainer.state.log_history``.
    names : dict of str to str
        Logged name, for example ``"loss"`` or ``"eval_AP50"``, to the label of its axis; one panel
        each. Numbers logged more than once in an epoch are averaged over it. Losses get a
        logarithmic axis.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = Figure(figsize=(1 + 3.4 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        means = {run: pd.Series(epoch_means(log, name)) for run, log in histories.items()}
        log = name.endswith("loss")
        draw_lines(ax, pd.DataFrame(means), list(means), xlabel="epoch", ylabel=label, log=log)
    return figure
