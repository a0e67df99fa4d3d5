"""The methods: one file each, none importing another."""

from adamerge.methods.adamerging import AdaMerging
from adamerge.methods.base import MergeMethod
from adamerge.methods.pareto import Pareto
from adamerge.methods.surgery import Surgery
from adamerge.methods.wemoe import WEMoE

__all__ = ["AdaMerging", "MergeMethod", "Pareto", "Surgery", "WEMoE"]
