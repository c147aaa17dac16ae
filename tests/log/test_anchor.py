"""The anchor: what it remembers, what it notices, and who may write it."""

from __future__ import annotations

import multiprocessing
import subprocess
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from bascule.runtime.log.anchor import Anchor, Head, anchor_path
from bascule.runtime.log.guard import check_extent
from bascule.runtime.log.notes import Line, digest
from bascule.runtime.log.protocol import Extent
from bascule.runtime.signing import KeyFile
from bascule.schemas.errors import ConfigError, Corrupt, LogError

LOG = "the-log"


def head(count: int, seq: int | None = None) -> Head:
    return Head(count=count, seq=count if seq is None else seq, head=f"{count:064x}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "anchor.jsonl"


@pytest.fixture
def written(path: Path) -> Path:
    """Five lines about two runs."""
    anchor = Anchor(path)
    for i in range(1, 6):
        anchor.append(LOG, {"a" if i % 2 else "b": head(10 * i)})
    return path


def test_the_newest_head_of_each_run_is_remembered(written: Path) -> None:
    anchored = Anchor(written).read()
    assert anchored.heads == {"a": head(50), "b": head(40)}
    assert (anchored.n, anchored.log) == (5, LOG)
    assert sorted(anchored.points["a"]) == [10, 30, 50]


def test_without_a_file_nothing_is_anchored(path: Path) -> None:
    assert Anchor(path).read().n == 0
    assert not path.exists()


def test_a_head_that_is_not_ahead_writes_nothing(written: Path) -> None:
    before = written.read_bytes()
    Anchor(written).append(LOG, {"a": head(50), "b": head(12)})
    assert written.read_bytes() == before


def test_only_the_runs_that_moved_are_in_a_line(written: Path) -> None:
    Anchor(written).append(LOG, {"a": head(50), "b": head(60)})
    assert b'"heads":{"b":' in written.read_bytes().splitlines()[-1]


def test_a_change_of_any_byte_is_noticed_and_the_line_named(written: Path) -> None:
    whole = written.read_bytes()
    lines = whole.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        for at in range(0, len(line) - 1, 7):
            changed = bytearray(line)
            changed[at] ^= 1
            written.write_bytes(b"".join([*lines[: number - 1], bytes(changed), *lines[number:]]))
            with pytest.raises(Corrupt, match=rf"{written} is not intact at line ({number}|{number + 1})\b"):
                Anchor(written).read()
    written.write_bytes(whole)
    assert Anchor(written).read().n == 5


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda ls: [*ls[:2], *ls[3:]], 3),
        (lambda ls: [*ls[:2], ls[1], *ls[2:]], 3),
        (lambda ls: [*ls[:2], ls[3], ls[2], ls[4]], 3),
        (lambda ls: ls[1:], 1),
        (lambda ls: [*ls[:2], ls[2][:40] + b"\n", *ls[3:]], 3),
        (lambda ls: [*ls[:4], ls[4][:40] + b"\n"], 5),
        (lambda ls: [*ls[:3], b"\n", *ls[3:]], 4),
    ],
    ids=["removed", "repeated", "swapped", "first removed", "cut", "last cut", "empty line"],
)
def test_a_line_that_was_removed_repeated_moved_or_cut_is_noticed(written: Path, damage, line: int) -> None:  # type: ignore[no-untyped-def]
    written.write_bytes(b"".join(damage(written.read_bytes().splitlines(keepends=True))))
    with pytest.raises(Corrupt, match=f"at line {line}:"):
        Anchor(written).read()


def test_a_reader_notices_when_lines_that_it_saw_are_gone(written: Path) -> None:
    anchor = Anchor(written)
    anchor.read()
    written.write_bytes(b"".join(written.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(Corrupt, match="gone"):
        anchor.read()
    written.unlink()
    with pytest.raises(Corrupt, match="gone"):
        anchor.read()


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_torn_by_a_crash_is_passed_over_and_repaired(written: Path, kept: int) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:4]) + lines[4][:kept])
    assert Anchor(written).read().n == 4
    Anchor(written).append(LOG, {"a": head(99)})
    assert Anchor(written).read().heads == {"a": head(99), "b": head(40)}
    assert written.read_bytes().startswith(b"".join(lines[:4]))


def test_an_anchor_belongs_to_one_log(written: Path) -> None:
    with pytest.raises(Corrupt, match="belongs to the log the-log, and this is the log other"):
        Anchor(written).append("other", {"a": head(60)})


def test_what_was_accepted_replaces_what_was_known_with_its_reason(written: Path) -> None:
    Anchor(written).append("other", {"a": head(7)}, accepted="disk died", missing=2)
    anchored = Anchor(written).read()
    assert anchored.heads == {"a": head(7), "b": head(40)}
    assert (anchored.log, anchored.missing, list(anchored.points["a"])) == ("other", 2, [7])
    assert [(a.reason, a.count) for a in anchored.accepted["a"]] == [("disk died", 7)]


def write_many(path: Path, run: str) -> None:
    anchor = Anchor(path)
    for i in range(1, 41):
        anchor.append(LOG, {run: head(i)})


def test_several_processes_write_one_chain(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(path, run)) for run in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    anchored = Anchor(path).read()
    assert anchored.heads == {"a": head(40), "b": head(40), "c": head(40)}
    assert anchored.n == 120


def test_an_anchor_that_cannot_be_written_is_named() -> None:
    """In a folder that not even root can write to."""
    with pytest.raises(LogError, match=r"anchor\.jsonl cannot be used"):
        Anchor(Path("/sys/kernel/anchor.jsonl")).append(LOG, {"a": head(1)})


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot be used"):
        Anchor(tmp_path).append(LOG, {"a": head(1)})


