"""A few of the seeded attacks; SIPIT_ATTACKS=5000 runs as many."""

from __future__ import annotations

import pytest

from tests.adversarial.attacks import attack, suite_size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(suite_size(120)))
def test_attacked_inversion_says_no_wrong_word(number: int) -> None:
    case = attack(number)
    assert case.fault is None, f"{case.fault}; {case.what}"
