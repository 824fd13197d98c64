"""A few of the seeded forged certificates; SIPIT_FORGERIES=1000 runs as many."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from sipit.inversion.evidence import certificate
from sipit.inversion.judging import noise_model, replay, residuals
from tests.adversarial.forgeries import KINDS, Check, Forgery, forgery, judged, made, odd_values
from tests.adversarial.mutants import without_each_check

_OF_FILES = ("is not JSON",)  # checks of what is read from a file: tests.adversarial.malformed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(int(os.environ.get("SIPIT_FORGERIES", 60))))
def test_forged_certificate_holds_for_nothing_false(number: int) -> None:
    case = forgery(number)
    assert case.fault is None, f"{case.fault}; {case.what}"


@pytest.mark.parametrize("module", [certificate, replay, residuals, noise_model], ids=lambda module: module.__name__)
def test_forgeries_notice_each_check_that_is_left_out(
    module: ModuleType, forgeries: list[Forgery], monkeypatch: pytest.MonkeyPatch
) -> None:
    unnoticed = []
    for check, without in without_each_check(module):
        if not _is_noticed(without, forgeries, monkeypatch) and not any(text in check for text in _OF_FILES):
            unnoticed.append(check)
    assert unnoticed == []
