"""A program is given named distributions with all that they require, and no others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import pytest

from bascule.plugins.sandbox import Program
from bascule.schemas.errors import ConfigError
from bascule.verifiers.sandbox.layered import LayeredSandbox
from bascule.verifiers.sandbox.packages import PACKAGES, Sight, distributions, executable, interpreter, unmasked


def test_scikit_learn_is_there_and_bascule_and_reasoning_gym_are_not(sandbox: LayeredSandbox) -> None:
    code = """
import importlib, json, os, sys
found = {}
names = "numpy.linalg scipy.optimize sklearn.linear_model joblib bascule.schemas reasoning_gym torch pytest pip"
for name in names.split():
    try:
        importlib.import_module(name)
        found[name] = True
    except ImportError:
        found[name] = False
import numpy
found["solves"] = bool(numpy.allclose(numpy.linalg.solve([[2.0]], [1.0]), 0.5))
print(json.dumps([found, sorted(os.listdir(sys.path[1]))]))
"""
    assert importlib.metadata.version("reasoning-gym")
    ran = sandbox.run(
        Program(arguments=("-c", code), packages=("scikit-learn",), seconds=600, memory_mb=2048, forks=False)
    )
    assert ran.exit_code == 0, ran
    found, listed = json.loads(ran.stdout)
    there = ("numpy.linalg", "scipy.optimize", "sklearn.linear_model", "joblib", "solves")
    assert found == {name: name in there for name in found}
    assert listed == sorted({target.split("/")[2] for _, target in distributions(("scikit-learn",))})


def install(site: Path, name: str, files: tuple[str, ...], requires: tuple[str, ...] = ()) -> None:
    """What pip leaves of a wheel."""
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", *(f"Requires-Dist: {r}\n" for r in requires)]
    for file in (*files, f"{info}/METADATA", f"{info}/RECORD"):
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).touch()
    (site / info / "METADATA").write_text("".join(lines))
    (site / info / "RECORD").write_text("".join(f"{file},,\n" for file in (*files, f"{info}/METADATA")))


def test_the_closure_follows_requirements_whose_markers_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "bsc-a", ("bsc_a/__init__.py", "../../bin/tool"), ("bsc-b>=1", "bsc-c; extra == 'more'"))
    install(
        tmp_path, "bsc-b", ("bsc_b.py", "__pycache__/bsc_b.pyc", "bsc_b.libs/x.so"), ("bsc-d; python_version < '3'",)
    )
    install(tmp_path, "bsc-c", ("shared/c/__init__.py",), ("bsc-a",))
    install(tmp_path, "bsc-d", ("shared/d/__init__.py",))
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = {
        names: {target.removeprefix(f"{PACKAGES}/") for _, target in distributions(names)}
        for names in (("bsc-a",), ("bsc-a[more]",), ("BSC_D",))
    }
    plain = {"bsc_a", "bsc_a-1.0.dist-info", "bsc_b.py", "bsc_b.libs", "bsc_b-1.0.dist-info"}
    assert seen[("bsc-a",)] == plain
    # Of a folder that several distributions share, each has its own part.
    assert seen[("bsc-a[more]",)] == {*plain, "shared/c", "bsc_c-1.0.dist-info"}
    assert seen[("BSC_D",)] == {"shared/d", "bsc_d-1.0.dist-info"}


def test_every_source_is_a_real_path_that_is_there() -> None:
    mounts = [*distributions(("scikit-learn",)), *interpreter().read_only]
    assert all(os.path.exists(source) and os.path.realpath(source) == source for source, _ in mounts)
    assert executable() in {source for source, _ in interpreter().read_only}


@pytest.mark.parametrize(
    ("name", "said"), [("no-such-distribution", "not installed"), ("bascule", "are not known"), ("a b", "no name")]
)
def test_what_cannot_be_given_is_named_with_a_next_step(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        distributions((name,))
    assert name in caught.value.message
    assert caught.value.next_step


def test_the_interpreters_own_packages_are_not_in_sight() -> None:
    sight = interpreter()
    for name in ("site-packages", "dist-packages"):
        for base in {os.path.dirname(os.__file__), f"{sys.base_prefix}/lib/python3"}:
            assert not Path(base, name).is_dir() or os.path.realpath(f"{base}/{name}") in {
                os.path.realpath(masked) for masked in sight.masked
            }


def test_without_masks_only_single_entries_are_read(tmp_path: Path) -> None:
    for name in ("lib/a.py", "lib/site-packages/secret.py", "lib/inner/b.py", "other/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    at = os.path.realpath(tmp_path)
    sight = Sight(read_only=((f"{at}/lib", "/lib"), (f"{at}/other", "/other")), masked=(f"{at}/lib/site-packages",))
    assert unmasked(sight) == ((f"{at}/lib/a.py", f"{at}/lib/inner", f"{at}/other"), (f"{at}/lib",))
