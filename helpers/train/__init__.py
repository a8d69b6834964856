"""From a config to a run folder, and onwards."""

from helpers.train.report import checklist, epoch_means
from helpers.train.run import METRICS_FILE, load_run, read_run
from helpers.train.share import merge, plan_push
from helpers.train.training import dry_run, train
