"""From annotation files to what the model is asked."""

from helpers.data.coco import find_splits, read_split
from helpers.data.dataset import Dataset, PromptCollator, PromptDataset, count_objects, load_dataset
from helpers.data.images import open_upright
from helpers.data.masks import mask_to_rle, rle_box_xyxy
from helpers.data.records import Category, absent_candidates, rename_categories
