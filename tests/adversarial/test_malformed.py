"""A few of the seeded malformed inputs; SIPIT_MALFORMED=1000 runs as many."""

from __future__ import annotations

import os

import pytest

from tests.adversarial.malformed import malformed
from tests.adversarial.scenes import Scene, built_scene

_N_CASES = int(os.environ.get("SIPIT_MALFORMED", 80))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return built_scene(tmp_path_factory.mktemp("scene"))


@pytest.mark.skipif(os.name != "posix", reason="needs pipes, links and alarms")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(_N_CASES))
def test_malformed_input_is_answered_in_one_sentence(number: int, scene: Scene) -> None:
    case = malformed(number, scene)
    assert case.fault is None, f"{case.fault}; {case.what}"
