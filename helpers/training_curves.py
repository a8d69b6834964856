"""The log of a training run as a table and as curves of loss terms and validation metrics."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from helpers.charts import COLOURS, DASHES, MARKERS, dress
from helpers.errors import InputError

_NOT_A_LOSS = ("epoch", "step", "learning_rate", "grad_norm", "total_flos", "train_", "eval_")
_NOT_A_METRIC = ("eval_loss", "eval_runtime", "per_second")


def history_frame(log_history):
    """Turn the log of a trainer into a table.

    Parameters
    ----------
    log_history : sequence of dict
        ``trainer.state.log_history``: each entry has ``step`` and some numbers.

    Returns
    -------
    pandas.DataFrame
        Index ``step``, one column per logged name, NaN where a step logged nothing under it;
        entries of one step are joined.

    Raises
    ------
    InputError
        When an entry has no step.
    """
    if any("step" not in entry for entry in log_history):
        raise InputError("an entry of the log has no step", fix="pass trainer.state.log_history")
    if not log_history:
        return pd.DataFrame(index=pd.Index([], name="step"))
    return pd.DataFrame(log_history).groupby("step").last()


def loss_terms(history):
    """Return the columns of a `history_frame` that are terms of the training loss."""
    return [name for name in history if not name.startswith(_NOT_A_LOSS)]


def validation_metrics(history):
    """Return the columns of a `history_frame` that are metrics of the validation split."""
    names = [name for name in history if name.startswith("eval_")]
    return [name for name in names if not any(part in name for part in _NOT_A_METRIC)]


def draw_lines(ax, table, columns, *, xlabel, ylabel, log=False):
    """Draw columns of a table against its index, each with a dash, a marker and a colour.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    table : pandas.DataFrame
    columns : sequence of str
        May be empty: then the axes say that there is nothing yet.
    xlabel, ylabel : str
    log : bool
        Logarithmic y axis; values that are not positive are left out.
    """
    for number, name in enumerate(columns):
        values = table[name].dropna().astype(float)
        values = values[values > 0] if log else values
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.4}
        ax.plot(values.index, values, markevery=max(len(values) // 8, 1), label=name, **style)
    dress(ax, xlabel, ylabel)
    if not columns:
        ax.text(0.5, 0.5, "nothing logged yet", ha="center", transform=ax.transAxes)
        return
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, handlelength=3.5
    )


def curves_figure(log_history, terms=None, metrics=None):
    """Draw the terms of the training loss and the validation metrics against the step.

    Parameters
    ----------
    log_history : sequence of dict
        See `history_frame`.
    terms, metrics : sequence of str, optional
        Names to draw; by default all that `loss_terms` and `validation_metrics` find.

    Returns
    -------
    matplotlib.figure.Figure
    """
    history = history_frame(log_history)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    terms = loss_terms(history) if terms is None else terms
    metrics = validation_metrics(history) if metrics is None else metrics
    draw_lines(left, history, terms, xlabel="optimiser step", ylabel="training loss", log=True)
    draw_lines(right, history, metrics, xlabel="optimiser step", ylabel="validation metric")
    return figure
