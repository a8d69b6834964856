"""What `test_several_processes` runs in every process: gradients of an epoch, then half a run."""

import sys
from pathlib import Path

import torch
from tiny_random import tiny_run_config
from transformers import TrainerCallback

from helpers.train.training import train

PLAIN = ("lora.dropout=0.0", "training.gradient_accumulation_steps=1")


class Gradients(TrainerCallback):
    """Give B of LoRA random values, without which A has no gradient, and keep every gradient."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.2 * values)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        self.steps.append(named)


class Interrupt(TrainerCallback):
    """Stands in for Ctrl-C after an epoch and a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def gradients_of_an_epoch(base, data_dir, folder, batch_size, accumulation=1):
    """Train an epoch whose steps move nothing; returns the gradients of each step and the log."""
    config = tiny_run_config(
        base, data_dir, *PLAIN,
        f"training.batch_size={batch_size}",
        f"training.gradient_accumulation_steps={accumulation}",
        "training.max_grad_norm=1.0e+9",
        "scale.learning_rate=1.0e-9",
        "scale.num_epochs=0.02",
    )  # fmt: skip
    callback = Gradients()
    result = train(config, output_dir=folder, callbacks=[callback])
    return callback.steps, result.history


def run_config(base, data_dir, batch_size):
    """Return the config of a run of two epochs with three steps each."""
    return tiny_run_config(base, data_dir, *PLAIN, f"training.batch_size={batch_size}")


def interrupted_run(base, data_dir, folder, batch_size):
    """Train until `Interrupt` ends it."""
    config = run_config(base, data_dir, batch_size)
    try:
        train(config, output_dir=folder, callbacks=[Interrupt()])
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    base, data_dir, folder = sys.argv[1:]
    steps, history = gradients_of_an_epoch(base, data_dir, Path(folder) / "gradients", 1)
    if torch.distributed.get_rank() == 0:
        torch.save({"steps": steps, "history": history}, Path(folder) / "gradients.pt")
    interrupted_run(base, data_dir, Path(folder) / "run", 1)
    torch.distributed.destroy_process_group()
