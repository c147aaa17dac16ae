"""The golden logs: finished runs of earlier code, whose decisions this code makes again without a difference."""

from __future__ import annotations

import io
import lzma
import sys
from pathlib import Path

import pytest

from bascule.plugins.loader import load_plugins
from bascule.runtime.audit.replay import replay
from bascule.runtime.exports.check import verify_export
from bascule.runtime.exports.reader import open_export
from bascule.schemas import events as ev
from tests.golden.make import install_parity

LOGS = sorted(Path(__file__).parent.glob("*.tar.xz"))
ADVICE = (
    "{name}: a recorded run is decided otherwise now, first at {first}. If that is meant, give what decides it "
    "(the gate, the policy, the author) a new version that leaves recorded runs as they are; if not, undo it."
)


def tar(path: Path) -> io.BytesIO:
    return io.BytesIO(lzma.decompress(path.read_bytes()))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin that one of the runs used is installed."""
    install_parity(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("bascule_parity", None)


def test_there_is_a_run_of_the_harness_lever_and_one_of_both() -> None:
    levers = {}
    for path in LOGS:
        with open_export(tar(path)) as export:
            levers[path.name] = {e.data.lever for e in export.events() if isinstance(e.data, ev.LeverChosen)}
        assert path.stat().st_size < 300_000
    assert levers == {"arith.tar.xz": {"harness", "stop"}, "parity.tar.xz": {"harness", "weights", "stop"}}


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("path", LOGS, ids=lambda p: p.name)
def test_every_decision_of_a_recorded_run_is_made_again_the_same(path: Path) -> None:
    with open_export(tar(path)) as export:
        result = replay(export.manifest.run, export.events(), load_plugins())
        first = next(iter(result.differences), None)
        assert first is None, ADVICE.format(name=path.name, first=first)
        assert result.decision_hash == export.manifest.decision_hash
    assert result.decisions > 20


@pytest.mark.parametrize("path", LOGS, ids=lambda p: p.name)
def test_a_recorded_run_is_intact_and_can_be_read_in_full(path: Path) -> None:
    with open_export(tar(path)) as export:
        assert verify_export(export) == []
        assert all(isinstance(e.data, ev.Data) for e in export.events())
