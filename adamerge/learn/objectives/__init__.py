"""Losses over tasks, label-free but for one; as pure functions they are in `losses`.

An objective is called with the features and task ids of a whole step and returns one value per
task; the loss is their (weighted) sum.
"""

from adamerge.learn.classifiers import TaskHeads
from adamerge.learn.losses import (
    entropy,
    expert_kl,
    expert_labels,
    infomax,
    marginal_entropy,
    sample_entropy,
)
from adamerge.learn.objectives.base import AnyHeads, Objective
from adamerge.learn.objectives.labelled import Labels
from adamerge.learn.objectives.mixed import Mixed
from adamerge.learn.objectives.taught import (
    ExpertFeatures,
    ExpertKL,
    ExpertL1,
    ExpertLabels,
    Taught,
    Teacher,
)
from adamerge.learn.objectives.unlabeled import Entropy, InfoMax

__all__ = [
    "AnyHeads",
    "Entropy",
    "ExpertFeatures",
    "ExpertKL",
    "ExpertL1",
    "ExpertLabels",
    "InfoMax",
    "Labels",
    "Mixed",
    "Objective",
    "TaskHeads",
    "Taught",
    "Teacher",
    "entropy",
    "expert_kl",
    "expert_labels",
    "infomax",
    "marginal_entropy",
    "sample_entropy",
]
