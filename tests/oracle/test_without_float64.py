"""A model on a device without float64: what is asked of it ends as it does on the CPU.

In a process of its own: torch knows the device from then on.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import sipit
from sipit import LanguageModel
from sipit.inversion import certificate_of, check_certificate, invert_many
from sipit.inversion.fitting.fit import _first_position
from sipit.inversion.inverses.network import InverseNetwork
from sipit.inversion.inverses.store import Fit, fit_folder, save_fit
from sipit.inversion.inverses.token_keys import token_keys
from sipit.inversion.places.identify import identify
from sipit.inversion.places.verify import verify
from sipit.observations import Cut

IDS = [5, 60, 7, 9]
_LAYER = 1
_FITTED = 2  # a layer of its own, so that no other way uses its fit
_CAN_STAND_IN = hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend")


def _round_trip(lm: LanguageModel, **cut: Any) -> str:
    seen = lm.capture(input_ids=IDS, **cut)
    found = sipit.invert(lm, seen, use_fit=False)
    is_exact = list(found.input_ids) == IDS and check_certificate(certificate_of(found), seen, lm).holds
    return f"{found.verdict}, {is_exact}"


def _fitted(lm: LanguageModel) -> str:
    """Invert by a fit of random weights: that it is read and asked is all that matters."""
    width = lm.d_model
    fit = Fit(
        network=InverseNetwork(width, width, lm.vocab_size, 16),
        first_mean=torch.zeros(width, dtype=torch.float64),
        first_weight=torch.eye(width, dtype=torch.float64),
        sink_cosine=0.9,
        temperature=1.0,
        likelihood_weight=0.5,
        report={"fit_block_tokens": 1, "seconds": 1.0, "held_out": {}},
    )
    fit_folder(lm).mkdir(parents=True)
    save_fit(lm, Cut(_FITTED), fit)
    return sipit.invert(lm, lm.capture(input_ids=IDS, layer=_FITTED)).verdict


def _ways(lm: LanguageModel) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Return what is asked of a model, by name, and what it must answer."""
    seen = lm.capture(input_ids=IDS, layer=_LAYER)
    states = seen.states
    wide = replace(seen, states=states.cpu().double())
    noisy = states.cpu() + 0.05 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    some = replace(seen, states=states[[0, 2]], positions=(0, 2))
    exact = "recovered, True"
    return {
        "layer 0": (lambda: _round_trip(lm, layer=0), exact),
        "bfloat16": (lambda: _round_trip(lm, layer=_LAYER, dtype="bfloat16"), exact),
        "log-probabilities": (lambda: _round_trip(lm, site="log_probs"), exact),
        "keys": (lambda: _round_trip(lm, layer=_LAYER, site="keys"), exact),
        "stored in float64": (
            lambda: check_certificate(certificate_of(sipit.invert(lm, wide)), wide, lm).holds,
            True,
        ),
        "many": (lambda: [found.verdict for found in invert_many(lm, [seen, seen])], ["recovered", "recovered"]),
        "gradient": (lambda: sipit.invert(lm, states[:2], layer=_LAYER, policy="gradient").verdict, "recovered"),
        "some rows": (lambda: sipit.invert(lm, some).verdict, "recovered"),
        "out of order": (lambda: sipit.invert(lm, states.flip(0), layer=_LAYER, is_shuffled=True).verdict, "recovered"),
        "permuted": (lambda: sipit.invert(lm, states.flip(1), layer=_LAYER, is_permuted=True).verdict, "recovered"),
        "behind noise": (lambda: sipit.invert(lm, noisy, layer=_LAYER, noise="auto").verdict, "probable"),
        "one vector": (lambda: sipit.invert_last(lm, seen.last_rows(1), max_tokens=2, seconds=1).verdict, "unmatched"),
        "identify": (lambda: [[fit.layer, fit.site] for fit in identify(lm, states).fits], [[_LAYER, "block"]]),
        "verify": (lambda: [bad.row for bad in verify(lm, seen, [*IDS[:-1], 8]).bad_rows], [len(IDS) - 1]),
        "fitting": (lambda: str(_first_position(lm, token_keys(lm), seen.cut, 0)[2].dtype), "torch.float64"),
        "fitted": (lambda: _fitted(lm), "recovered"),
        "closest pair": (lambda: len(sipit.collisions.nearest_pairs([states])), 1),
    }


def wrong_answers(lm: LanguageModel) -> dict[str, Any]:
    """Return what a model answers otherwise than it must, by what was asked; where it fails, the error."""
    wrong = {}
    for name, (way, right) in _ways(lm).items():
        try:
            answer = way()
        except Exception as error:  # noqa: BLE001  told beside the others
            answer = f"{type(error).__name__}: {error}"
        if answer != right:
            wrong[name] = answer
    return wrong


@pytest.mark.thorough
@pytest.mark.skipif(not _CAN_STAND_IN, reason="this torch takes no device made in Python")
def test_device_without_float64_answers_as_the_cpu_does() -> None:
    code = "from tests.without_float64 import main; main()"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "{}\n"), run.stdout + run.stderr[-2000:]
