"""The methods: one file each, none importing another."""

from adamerge.methods.adamerging import AdaMerging
from adamerge.methods.base import MergeMethod

__all__ = ["AdaMerging", "MergeMethod"]
