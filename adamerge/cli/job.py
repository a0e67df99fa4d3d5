"""What a run is made of: settings, inputs, and the module that learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from adamerge.config import build, inputs
from adamerge.config.fingerprint import fingerprint
from adamerge.config.inputs import Inputs
from adamerge.config.settings import Config
from adamerge.encoders.heads import Heads
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.classifiers import LearnedHeads
from adamerge.report import folds
from adamerge.report.evaluation import Scorer


@dataclass
class Job(Inputs):
    """One run's objects: settings, inputs, and the module that learns from the merged tasks."""

    module: Adaptation

    def heads(self) -> Heads:
        """The heads of the merge: the suite's, or what was learned from them."""
        heads = self.module.heads
        return heads.frozen() if isinstance(heads, LearnedHeads) else self.suite.heads

    def own_scorer(self, device: torch.device) -> Scorer:
        """Measures the merge, by its own heads."""
        return replace(self.scorer(device), heads=self.heads())

    def fingerprint(self) -> dict[str, str]:
        """What the run's result depends on."""
        return fingerprint(self.settings, self.suite, self.data)


def load_job(settings: Config) -> Job:
    """Loads everything that a checked configuration names."""
    known = inputs.load(settings)
    method = build.build_method(settings, known.suite)
    folds.check(settings["fold"], method, settings["method"]["name"])
    module = build.build_adaptation(settings, known.suite, method)
    return Job(settings, known.suite, known.data, known.unseen, module)
