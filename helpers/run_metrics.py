"""The headline numbers of a finished run, and what its log says went wrong."""

from __future__ import annotations

PREFIX = "eval_"
_WIDE_AT_CLAMP = 0.5


def run_metrics(state, config, best_step):
    """Gather the numbers of a run from its log.

    Parameters
    ----------
    state : transformers.TrainerState
    config : helpers.config.Config
    best_step : int or None
        Step of the kept checkpoint; None if the last state was kept.

    Returns
    -------
    dict
        ``steps`` and ``epochs`` done; ``best_step``; ``selected_by``; ``valid``, the metrics of the
        kept state on the validation split; ``train_loss`` and ``valid_loss``, each with ``first``
        and ``last``.
    """
    judged = [entry for entry in state.log_history if f"{PREFIX}loss" in entry]
    kept = next((entry for entry in judged if entry["step"] == best_step), judged[-1])
    return {
        "steps": state.global_step,
        "epochs": round(state.epoch, 6),
        "best_step": best_step,
        "selected_by": config.evaluation.metric_for_best,
        "valid": {
            name.removeprefix(PREFIX): value
            for name, value in kept.items()
            if name.startswith(PREFIX)
        },
        "train_loss": _first_and_last(state.log_history, "loss"),
        "valid_loss": _first_and_last(state.log_history, f"{PREFIX}loss"),
    }


def trained_parameters(optimizer, model):
    """Count what the optimiser was given, and how much of it belongs to LoRA.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    model : peft.PeftModel

    Returns
    -------
    dict of str to int
        ``all`` and ``lora``, numbers of parameters; they are equal if the base was frozen.
    """
    lora = {id(tensor) for name, tensor in model.named_parameters() if ".lora_" in name}
    given = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return {
        "all": sum(tensor.numel() for tensor in given),
        "lora": sum(tensor.numel() for tensor in given if id(tensor) in lora),
    }


def run_notes(state, config, best_step, report):
    """Say what a person should know before using a run.

    Parameters
    ----------
    state : transformers.TrainerState
    config : helpers.config.Config
    best_step : int or None
        See `run_metrics`.
    report : pandas.DataFrame
        `helpers.adapters.adapter_report` after the last step.

    Returns
    -------
    list of str
        One sentence per peculiarity; empty for a run without any.
    """
    notes = []
    if best_step is None:
        metric = config.evaluation.metric_for_best
        notes.append(f"{metric} never rose above 0 on the validation split: the last state is kept")
    if config.effective_warmup_steps >= state.max_steps:
        notes.append(
            f"the warm-up of {config.effective_warmup_steps} steps is not shorter than the run of "
            f"{state.max_steps}: the learning rate never reached its peak"
        )
    for component, row in report.drop(index="total").iterrows():
        if row["modules"] and row["B_nonzero"] < 1:
            idle = round((1 - row["B_nonzero"]) * row["modules"])
            notes.append(f"{idle} of {row['modules']:.0f} modules of {component} never moved")
    clamped = _first_and_last(state.log_history, "train_share_at_clamp")["last"]
    if clamped > _WIDE_AT_CLAMP:
        notes.append(
            f"{clamped:.0%} of the logits stand at the model's clamps, where there is no gradient: "
            "start again from the base, training on cannot mend this"
        )
    return notes


def _first_and_last(log_history, name):
    """Return the first and the last logged value of a name."""
    values = [entry[name] for entry in log_history if name in entry]
    return {"first": values[0], "last": values[-1]}
