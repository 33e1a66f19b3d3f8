"""Compressed all-reduce on the data-parallel axis.

compressors (pure) -> error_feedback -> aggregation (collectives, no DeepSpeed) -> reducer -> backend and engines (DeepSpeed).
"""
