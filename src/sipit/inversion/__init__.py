"""From an observation to a prompt, with evidence; and back, to check the evidence."""

from sipit.inversion.certificate import CertificateCheck, check_certificate, write_certificate
from sipit.inversion.invert import invert
from sipit.inversion.many import invert_many
from sipit.inversion.prefix_file import PrefixFile
from sipit.inversion.proposals import POLICIES, Policy
from sipit.inversion.result import Candidate, Inversion, Miss, PositionEvidence, Verdict
from sipit.inversion.search import OnProgress, Progress

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
