"""A few of the seeded forged certificates; SIPIT_FORGERIES=1000 runs as many."""

from __future__ import annotations

import os

import pytest

from tests.adversarial.forgeries import forgery
from tests.adversarial.mutants import unnoticed_checks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(int(os.environ.get("SIPIT_FORGERIES", 60))))
def test_forged_certificate_holds_for_nothing_false(number: int) -> None:
    case = forgery(number)
    assert case.fault is None, f"{case.fault}; {case.what}"


@pytest.mark.filterwarnings("ignore")
def test_forgeries_notice_each_reason_that_is_left_out() -> None:
    assert unnoticed_checks(2, reasons_only=True) == []
