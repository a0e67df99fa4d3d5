"""The methods: one file each, none importing another."""

from adamerge.methods.adamerging import AdaMerging
from adamerge.methods.adarank import AdaRank
from adamerge.methods.base import MergeMethod
from adamerge.methods.calibration.featcal import FeatCal
from adamerge.methods.calibration.prodistill import ProDistill
from adamerge.methods.calibration.regmean_pp import RegMeanPP
from adamerge.methods.concrete import Concrete
from adamerge.methods.pareto import Pareto
from adamerge.methods.surgery import Surgery
from adamerge.methods.wemoe import WEMoE

__all__ = [
    "AdaMerging",
    "AdaRank",
    "Concrete",
    "FeatCal",
    "MergeMethod",
    "Pareto",
    "ProDistill",
    "RegMeanPP",
    "Surgery",
    "WEMoE",
]