def test_the_place_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert anchor_path(tmp_path) == tmp_path / "anchor.jsonl"
    monkeypatch.setenv("BASCULE_ANCHOR", str(tmp_path / "elsewhere.jsonl"))
    assert anchor_path(tmp_path / "home") == tmp_path / "elsewhere.jsonl"


# --- signatures ------------------------------------------------------------------------------------------------------


def make_key(folder: Path, name: str) -> Path:
    path = folder / f"{name}.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True)
    subprocess.run(["openssl", "pkey", "-in", path, "-pubout", "-out", folder / f"{name}.pub"], check=True)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KeyFile]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: KeyFile(make_key(folder, name)) for name in ("mine", "other")}


def test_a_signed_anchor_is_read_with_its_key_only(path: Path, keys: dict[str, KeyFile]) -> None:
    mine, other = keys["mine"], keys["other"]
    for i in (1, 2):
        Anchor(path, signer=mine).append(LOG, {"a": head(i)})
    assert Anchor(path, trusted=mine.public_key).read().signed_by == mine.public_key
    assert Anchor(path).read().n == 2
    with pytest.raises(Corrupt, match="line 1: its signature is not by the trusted key"):
        Anchor(path, trusted=other.public_key).read()


def test_an_unsigned_line_is_refused_where_signatures_are_demanded(written: Path, keys: dict[str, KeyFile]) -> None:
    mine = keys["mine"]
    with pytest.raises(Corrupt, match=r"not signed at its end \(line 5\), and BASCULE_VERIFY_KEY demands it"):
        Anchor(written, trusted=mine.public_key).read()
    Anchor(written, signer=mine).append(LOG, {"a": head(60)})
    assert Anchor(written, trusted=mine.public_key).read().n == 6, "its hash covers the lines from before"
    Anchor(written).append(LOG, {"a": head(70)})
    with pytest.raises(Corrupt, match="line 7: it is not signed"):
        Anchor(written, trusted=mine.public_key).read()


def forged(path: Path, *, key: str | None, signature: str | None) -> None:
    """An anchor of one line that fits together, with this key and signature."""
    Anchor(path).append(LOG, {"a": head(9)})
    line = replace(msgspec.json.decode(path.read_bytes(), type=Line), key=key)
    line = replace(line, all=digest(line, line.heads), signature=signature)
    path.write_bytes(msgspec.json.encode(line) + b"\n")


def test_a_key_without_its_signature_signs_nothing(path: Path, keys: dict[str, KeyFile]) -> None:
    mine = keys["mine"].public_key
    forged(path, key=mine, signature=None)
    for trusted in (mine, None):
        with pytest.raises(Corrupt, match="line 1: it has a key without a signature"):
            Anchor(path, trusted=trusted).read()


def test_a_signature_without_a_key_is_refused(path: Path) -> None:
    forged(path, key=None, signature="00" * 64)
    with pytest.raises(Corrupt, match=r"line 1: it has .* a signature without a key"):
        Anchor(path).read()


def test_an_anchor_written_anew_without_the_key_is_refused(path: Path, keys: dict[str, KeyFile]) -> None:
    Anchor(path, signer=keys["other"]).append(LOG, {"a": head(3)})
    with pytest.raises(Corrupt, match="line 1"):
        Anchor(path, trusted=keys["mine"].public_key).read()


def test_keys_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASCULE_SIGNING_KEY", str(make_key(tmp_path, "key")))
    monkeypatch.setenv("BASCULE_VERIFY_KEY", str(tmp_path / "key.pub"))
    anchor = Anchor.of_home(tmp_path)
    anchor.append(LOG, {"a": head(1)})
    assert anchor.read().signed_by is not None
    monkeypatch.setenv("BASCULE_VERIFY_KEY", str(tmp_path / "key.pem"))
    with pytest.raises(ConfigError, match=r"key\.pem"):
        Anchor.of_home(tmp_path)


# --- a store against its anchor --------------------------------------------------------------------------------------


def extent(last: int, missing: tuple[int, ...] = (), log: str = LOG) -> Extent:
    return Extent(log=log, first=1, last=last, messages=last - len(missing), missing=missing)


def test_a_store_that_holds_what_is_anchored_is_accepted(written: Path) -> None:
    anchored = Anchor(written).read()
    check_extent(extent(50), anchored, written)
    check_extent(extent(80), anchored, written)


def test_a_store_that_ends_before_its_anchor_is_refused_with_the_sequence(written: Path) -> None:
    with pytest.raises(Corrupt, match=r"ends at sequence 44, .* up to sequence 50 .* gone: a\."):
        check_extent(extent(44), Anchor(written).read(), written)


def test_a_gap_is_refused_with_its_sequence_unless_it_was_accepted(written: Path) -> None:
    with pytest.raises(Corrupt, match="gap at sequence 17"):
        check_extent(extent(60, (17, 20)), Anchor(written).read(), written)
    Anchor(written).append(LOG, {"a": head(48, 60)}, accepted="two are gone", missing=2)
    check_extent(extent(60, (17, 20)), Anchor(written).read(), written)
    with pytest.raises(Corrupt, match="gap"):
        check_extent(extent(60, (17, 20, 21)), Anchor(written).read(), written)


def test_another_log_in_the_place_of_the_anchored_one_is_refused(written: Path) -> None:
    with pytest.raises(Corrupt, match="belongs to the log the-log, and this is the log new"):
        check_extent(extent(0, log="new"), Anchor(written).read(), written)
