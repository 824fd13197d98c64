"""Fixtures that every folder of tests shares: tiny models, built once."""

from __future__ import annotations

import os
import shutil
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub library is imported: no test asks the hub

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from sipit import LanguageModel
from sipit.storage import cache_dir
from tests.tiny_models import FAMILIES, text_model, tiny_model

torch.set_num_threads(1)  # tiny matrices gain nothing from threads and lose much when cores are shared
settings.register_profile("suite", deadline=None, database=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each test, and none of those marked thorough")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a quick run, keep one case of each test: which one differs between tests, and never between runs."""
    if not config.getoption("--quick"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("thorough") is None:
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = {group[zlib.crc32(name.encode()) % len(group)] for name, group in cases.items()}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of the tests' own, which holds nothing but the converted models of the user's."""
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(models, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIPIT_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def nothing_kept(own_cache: Path) -> None:
    """What an earlier test measured is measured anew: tiny models of many tests are one model."""
    for kind in ("anchors", "costs", "floors"):
        shutil.rmtree(own_cache / kind, ignore_errors=True)


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
