"""Which objective the label-free signals speak for, before training and after."""

from __future__ import annotations

from adamerge.report.advice import after, before
from adamerge.report.signals import ByTask


def found(agreement: tuple[float, float], marginal: tuple[float, float] = (2.0, 2.0)) -> ByTask:
    names = ("agreement", agreement), ("marginal_entropy", marginal)
    return {name: dict(zip("ab", values, strict=True)) for name, values in names}


FINE, LOW = found((0.8, 0.5)), found((0.3, 0.9))
EXPERTS = found((1, 1), (2.1, 1.9))


def course(last: ByTask, start: ByTask = FINE) -> dict[str, ByTask]:
    return {"before": start, "last": last, "experts": EXPERTS}


def test_nothing_is_said_where_all_is_well() -> None:
    assert before("entropy", False, FINE) == []
    assert after("entropy", False, course(FINE)) == after("entropy", False, course(LOW, LOW)) == []
    noise = found((0.76, 0.48))
    assert after("entropy", False, course(noise)) == []


def test_low_agreement_is_named_before() -> None:
    (said,) = before("entropy", False, LOW)
    assert "30 % (a) of the images" in said and "entropy confirms its mistakes" in said
    assert said.endswith("objective=expert_kl is the better choice")
    (said,) = before("infomax", False, LOW)
    assert "confirms" not in said and "objective=expert_kl" in said
    assert before("expert_kl", True, LOW) == []


def test_a_fall_is_said_with_its_figures() -> None:
    (said,) = after("entropy", False, course(found((0.6, 0.5))))
    assert "(a 80 → 60 %)" in said and said.endswith("objective=infomax or objective=expert_kl")
    assert after("infomax", False, course(found((0.6, 0.5))))[0].endswith("try objective=expert_kl")
    (said,) = after("expert_kl", True, course(found((0.6, 0.4))))
    assert "b 50 → 40 %" in said and said.endswith("try a lower optim.lr, or fewer steps")


def test_a_collapse_is_named() -> None:
    narrow = found((0.8, 0.5), (2.0, 0.4))
    (said,) = after("entropy", False, course(narrow))
    assert "collapsed" in said and "b 0.40 of 1.90 nats" in said and "a 2" not in said
    assert after("expert_kl", True, course(narrow)) == []
