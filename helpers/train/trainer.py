"""The training loop: `transformers.Trainer` with SAM3's loss and a validation that detects."""

import math
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from helpers.detect.metrics import evaluate_queries
from helpers.detect.queries import queries_from_outputs
from helpers.errors import explain
from helpers.files import write_text
from helpers.model import prompted
from helpers.model.lora import load_adapter_weights, read_adapter_weights, save_adapter
from helpers.model.losses import loss_divisors, sam3_losses, target_counts

CURVES_FILE = "curves.csv"
CHECKPOINTS = "checkpoints"
SELECTION = "selection"  # the trainer's name of the metric that chooses the checkpoint
# Settings that the library calls as the config does, and takes as they are.
_SAME_NAMES = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"}
_SAME_NAMES |= {"gradient_accumulation_steps", "seed", "logging_steps"}
_AT_CLAMP = 0.999


def training_arguments(config, folder, **changes):
    """Translate a config, with its multipliers and `changes`, for a run in a folder."""
    training = config.training
    message = f"'{training.mixed_precision}' cannot be used here"
    fix = "set training.mixed_precision=no"
    with explain(ValueError, message, where="training.mixed_precision", fix=fix):
        if training.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("it needs a GPU")
        settings = training.model_dump(include=_SAME_NAMES) | {
            "output_dir": str(folder / CHECKPOINTS),
            "per_device_train_batch_size": training.batch_size,
            "num_train_epochs": config.effective_num_epochs,
            "learning_rate": config.effective_learning_rate,
            "warmup_steps": config.effective_warmup_steps,
            "lr_scheduler_type": training.lr_scheduler,
            "use_cpu": not torch.accelerator.is_available(),
            "bf16": training.mixed_precision == "bf16",
            "fp16": training.mixed_precision == "fp16",
            "dataloader_num_workers": training.num_workers,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "data_seed": training.seed,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": training.save_total_limit + 1,
            "metric_for_best_model": SELECTION,
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
        }
        arguments = TrainingArguments(**settings | changes)
    # Several would mean torch's DataParallel, which cannot split targets.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class Sam3Trainer(Trainer):
    """A `transformers.Trainer` for prompted images, with all terms of the loss in its log."""

    def __init__(self, config, *, guards=None, **options):
        super().__init__(**options)
        self.remove_callback(PrinterCallback)
        self.config, self.guards = config, guards
        if guards is not None:
            self.add_callback(guards)
        self._sums, self._num_batches = defaultdict(float), 0
        self._divisors = None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collect the batches of an optimiser step, and count what all of them hold together."""
        # Means over each batch would weigh an object or a prompt by how many others are in it.
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        targets = [target for batch in samples for target in batch["targets"]]
        counts = torch.tensor(target_counts(targets), device=self.args.device)
        counts = self.accelerator.reduce(counts, "sum")
        num_parts = len(samples) * self.accelerator.num_processes
        self._divisors = loss_divisors(counts.tolist(), max(num_parts, 1))
        return samples, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the weighted loss of one batch and remember its terms for the log."""
        outputs = model(**prompted.model_inputs(inputs, self.args.device))
        if self.guards is None or self.guards.are_finite(outputs, inputs["targets"]):
            terms = self._terms(outputs, inputs["targets"], self._divisors)
        else:  # cannot be matched; the guard stops all processes before the step
            terms = {"total": outputs["pred_logits"].sum() * math.nan}
        total = terms.pop("total")
        statistics = output_statistics(outputs)
        if self.guards is not None:
            self.guards.observe(inputs, total, terms, statistics["train_share_at_clamp"])
        for name, value in (terms | statistics).items():
            self._sums[name] += value.detach()
        self._num_batches += 1
        return (total, outputs) if return_outputs else total

    def _terms(self, outputs, targets, divisors):
        variant = self.config.loss.variant
        return sam3_losses(prompted.loss_inputs(outputs), targets, variant, divisors=divisors)

    def log(self, logs, start_time=None):
        """Add to a training loss the means of its terms since the last log, over all devices."""
        if "loss" in logs and self._num_batches:
            sums = torch.stack([torch.as_tensor(value) for value in self._sums.values()])
            means = self.accelerator.reduce(sums / self._num_batches, "mean").tolist()
            logs |= dict(zip(self._sums, means, strict=True))
            self._sums, self._num_batches = defaultdict(float), 0
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Judge the state on the validation split, all of it in every process; return the log."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # leaves the global generator, and so a resumed run, alone
        )
        settings = self.config.evaluation
        model = self.model.eval()
        queries, loss_sum = [], 0.0
        for batch in loader:
            targets, asked = batch["targets"], batch["queries"]
            divisors = loss_divisors(target_counts(targets))
            device, autocast = self.args.device, self.accelerator.autocast
            for rows, outputs in prompted.outputs_by_rows(model, batch, device, autocast):
                loss = self._terms(outputs, targets[rows], divisors)["total"]
                loss_sum += loss.item() * (int(batch["image_index"][-1]) + 1)
                about = asked[rows], dataset, settings.mask_threshold
                queries += queries_from_outputs(outputs, *about)
        metrics = evaluate_queries(queries, settings.score_threshold)
        numbers = ({"loss": loss_sum / len(dataset)} | metrics).items()
        numbers = [(name, value) for name, value in numbers if isinstance(value, int | float)]
        logs = {f"{metric_key_prefix}_{name}": float(value) for name, value in numbers}
        self.log(logs)
        self.write_curves()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        # 0 is what a detector that finds nothing gets, while the loss would prefer it where no
        # objects were read. Without a value nothing is chosen, and the last state is kept.
        chosen_by = metrics[settings.metric_for_best]
        return logs | {f"{metric_key_prefix}_{SELECTION}": chosen_by or math.nan}

    def write_curves(self):
        """Replace ``curves.csv`` by the log so far; its columns have one order, resumed or not."""
        if self.state.is_world_process_zero and self.state.log_history:
            table = pd.DataFrame(self.state.log_history)
            first = [name for name in ("step", "epoch", "loss", "eval_loss") if name in table]
            names = [*first, *sorted(set(table) - set(first))]
            path = Path(self.args.output_dir).parent / CURVES_FILE
            write_text(path, table[names].to_csv(index=False))

    def floating_point_ops(self, inputs):
        """Return 0: the library counts all parameters anew for every batch, and nobody reads it."""
        return 0

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            base = self.config.model
            save_adapter(self.model, output_dir or self.args.output_dir, base.name, base.revision)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = read_adapter_weights(resume_from_checkpoint)
        load_adapter_weights(model or self.model, weights, resume_from_checkpoint)


@torch.no_grad()
def output_statistics(outputs):
    """Return scalar tensors over all queries of a batch that describe a step beside its loss."""
    logits, presence = outputs["pred_logits"].float(), outputs["presence_logits"].float()
    clamped_logits = logits.abs() >= _AT_CLAMP * prompted.SCORE_LOGIT_CLAMP
    clamped_presence = presence.abs() >= _AT_CLAMP * prompted.PRESENCE_LOGIT_CLAMP
    clamped = torch.cat([clamped_logits.flatten(), clamped_presence.flatten()])
    return {
        "train_query_logit_mean": logits.mean(),
        "train_query_logit_max": logits.max(),
        # what a loss without objects pushes down
        "train_softplus_mean": torch.nn.functional.softplus(logits).mean(),
        "train_presence_prob": presence.sigmoid().mean(),
        # where the gradient is zero: with most logits there a state cannot be trained on
        "train_share_at_clamp": clamped.float().mean(),
    }
