"""Pinned wheels: fetched once, checked always, unpacked as data only."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from bascule.plugins import wheels
from bascule.schemas.errors import ConfigError


def make_wheel(folder: Path, name: str = "demo_data", version: str = "1.2", body: str = "a,b\n1,2\n") -> Path:
    """A wheel that pip accepts, with one data file."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data/table.csv", body)
        archive.writestr(f"{name}/data/deep/notes.txt", "notes")
        archive.writestr(f"{name}/database.txt", "not under data/")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_cached_wheel_needs_no_index(index: Path) -> None:
    source = make_wheel(index)
    digest = sha(source)
    first = wheels.fetch_wheel("demo-data", "1.2", digest)
    source.unlink()
    second = wheels.fetch_wheel("Demo.Data", "1.2", digest.upper())
    assert first == second
    assert sha(first) == digest
    assert list(first.parent.iterdir()) == [first], "no temporary files stay behind"


def test_a_download_with_another_hash_is_refused_and_not_kept(index: Path, tmp_path: Path) -> None:
    source = make_wheel(index)
    with pytest.raises(ConfigError) as caught:
        wheels.fetch_wheel("demo-data", "1.2", "0" * 64)
    assert source.name in str(caught.value)
    assert sha(source) in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert caught.value.next_step
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_cached_wheel_that_changed_is_refused(index: Path) -> None:
    digest = sha(make_wheel(index))
    cached = wheels.fetch_wheel("demo-data", "1.2", digest)
    with cached.open("ab") as f:
        f.write(b"x")
    with pytest.raises(ConfigError, match="pinned") as caught:
        wheels.fetch_wheel("demo-data", "1.2", digest)
    assert str(cached) in (caught.value.next_step or "")


@pytest.mark.usefixtures("index")
def test_a_wheel_that_no_index_has_is_an_error_with_the_next_step() -> None:
    with pytest.raises(ConfigError, match=r"could not download demo-data==1\.2") as caught:
        wheels.fetch_wheel("demo-data", "1.2", "0" * 64)
    assert f"put it into {wheels.wheel_folder()}" in (caught.value.next_step or "")
    with pytest.raises(ConfigError) as caught:
        wheels.fetch_wheel("demo-data", "1.2", "0" * 64, task="demo")
    assert "`bascule tasks fetch demo --from PATH`" in (caught.value.next_step or "")


