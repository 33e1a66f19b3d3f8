"""Fine-tune Hugging Face LLMs as recommenders with DeepSpeed."""

from ds_recsys.errors import UserError

__all__ = [
    "AdaptivePartition",
    "Recommender",
    "StepTimeline",
    "Trainer",
    "UserError",
    "compress_gradients",
    "data_parallel",
    "init_distributed",
    "initialize",
    "load_config",
]
_HOMES = {
    "AdaptivePartition": "ds_recsys.balance.adaptive",
    "Recommender": "ds_recsys.serving",
    "StepTimeline": "ds_recsys.timeline",
    "Trainer": "ds_recsys.trainer",
    "compress_gradients": "ds_recsys.comm.engines",
    "data_parallel": "ds_recsys.comm.modes.attach",
    "init_distributed": "ds_recsys.topology",
    "initialize": "ds_recsys.engine",
    "load_config": "ds_recsys.config",
}


def __getattr__(name):
    """Import on first use: DeepSpeed and transformers take seconds, and a config error should not wait for them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ds_recsys' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
