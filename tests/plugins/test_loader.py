"""Loading plugins: what works is used, what is broken is quarantined and named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bascule.plugins import loader
from bascule.plugins.loader import Plugins, load_plugins
from bascule.schemas.errors import ConfigError, PluginError

GOOD = """
from bascule.plugins import hookimpl
from bascule.plugins.algorithm import Requires

class Mine:
    name = "mine"
    version = "3"
    requires = Requires()
    streams = frozenset()
    def defaults(self): return {}
    def credit(self, groups, params): return []

@hookimpl
def bascule_register(registry):
    registry.algorithm(Mine())
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a distribution with one plugin, as pip would lay it out."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name: str, source: str, *, distribution: str | None = None) -> None:
        distribution = distribution or f"dist-{name}"
        module = f"plugin_{distribution.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[bascule.plugins]\n{name} = {module}\n")
        sys.modules.pop(module, None)

    return put


def row(found: Plugins, name: str):
    return next(p for p in found.loaded if p.name == name)


def test_a_third_partys_plugin_is_found_and_pinned_by_version_and_hash(install) -> None:
    install("extra", GOOD)
    found = load_plugins()
    assert row(found, "extra").provides == ("algorithm:mine",)
    pin = found.pin("algorithm", "mine")
    assert (pin.version, pin.distribution) == ("3", "dist-extra (extra) 1.5")
    assert pin.hash == row(found, "extra").hash != row(found, "algorithms").hash


def test_the_hash_changes_with_the_code(install) -> None:
    install("one", GOOD)
    install("two", GOOD.replace('"mine"', '"other"'))
    found = load_plugins()
    assert row(found, "one").hash != row(found, "two").hash


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("from bascule.plugins import hookimpl\n@hookimpl\ndef bascule_registr(registry): pass", "bascule_registr"),
        ("bascule_api = '9'", "API 9"),
        (GOOD.replace("registry.algorithm(Mine())", "registry.algorithm(Mine()); 1 / 0"), "ZeroDivisionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import asyncio\nraise asyncio.CancelledError('gone')", "CancelledError: gone"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
        ("class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute", "Mute, whose own text fails"),
        ("class Mute(Exception):\n    def __str__(self): raise SystemExit\nraise Mute", "Mute, whose own text fails"),
        ("class Mute(Exception):\n    def __str__(self): return 5\nraise Mute", "Mute, whose own text fails"),
        ("raise ValueError('half a pair: \\ud800')", "half a pair: \\ud800"),
        ("bascule_register = 5", "bascule_register is of type int"),
        ("def bascule_register(registry): pass", "bascule_register is of type function"),
        ("", "marked with @hookimpl; it has none"),
        (GOOD.replace("def bascule_register", "async def bascule_register"), "must be a plain function"),
        (GOOD.replace("registry.algorithm(Mine())", "yield registry.algorithm(Mine())"), "must be a plain function"),
        (GOOD.replace("bascule_register(registry)", "bascule_register(registry, more)"), "bascule_register"),
        (GOOD.replace('"mine"', "5"), "algorithm 5 in version '3'"),
        (GOOD.replace('"3"', "None"), "algorithm 'mine' in version None"),
    ],
)
def test_a_broken_plugin_is_quarantined_and_the_others_work(install, source: str, why: str) -> None:
    install("bad", source)
    found = load_plugins()
    assert why in (row(found, "bad").error or "")
    assert "mine" not in found.registry.algorithms.items
    assert "grpo" in found.registry.algorithms.items


def test_what_is_told_of_a_broken_plugin_can_be_encoded(install) -> None:
    install("bad", "raise ValueError('\\ud800')")
    assert (row(load_plugins(), "bad").error or "").encode() == rb"ValueError: \ud800"


@pytest.mark.usefixtures("interruptible")
def test_a_persons_interrupt_while_a_plugin_loads_ends_the_start_and_blames_no_plugin(install) -> None:
    install("slow", "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        load_plugins()
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_an_interrupt_at_import_is_the_plugins_own(install) -> None:
    install("bad", "raise KeyboardInterrupt")
    found: list[Plugins] = []
    thread = threading.Thread(target=lambda: found.append(load_plugins()))
    thread.start()
    thread.join()
    assert row(found[0], "bad").error == "KeyboardInterrupt: "


def test_a_plugin_that_takes_long_is_named_while_it_loads(
    install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "SLOW", 0.01)
    monkeypatch.setenv("BASCULE_PLUGINS", "slow")
    # It is done when it has been named, or after a minute without.
    install("slow", """
import sys, time
end = time.monotonic() + 60
while "still loading" not in sys.stderr.getvalue():
    assert time.monotonic() < end, "it was not named"
    time.sleep(0.01)
""" + GOOD)  # fmt: skip
    threads = threading.active_count()
    found = load_plugins()
    assert row(found, "slow").error is None
    assert capsys.readouterr().err == "bascule: the plugin 'slow' of dist-slow is still loading after 0.01 s\n"
    assert threading.active_count() == threads, "who forks next has no thread of the loader's"


def test_in_debug_mode_each_plugin_is_named_before_it_may_end_the_process(install, tmp_path: Path) -> None:
    install("first", GOOD)
    install("ender", "import os; os._exit(0)")
    done = subprocess.run(
        [sys.executable, "-m", "bascule.runtime.cli", "plugins"],
        env=os.environ | {"BASCULE_DEBUG": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "bascule: loading the plugin 'ender' of dist-ender"


def test_strict_loading_names_the_broken_plugin_and_its_distribution(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("bad", "1 / 0")
    monkeypatch.setenv("BASCULE_PLUGINS_STRICT", "1")
    with pytest.raises(PluginError, match="'bad' of dist-bad does not load: ZeroDivisionError"):
        load_plugins()


def test_two_distributions_that_claim_one_name_are_an_error_naming_both(install) -> None:
    install("extra", GOOD, distribution="first")
    install("extra", GOOD, distribution="second")
    with pytest.raises(PluginError, match="first and second"):
        load_plugins()


def test_two_plugins_that_register_one_name_are_an_error_naming_both(install) -> None:
    install("one", GOOD)
    install("two", GOOD)
    with pytest.raises(PluginError, match=r"dist-one \(one\) and dist-two \(two\)"):
        load_plugins()


def test_the_allow_list_keeps_everything_else_out(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("extra", GOOD)
    monkeypatch.setenv("BASCULE_PLUGINS", "extra")
    assert [p.name for p in load_plugins().loaded] == ["extra"]
    monkeypatch.setenv("BASCULE_PLUGINS", "")
    assert load_plugins().loaded == ()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no algorithm 'nope'\. Known: best_of_n, dpo, entropic, grpo"):
        load_plugins().registry.algorithms.get("nope")
