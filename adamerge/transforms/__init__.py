"""Transforms: `TaskVectors -> TaskVectors`, applied once, before a method sees them."""

from adamerge.transforms.interference import ace, doge, wudi
from adamerge.transforms.scale import metagpt
from adamerge.transforms.sequential import opcm
from adamerge.transforms.sparse import ties
from adamerge.transforms.spectral import cart, centre, iso_c, iso_cts, svc, truncate, tsv_m

__all__ = [
    "ace",
    "cart",
    "centre",
    "doge",
    "iso_c",
    "iso_cts",
    "metagpt",
    "opcm",
    "svc",
    "ties",
    "truncate",
    "tsv_m",
    "wudi",
]
