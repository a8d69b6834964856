"""Helper package of the workbook: data, adapters, training, prediction and evaluation of SAM3."""
