"""One JSON per run: DeepSpeed's own keys and a "recsys" block, read, checked and resolved before any process group.

jsonfile        the file: JSON with comments, errors with line and column
schema          the block: every key with its type, default and description
block           dict -> schema, mistakes in one line with the nearest valid name
deepspeed_keys  DeepSpeed's keys: valid, removed, misspelt
checks          what must hold between keys, the grid and the model
resolve         "auto" -> values
reference       the block's Markdown table and JSON schema (`python -m ds_recsys.config` prints the table)
"""

from ds_recsys.config.checks import check_bounds, check_grid, check_model, check_pipeline_engine, zero_stage
from ds_recsys.config.load import Config, load_config
from ds_recsys.config.reference import recsys_schema, reference_markdown
from ds_recsys.config.schema import Recsys

__all__ = [
    "Config",
    "Recsys",
    "check_bounds",
    "check_grid",
    "check_model",
    "check_pipeline_engine",
    "load_config",
    "recsys_schema",
    "reference_markdown",
    "zero_stage",
]
