"""The record of an inversion without the prompt: what may be passed on where the prompt may not."""

from __future__ import annotations

from typing import Any

from sipit.inversion.evidence.digest import digest_of

_KEPT = (  # of a certificate: named one by one, so that a key that comes later is left out
    *("format", "version", "model", "fingerprint", "layer", "site", "policy", "verdict", "seq_len", "tolerance"),
    *("noise", "seconds", "wall_ratio", "prefill_ratio", "n_passes", "block_tokens", "calibration_block_tokens"),
    *("n_checked", "observation_sha256", "observation_dtype", "model_dtype", "posterior", "noise_model", "residuals"),
)
_KEPT_OF_A_POSITION = ("distance", "tolerance", "runner_up", "n_checked", "is_held", "posterior")
_KEPT_OF_A_MISS = ("position", "distance", "tolerance", "runner_up", "n_checked")  # a diagnosis may name tokens


def redacted(certificate: dict[str, Any]) -> dict[str, Any]:
    """Return a certificate without text, token ids and tokens; verdict, distances, costs and hashes stay.

    Nothing can be replayed from it. `certificate_digest` names the certificate that it was made of.
    """
    miss = certificate["miss"]
    record = {
        **{key: certificate[key] for key in _KEPT},
        "positions": [
            {**{key: position[key] for key in _KEPT_OF_A_POSITION}, "n_rivals": len(position["rivals"])}
            for position in certificate["positions"]
        ],
        "miss": None if miss is None else {key: miss[key] for key in _KEPT_OF_A_MISS},
        "is_redacted": True,
        "certificate_digest": certificate["digest"],
    }
    return {**record, "digest": digest_of(record)}
