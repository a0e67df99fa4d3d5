"""Transforms: `TaskVectors -> TaskVectors`, applied once, before a method sees them."""

from adamerge.transforms.scale import metagpt
from adamerge.transforms.sparse import ties

__all__ = ["metagpt", "ties"]
