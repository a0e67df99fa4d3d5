"""Transforms: `TaskVectors -> TaskVectors`, applied once, before a method sees them.

The sum of the transformed vectors, times λ, is the merge. Each docstring says at which λ: 1 where
the sum is a whole merge, about 0.3 where the vectors were only cleaned.
"""

from adamerge.transforms.competition import pcb
from adamerge.transforms.gradients import fisher, fisher_batch_sum
from adamerge.transforms.inputs import esm, regmean
from adamerge.transforms.interference import ace, doge, wudi
from adamerge.transforms.masks import consensus, elect, emr, magmax, tall
from adamerge.transforms.projections import cart, centre, opcm, truncate, twin
from adamerge.transforms.scale import lines, metagpt, model_stock
from adamerge.transforms.sparse import breadcrumbs, dare, della, magnitude, ties
from adamerge.transforms.spectral import iso_c, iso_cts, svc, tsv_m
from adamerge.transforms.spherical import karcher, multislerp, slerp

__all__ = [
    "ace",
    "breadcrumbs",
    "cart",
    "centre",
    "consensus",
    "dare",
    "della",
    "doge",
    "elect",
    "emr",
    "esm",
    "fisher",
    "fisher_batch_sum",
    "iso_c",
    "iso_cts",
    "karcher",
    "lines",
    "magmax",
    "magnitude",
    "metagpt",
    "model_stock",
    "multislerp",
    "opcm",
    "pcb",
    "regmean",
    "slerp",
    "svc",
    "tall",
    "ties",
    "truncate",
    "tsv_m",
    "twin",
    "wudi",
]
