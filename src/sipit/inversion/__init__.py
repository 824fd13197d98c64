"""From an observation to a prompt, with evidence; and back, to check the evidence."""

from sipit.inversion.evidence.certificate import CertificateCheck, check_certificate, write_certificate
from sipit.inversion.evidence.result import Candidate, Inversion, Miss, PositionEvidence, Verdict
from sipit.inversion.invert import invert, invert_many
from sipit.inversion.proposals import POLICIES, Policy
from sipit.inversion.search.batching import OnProgress, Progress
from sipit.inversion.search.prefix_file import PrefixFile

__all__ = [
    "POLICIES",
    "Candidate",
    "CertificateCheck",
    "Inversion",
    "Miss",
    "OnProgress",
    "Policy",
    "PositionEvidence",
    "PrefixFile",
    "Progress",
    "Verdict",
    "check_certificate",
    "invert",
    "invert_many",
    "write_certificate",
]
