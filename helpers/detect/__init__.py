"""Ask, detect, judge."""

from helpers.detect.detections import detect, output_table, reaches
from helpers.detect.knowledge import clear_answers, retention, word_knowledge
from helpers.detect.metrics import cgf1, coco_ap, evaluate_queries, threshold_sweep, union_iou
from helpers.detect.mistakes import content_matrix, mistake_table, reliability_table
from helpers.detect.predictor import (
    GENERIC_PROMPT,
    PROMPTLESS_THRESHOLD,
    Predictor,
    raw_outputs,
    untrained_prompts,
)
from helpers.detect.queries import Query, predict_split, predict_split_at
from helpers.detect.thresholds import choose_thresholds
from helpers.detect.tiles import predict_tiled
