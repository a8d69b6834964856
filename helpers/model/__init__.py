"""SAM3, its LoRA and its loss."""

from helpers.model.audit import adapter_report
from helpers.model.lora import add_lora
from helpers.model.losses import hungarian_match, sam3_losses
from helpers.model.sam3 import load_base
