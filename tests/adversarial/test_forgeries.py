"""A few of the seeded forged certificates, some of each kind; SIPIT_FORGERIES=1000 runs as many."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tests.adversarial.forgeries import KINDS, forgery, judged, made, odd_values
from tests.adversarial.mutants import unnoticed_checks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(int(os.environ.get("SIPIT_FORGERIES", 20))))
def test_forged_certificate_holds_for_nothing_false(number: int) -> None:
    case = forgery(number)
    assert case.fault is None, f"{case.fault}; {case.what}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_forgery_of_every_kind_holds_for_nothing_false(kind: str) -> None:
    for number in (2, 3):  # 0 and 1 serve the test below
        case = judged(number, made(number, kind))
        assert case.fault is None, f"{case.fault}; {case.what}"
        assert kind != "nothing" or case.outcome == "holds"


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nothing", "a posterior"])
def test_odd_value_at_any_key_holds_for_nothing_false(kind: str) -> None:
    honest = made(0, kind)
    for how, record in odd_values(honest.true)[::6]:
        case = judged(0, replace(honest, record=record, seen=honest.true_seen))
        assert case.fault is None, f"{how}: {case.fault}"


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_forgeries_notice_each_reason_that_is_left_out() -> None:
    assert unnoticed_checks(2, reasons_only=True) == []
