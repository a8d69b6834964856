"""What somebody else trained: recognised, checked, and made readable for transformers and PEFT."""

from helpers.foreign.importing import import_source, write_sompote
