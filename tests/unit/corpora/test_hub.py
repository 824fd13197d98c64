"""Hub data sets are asked for by the right name and commit, and fail loudly; the hub itself is a fake."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub
import pytest

from sipit.corpora import HUB_DATASETS, corpus
from sipit.errors import FetchError, InputError, OptionError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# name here → hub name, config, text field, as the paper lists them
PLACES = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", "text"),
    "c4": ("allenai/c4", "en", "text"),
    "pile-uncopyrighted": ("monology/pile-uncopyrighted", None, "text"),
    "python-github-code": ("angie-chen55/python-github-code", None, "code"),
}


class FakeHub:
    """What the package asked for, and the rows it is given."""

    def __init__(self) -> None:
        self.rows: Callable[[], Iterator[dict[str, Any]]] = lambda: iter(())
        self.asked: list[dict[str, Any]] = []
        self.shuffled: list[dict[str, int]] = []
        self.revisions: list[tuple[str, str | None]] = []
        self.sha: str | None = COMMIT

    def load_dataset(self, path: str, **options: Any) -> FakeHub:
        self.asked.append({"path": path, **options})
        return self

    def shuffle(self, *, seed: int, buffer_size: int) -> FakeHub:
        self.shuffled.append({"seed": seed, "buffer_size": buffer_size})
        return self

    def dataset_info(self, name: str, *, revision: str | None) -> types.SimpleNamespace:
        self.revisions.append((name, revision))
        return types.SimpleNamespace(sha=self.sha)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake, module = FakeHub(), types.ModuleType("datasets")
    vars(module).update(load_dataset=fake.load_dataset, __version__="3.9.9")
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "zstandard", types.ModuleType("zstandard"))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda _, *names, **options: fake.dataset_info(*names, **options)
    )
    return fake


def test_data_sets_are_those_of_the_paper() -> None:
    assert {name: (p.hub_name, p.config, p.field) for name, p in HUB_DATASETS.items()} == PLACES
    assert "subset of the Pile" in HUB_DATASETS["pile-uncopyrighted"].source


@pytest.mark.parametrize("name", PLACES)
def test_data_set_is_streamed_shuffled_and_recorded_at_its_commit(hub: FakeHub, name: str) -> None:
    hub_name, config, field = PLACES[name]
    hub.rows = lambda: iter([{"url": "u", field: "first"}, {"url": "u", field: "second"}])
    made = corpus(name, seed=5)
    assert list(made.texts) == ["first", "second"]
    assert hub.revisions == [(hub_name, None)]
    assert hub.asked == [{"path": hub_name, "name": config, "split": "train", "revision": COMMIT, "streaming": True}]
    assert hub.shuffled == [{"seed": 5, "buffer_size": 10_000}]
    record = json.loads(json.dumps(made.describe()))
    assert record["revision"] == made.revision == COMMIT
    assert (record["name"], record["hub_name"], record["config"], record["seed"]) == (name, hub_name, config, 5)
    assert (record["field"], record["split"], record["buffer_size"], record["datasets"]) == (
        *(field, "train", 10_000, "3.9.9"),
    )


def test_full_commit_is_used_as_it_is_and_a_branch_is_resolved(hub: FakeHub) -> None:
    other = COMMIT[::-1]
    assert corpus("c4", seed=0, revision=other).revision == other
    assert hub.revisions == []
    assert corpus("c4", seed=0, revision="a-branch").revision == COMMIT
    assert hub.revisions == [("allenai/c4", "a-branch")]
    assert [asked["revision"] for asked in hub.asked] == [other, COMMIT]


def test_missing_package_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OptionError, match=r"'c4' .* 'datasets'.*pip install 'sipit\[datasets\]'"):
        corpus("c4", seed=0, revision=COMMIT)


def test_package_that_unpacks_the_pile_is_asked_for_before_the_hub(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(OptionError, match=r"'zstandard'.*pip install 'sipit\[datasets\]'"):
        corpus("pile-uncopyrighted", seed=0)
    assert hub.revisions == []
    assert corpus("c4", seed=0).revision == COMMIT


def test_unreachable_hub_is_a_fetch_error_when_the_commit_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)
    vars(module)["__version__"] = "3.9.9"
    with pytest.raises(FetchError, match=r"cannot find the commit of 'wikimedia/wikipedia'.*offline.*check the conn"):
        corpus("wikipedia", seed=0)  # the suite runs offline


def test_hub_without_a_commit_is_a_fetch_error(hub: FakeHub) -> None:
    hub.sha = None
    with pytest.raises(FetchError, match="names no commit"):
        corpus("c4", seed=0)


def test_data_set_that_cannot_be_opened_is_a_fetch_error(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: str, **options: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", gone)
    with pytest.raises(FetchError, match=r"cannot open .*'angie-chen55/python-github-code'.*no longer supported"):
        corpus("python-github-code", seed=0)


def test_connection_lost_in_the_middle_is_an_error_not_an_end(hub: FakeHub) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "one"}
        yield {"text": "two"}
        raise TimeoutError

    hub.rows = rows
    texts = corpus("c4", seed=0).texts
    assert [next(texts), next(texts)] == ["one", "two"]
    with pytest.raises(FetchError, match=r"'allenai/c4' after 2 documents .*TimeoutError"):
        next(texts)


def test_row_without_the_text_is_an_input_error(hub: FakeHub) -> None:
    hub.rows = lambda: iter([{"content": "x = 1", "licence": "mit"}])
    with pytest.raises(InputError, match=r"no text in its field 'code' \(fields: content, licence\)"):
        next(corpus("python-github-code", seed=0).texts)


def test_importing_corpora_loads_neither_torch_nor_datasets() -> None:
    code = (
        "import sys, types; sys.modules['datasets'] = None\n"  # an import of it would fail
        "import sipit, sipit.corpora; sipit.corpora.CORPORA\n"
        "print([m for m in ('torch', 'huggingface_hub') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