class Busy(BaseHTTPRequestHandler):
    """A package index that is always out of order."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The requests that such an index got, pip's only one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    Busy.asked.clear()
    yield Busy.asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("wanted", "times"), [(None, 3), ("0", 1)])
def test_an_index_that_fails_is_asked_three_times_unless_the_user_says_otherwise(
    busy: list[str], monkeypatch: pytest.MonkeyPatch, wanted: str | None, times: int
) -> None:
    if wanted is not None:
        monkeypatch.setenv("PIP_RETRIES", wanted)
    with pytest.raises(ConfigError, match="could not download"):
        wheels.fetch_wheel("demo-data", "1.2", "0" * 64)
    assert busy == ["/simple/demo-data/"] * times


def test_a_folder_where_the_cached_wheel_belongs_is_named_and_what_to_do(index: Path) -> None:
    digest = sha(make_wheel(index))
    cached = wheels.fetch_wheel("demo-data", "1.2", digest)
    cached.unlink()
    cached.mkdir()
    for attempt in (
        lambda: wheels.fetch_wheel("demo-data", "1.2", digest),
        lambda: wheels.adopt_wheel("demo-data", "1.2", digest, index),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"{cached} is a folder")) as caught:
            attempt()
        assert "remove it" in (caught.value.next_step or "")
    assert list(cached.parent.iterdir()) == [cached], "no temporary files stay behind"


def test_a_wheel_that_the_user_has_is_copied_into_the_cache(index: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    source = make_wheel(mine)
    digest = sha(source)
    cached = wheels.adopt_wheel("demo-data", "1.2", digest, mine)
    assert cached.parent == tmp_path / "cache" / "wheels"
    assert source.exists()
    renamed = source.rename(mine / "download (1).zip")
    assert wheels.adopt_wheel("demo-data", "1.2", digest, renamed).read_bytes() == cached.read_bytes()
    assert wheels.fetch_wheel("demo-data", "1.2", digest) == cached, "no index is asked"
    assert [p.name for p in cached.parent.iterdir()] == [cached.name]
    assert not list(index.iterdir())


def test_a_wheel_of_the_users_with_another_hash_is_refused_with_both_and_the_cache_stays(
    index: Path, tmp_path: Path
) -> None:
    good = make_wheel(index)
    digest = sha(good)
    cached = wheels.fetch_wheel("demo-data", "1.2", digest)
    mine = tmp_path / "mine"
    mine.mkdir()
    other = make_wheel(mine, body="changed")
    with pytest.raises(ConfigError) as caught:
        wheels.adopt_wheel("demo-data", "1.2", digest, other)
    assert sha(other) in str(caught.value)
    assert digest in str(caught.value)
    assert sha(cached) == digest
    assert list(cached.parent.iterdir()) == [cached]


def test_a_good_wheel_of_the_users_replaces_a_damaged_one(index: Path) -> None:
    good = make_wheel(index)
    digest = sha(good)
    cached = wheels.fetch_wheel("demo-data", "1.2", digest)
    cached.write_bytes(b"damaged")
    assert sha(wheels.adopt_wheel("demo-data", "1.2", digest, index)) == digest
    assert wheels.fetch_wheel("demo-data", "1.2", digest) == cached


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("name", ["", "absent.whl"])
def test_a_path_without_the_wheel_is_named(tmp_path: Path, name: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"empty/.*whl") as caught:
        wheels.adopt_wheel("demo-data", "1.2", "0" * 64, empty / name)
    assert "demo-data==1.2" in (caught.value.next_step or "")


def test_extract_unpacks_a_folder_by_its_inner_paths(tmp_path: Path) -> None:
    into = tmp_path / "out"
    written = wheels.extract(make_wheel(tmp_path), "demo_data/data/", into)
    assert written == [into / "deep/notes.txt", into / "table.csv"]
    assert (into / "table.csv").read_text() == "a,b\n1,2\n"
    assert sorted(p.name for p in into.rglob("*")) == ["deep", "notes.txt", "table.csv"]


def test_extract_unpacks_one_file_by_its_name_and_replaces_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("old")
    written = wheels.extract(make_wheel(tmp_path), "demo_data/data/table.csv", tmp_path)
    assert written == [tmp_path / "table.csv"]
    assert written[0].read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("name", ["d/../../evil", "d//etc/evil", "d/./evil", "d/..\\evil", "d/C:evil"])
def test_extract_refuses_members_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    wheel = tmp_path / "bad.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("d/good", "good")
        archive.writestr(name, "evil")
    with pytest.raises(ConfigError, match="evil"):
        wheels.extract(wheel, "d", tmp_path / "out" / "in")
    assert not list(tmp_path.rglob("evil"))
    assert not list(tmp_path.rglob("good")), "nothing is written when one member is refused"


def test_extract_refuses_links(tmp_path: Path) -> None:
    wheel = tmp_path / "bad.whl"
    link = zipfile.ZipInfo("d/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(ConfigError, match="link"):
        wheels.extract(wheel, "d", tmp_path / "out")


def test_extract_does_not_follow_a_link_that_lies_in_the_target(tmp_path: Path) -> None:
    outside, into = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    into.mkdir()
    (into / "deep").symlink_to(outside)
    with pytest.raises(ConfigError, match="outside"):
        wheels.extract(make_wheel(tmp_path), "demo_data/data", into)
    assert list(outside.iterdir()) == []


def test_extract_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing under 'absent'"):
        wheels.extract(make_wheel(tmp_path), "absent", tmp_path)
    (tmp_path / "no.whl").write_text("no zip")
    with pytest.raises(ConfigError, match="not a usable wheel"):
        wheels.extract(tmp_path / "no.whl", "", tmp_path)
