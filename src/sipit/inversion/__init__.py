"""From an observation to a prompt, with evidence; and back, to check the evidence."""

from sipit.inversion.evidence.certificate import (
    CertificateCheck,
    certificate_of,
    check_certificate,
    read_certificate,
    write_certificate,
)
from sipit.inversion.evidence.redaction import redacted
from sipit.inversion.evidence.result import Candidate, Inversion, Miss, PositionEvidence, Verdict
from sipit.inversion.invert import invert, invert_many, observation_at
from sipit.inversion.judging.noise_model import NoiseModel
from sipit.inversion.last.invert_last import LastOptions, LastProgress, holds_last_alone, invert_last
from sipit.inversion.proposals import POLICIES, Policy
from sipit.inversion.search.batching import search_events
from sipit.inversion.search.belonging import require_belongs
from sipit.inversion.search.options import OnProgress, Progress, SearchOptions
from sipit.inversion.search.prefix_file import PrefixFile

__all__ = [
    "POLICIES",
    "Candidate",
    "CertificateCheck",
    "Inversion",
    "LastOptions",
    "LastProgress",
    "Miss",
    "NoiseModel",
    "OnProgress",
    "Policy",
    "PositionEvidence",
    "PrefixFile",
    "Progress",
    "SearchOptions",
    "Verdict",
    "certificate_of",
    "check_certificate",
    "holds_last_alone",
    "invert",
    "invert_last",
    "invert_many",
    "observation_at",
    "read_certificate",
    "redacted",
    "require_belongs",
    "search_events",
    "write_certificate",
]
