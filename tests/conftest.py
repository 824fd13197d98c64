"""Fixtures that every folder of tests shares: tiny models, built once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub library is imported: no test asks the hub

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from sipit import LanguageModel
from tests.tiny_models import FAMILIES, text_model, tiny_model

torch.set_num_threads(1)  # tiny matrices gain nothing from threads and lose much when cores are shared
settings.register_profile("suite", deadline=None, database=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


@pytest.fixture(scope="session", params=FAMILIES)
def family_lm(request: pytest.FixtureRequest) -> LanguageModel:
    """A tiny model of each family in turn; its name is the family's."""
    return LanguageModel(tiny_model(request.param), name=request.param)


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    return LanguageModel(tiny_model("llama"), name="llama")


@pytest.fixture(scope="session")
def text_lm() -> LanguageModel:
    """A tiny Llama over bytes whose tokenizer adds no BOS."""
    return text_model(bos=False)


def _saved(lm: LanguageModel, folder: Path) -> Path:
    lm.model.save_pretrained(folder)  # type: ignore[operator]
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(text_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text_lm` as a folder on disk."""
    return _saved(text_lm, tmp_path_factory.mktemp("text-model"))


@pytest.fixture(scope="session")
def bos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds a BOS, as a folder on disk."""
    return _saved(text_model(bos=True), tmp_path_factory.mktemp("bos-model"))


@pytest.fixture(scope="session")
def ids_folder(llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer, as a folder on disk."""
    return _saved(llama, tmp_path_factory.mktemp("ids-model"))
