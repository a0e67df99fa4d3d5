"""Networks that share no start: their units are aligned before they are merged; and soups."""

from adamerge.align.derive import spec
from adamerge.align.matching import activation_matching, agreement, many, weight_matching
from adamerge.align.restore import repair
from adamerge.align.soups import average, greedy, uniform
from adamerge.align.symmetry import (
    Group,
    Place,
    Spec,
    apply,
    drawn,
    from_table,
    identities,
    inverse,
)
from adamerge.align.transport import ot_fusion
from adamerge.align.zipping import zipit

__all__ = [
    "Group",
    "Place",
    "Spec",
    "activation_matching",
    "agreement",
    "apply",
    "average",
    "drawn",
    "from_table",
    "greedy",
    "identities",
    "inverse",
    "many",
    "ot_fusion",
    "repair",
    "spec",
    "uniform",
    "weight_matching",
    "zipit",
]
