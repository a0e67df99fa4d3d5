"""What a run is made of: settings, inputs, and the module that learns."""

from __future__ import annotations

from dataclasses import dataclass

from adamerge.config import build, inputs
from adamerge.config.fingerprint import fingerprint
from adamerge.config.inputs import Inputs
from adamerge.config.settings import Config
from adamerge.learn.adaptation import Adaptation
from adamerge.report import folds


@dataclass
class Job(Inputs):
    """One run's objects: settings, inputs, and the module that learns from the merged tasks."""

    module: Adaptation

    def fingerprint(self) -> dict[str, str]:
        """What the run's result depends on."""
        return fingerprint(self.settings, self.suite, self.data)


def load_job(settings: Config) -> Job:
    """Loads everything that a checked configuration names."""
    known = inputs.load(settings)
    method = build.build_method(settings, known.suite, known.data)
    folds.check(settings["fold"], method, settings["method"]["name"])
    module = build.build_adaptation(settings, known.suite, method)
    return Job(settings, known.suite, known.data, known.unseen, module)
