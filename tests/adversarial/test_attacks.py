"""A few of the seeded attacks, and those that once found a fault; SIPIT_ATTACKS=5000 runs as many."""

from __future__ import annotations

import pytest

from tests.adversarial.attacks import attack, suite_size

# Behind a token that may be another one, the right token was not named.
FOUND_A_FAULT = (2415, 3302, 4964)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [*range(suite_size(120)), *FOUND_A_FAULT])
def test_attacked_inversion_says_no_wrong_word(number: int) -> None:
    case = attack(number)
    assert case.fault is None, f"{case.fault}; {case.what}"
