"""Tensor parallelism inside the decoder layers: which rank holds which heads and columns, and what it says to others."""

from ds_recsys.models.tensor.plan import BlockPlan, plan_block

__all__ = ["BlockPlan", "plan_block"]
