"""Recommendations from an exported folder."""

from ds_recsys.serving.recommender import Recommendation, Recommender

__all__ = ["Recommendation", "Recommender"]
