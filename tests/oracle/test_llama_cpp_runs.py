"""What llama.cpp itself leaves of a prompt comes back exactly where it holds keys and values in float32."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sipit.cli import main
from tests.adversarial.scenes import write_gguf
from tests.tiny_models import text_model

IDS = list(b"as llama.cpp runs it")
TEXT = ",".join(map(str, IDS))  # the file holds a tokenizer that transformers does not read

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes as a GGUF file in float32, which both sides read."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(text_model(bos=False), path, merges=['! "'])
    return path


def _left(kind: str, model: Path, folder: Path) -> Path:
    """Run llama.cpp on the text; return the file that it left."""
    command = [sys.executable, "-m", "tests.oracle.llama_cpp_run", kind, str(model), json.dumps(IDS), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if run.returncode < 0:
        pytest.skip(f"llama.cpp does not run on this processor (signal {-run.returncode})")
    assert run.returncode == 0, run.stderr[-2000:]
    return next(folder.glob(f"{kind}.*"))


@pytest.mark.thorough
def test_embeddings_of_each_token_come_back(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = _left("embedding", model, tmp_path)
    assert main(["invert", str(file), "--model", str(model), "--no-fit"]) == 0
    assert capfd.readouterr().out == TEXT


@pytest.mark.parametrize("layer", ["0", "1", "2"])
def test_values_of_a_slot_come_back(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], layer: str) -> None:
    file = _left("float32", model, tmp_path)
    told = ["--model", str(model), "--layer", layer, "--site", "values"]
    assert main(["invert", str(file), *told, "--no-fit"]) == 0
    out, err = capfd.readouterr()
    assert out == TEXT
    assert "exact     yes" in err
    assert main(["verify", str(file), *told]) == 0


@pytest.mark.thorough
def test_values_that_attention_read_in_float16_need_a_declared_noise(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = _left("float16", model, tmp_path)
    told = ["--model", str(model), "--layer", "2", "--site", "values", "--no-fit"]
    assert main(["invert", str(file), *told]) == 1
    capfd.readouterr()
    assert main(["invert", str(file), *told, "--noise", "0.02"]) == 1
    out, err = capfd.readouterr()
    assert out == TEXT
    assert "ambiguous" in err
