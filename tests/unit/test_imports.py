"""Which module may know which: the arrows of the design, read from the source."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import sipit

SOURCE = Path(sipit.__file__).parent
MODULES = {
    ".".join(("sipit", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
# each may import those before it in this list, and itself
ARROWS = (
    *("errors", "float64", "storage", "observations", "models", "workers", "corpora", "inversion", "collisions"),
    *("baselines", "experiments", "audit", "report", "web", "cli", "__main__"),
)
PUBLIC = [
    *("Inversion", "LanguageModel", "Observation", "SipitError", "check_certificate", "invert", "invert_last", "load"),
    *("read_observation", "write_observation"),
]
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "matplotlib",
    "datasets",
    "jinja2",
    "rich",
    "gguf",
    "bitsandbytes",
    "gradio",
    "ray",
)


@cache
def _imported(module: str) -> set[str]:
    """Return the modules of this package that a module names in any import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name in MODULES}


def _package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_source_was_found() -> None:
    assert {"sipit", "sipit.errors", "sipit.models.truncated", "sipit.cli"} <= set(MODULES)
    assert "sipit.inversion.judging.replay" in _imported("sipit.inversion.evidence.certificate")


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"sipit"}))
def test_module_imports_only_what_comes_before_it(module: str) -> None:
    own = _package(module)
    assert own in ARROWS, f"the design has no package {own!r}"
    for imported in _imported(module) - {"sipit"}:
        assert ARROWS.index(_package(imported)) <= ARROWS.index(own), f"{module} imports {imported}"


def test_report_imports_no_model_and_no_search() -> None:
    for module in MODULES:
        if _package(module) == "report":
            assert {_package(m) for m in _imported(module)} <= {"", "errors", "storage", "report"}


def _reached(start: str) -> set[str]:
    return _reached_from({start})


def _reached_from(starts: set[str]) -> set[str]:
    reached: set[str] = set()
    new = set(starts)
    while new:
        reached |= new
        new = {name for module in new for name in _imported(module)} - reached
    return reached


# inside `inversion` each room may import those before it, and itself
ROOMS = (
    *("judging", "evidence", "inverses", "fitting", "proposals", "search", "noise", "secrets", "last", "invert"),
    "places",
)


def test_certificate_reaches_what_judges_and_nothing_else() -> None:
    reached = _reached("sipit.inversion.evidence.certificate")
    assert {_package(m) for m in reached} == {"errors", "float64", "storage", "observations", "models", "inversion"}
    rooms = {m.split(".")[2] for m in reached if _package(m) == "inversion"}
    assert rooms == {"judging", "evidence"}
    assert "sipit.models.truncated" in reached


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if m.count(".") > 1 and _package(m) == "inversion"])
def test_rooms_of_inversion_import_only_those_before_them(module: str) -> None:
    own = module.split(".")[2]
    for imported in _imported(module):
        if _package(imported) == "inversion" and imported.count(".") > 1:
            assert ROOMS.index(imported.split(".")[2]) <= ROOMS.index(own), f"{module} imports {imported}"


def test_no_import_goes_in_a_circle() -> None:
    circles = [m for m in MODULES if m != "sipit" and m in _reached_from(_imported(m) - {m, "sipit"})]
    assert circles == []


def test_observations_know_no_models() -> None:
    assert not [m for m in _reached("sipit.observations") if m.startswith("sipit.models")]


def test_nearest_pairs_know_no_language_models() -> None:
    if "sipit.collisions.nearest" in MODULES:
        assert {_package(m) for m in _reached("sipit.collisions.nearest")} <= {
            "",
            "errors",
            "float64",
            "storage",
            "collisions",
        }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_a_grab_bag(module: str) -> None:
    name = module.rsplit(".", 1)[-1].strip("_")
    assert name not in {"utils", "util", "helpers", "helper", "misc", "common", "tools", "functions"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text("utf-8")))


def _loads(code: str) -> set[str]:
    """Return which heavy libraries a fresh interpreter has loaded after running `code`."""
    probe = f"{code}\nimport sys\nprint('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_probe_sees_what_is_loaded() -> None:
    assert _loads("import numpy") == {"numpy"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert _loads("import sipit; dir(sipit); sipit.__version__") == set()


def test_help_loads_nothing_heavy() -> None:
    for arguments in (["--help"], ["invert", "--help"], ["--version"]):
        code = f"import contextlib, sipit.cli\nwith contextlib.suppress(SystemExit): sipit.cli.main({arguments!r})"
        assert _loads(code) == set()


def test_bad_usage_loads_nothing_heavy() -> None:
    assert _loads("import sipit.cli\nassert sipit.cli.main(['invert']) == 2") == set()


@pytest.mark.thorough
def test_python_interface_loads_no_plotting_web_or_data_set_library() -> None:
    assert (
        _loads("import sipit; sipit.load; sipit.invert") & {"matplotlib", "datasets", "rich", "gradio", "ray"} == set()
    )


def test_public_names_are_the_documented_ones() -> None:
    assert sipit.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(sipit, name).__name__ == name
        assert name in dir(sipit)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        sipit.nonsense  # noqa: B018


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if MODULES[m].name == "__init__.py"])
def test_exported_names_exist(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name)


def test_every_error_inherits_the_base_and_a_builtin() -> None:
    from sipit import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    for one in classes:
        assert issubclass(one, errors.SipitError)
        assert one is errors.SipitError or issubclass(one, (ValueError, OSError))
        assert one.__name__ in (errors.__doc__ or "")


def test_policies_of_the_command_line_are_those_of_the_library() -> None:
    from sipit.cli import arguments
    from sipit.inversion import POLICIES
    from sipit.observations import DTYPES

    assert arguments._POLICIES == POLICIES
    assert set(arguments._DTYPES) == set(DTYPES)


def test_packages_are_reached_from_the_top_without_their_own_import() -> None:
    code = "import sipit, torch; print(sipit.collisions.nearest_pairs([torch.eye(2)])[0].first)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"


def test_searching_arrays_loads_no_model_library() -> None:
    assert _loads("from sipit.collisions import nearest_pairs") & {"transformers", "matplotlib", "datasets"} == set()


def test_collision_names_are_all_there() -> None:
    for name in sipit.collisions.__all__:
        assert getattr(sipit.collisions, name).__name__ == name


def test_closest_pairs_reach_no_language_model() -> None:
    for start in ("sipit.collisions.nearest", "sipit.collisions.farthest", "sipit.collisions.spread"):
        reached = {_package(name) for name in _reached(start)}
        assert reached <= {"", "errors", "float64", "collisions"}, start


def test_no_function_takes_more_than_five_arguments_by_place() -> None:
    wide = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
                if len([name for name in names if name not in ("self", "cls")]) > 5:
                    wide.append(f"{path.name}: {node.name}")
    assert wide == []
