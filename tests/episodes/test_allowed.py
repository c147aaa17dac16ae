"""A harness has what its task allows, and is refused before anything of it runs where it asks for more."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from bascule.plugins.task import Allows, PublicFace
from bascule.plugins.tasks.arith import Arith
from bascule.runtime.episodes.allowed import refusal
from bascule.runtime.episodes.batch import batch_of
from bascule.schemas.harness import HarnessManifest, make_harness


@pytest.fixture(scope="module")
def public() -> PublicFace:
    return replace(Arith({}).public(), allows=Allows(packages=("scikit-learn",), memory_mb=2048, prepare_seconds=60.0))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"packages": ("reasoning_gym",)}, "package 'reasoning_gym'"),
        ({"memory_mb": 4096}, "4096 MiB of memory"),
        ({"disk_mb": 17}, "17 MiB of disk"),
        ({"isolation": "batch", "prepare_seconds": 61.0}, "61 seconds for prepare"),
        ({"data": "train"}, "set isolation to batch"),
    ],
)
def test_more_than_allowed_is_refused_with_what_it_is(public: PublicFace, asked: dict[str, Any], said: str) -> None:
    assert said in (refusal(HarnessManifest(name="x", **asked), public) or "")


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"packages": ("scikit_learn",), "memory_mb": 2048, "disk_mb": 16},
        {"isolation": "batch", "data": "train", "prepare_seconds": 60.0},
        {"prepare_seconds": 120.0},
    ],
)
def test_what_is_allowed_is_not_refused(public: PublicFace, asked: dict[str, Any]) -> None:
    assert refusal(HarnessManifest(name="x", **asked), public) is None


def test_without_train_data_no_harness_gets_it(public: PublicFace) -> None:
    bare = replace(public, allows=Allows(data=False), regime="llm_only")
    said = refusal(HarnessManifest(name="x", isolation="batch", data="train"), bare)
    assert said is not None
    assert "regime llm_only" in said


def test_prepare_gets_train_without_what_is_asked_and_without_what_belongs_to_that(public: PublicFace) -> None:
    def given(manifest: dict[str, Any], split: Any, positions: list[int]) -> Any:
        text = json.dumps({"name": "x", **manifest})
        harness = make_harness({"harness.py": "", "system_prompt.md": "", "manifest.json": text})
        return batch_of(harness, public, split, positions, key="g00-train", seed=3)

    train = {"isolation": "batch", "data": "train"}
    batch = given(train, "train", [0, 5])
    groups = {public.train[position].group for position in (0, 5)}
    assert {item["id"] for item in batch.data} == {e.id for e in public.train if e.group not in groups}
    assert {item["id"] for item in batch.data}.isdisjoint({public.train[0].id, public.train[5].id})
    assert batch.data[0]["answer"] == public.answers[batch.data[0]["id"]]
    assert len(given(train, "dev", [0, 5]).data) == len(public.train)
    assert given({"isolation": "batch"}, "dev", [0]).data == ()
    assert given({}, "dev", [0]) is None
