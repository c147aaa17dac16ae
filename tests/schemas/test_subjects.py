"""Subjects are identities: five tokens, no wildcards, and one subject for outcomes that exclude each other."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.schemas import subjects
from bascule.schemas.errors import ConfigError

TOKEN = re.compile(r"[a-z0-9_-]{1,64}")
tokens = st.from_regex(TOKEN, fullmatch=True)
generations = st.integers(0, 300)


@given(tokens)
def test_a_token_is_returned_as_it_is(value: str) -> None:
    assert subjects.token(value) == value


@given(st.text().filter(lambda s: not TOKEN.fullmatch(s)))
def test_anything_else_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError) as e:
        subjects.token(value)
    assert repr(value) in str(e.value)


@pytest.mark.parametrize("value", ["", "a.b", "*", ">", "a b", "A", "a\n", "é", "x" * 65, "a/b"])
def test_a_token_cannot_address_other_subjects(value: str) -> None:
    for position in range(4):
        parts = ["r", "traj", "g00", "logged"]
        parts[position] = value
        with pytest.raises(ConfigError):
            subjects.subject(*parts)


@given(tokens, tokens, tokens, tokens)
def test_a_subject_has_five_tokens_and_names_its_run(run: str, aggregate: str, id_: str, event: str) -> None:
    subject = subjects.subject(run, aggregate, id_, event)
    assert subject.split(".") == ["bascule", run, aggregate, id_, event]


@given(st.lists(st.tuples(tokens, tokens), unique=True, min_size=2, max_size=20))
def test_different_subjects_have_different_ids_and_equal_ones_the_same(pairs: list[tuple[str, str]]) -> None:
    all_ = [subjects.subject(run, "traj", id_, "logged") for run, id_ in pairs]
    assert len({subjects.event_id(s) for s in all_}) == len(all_)
    assert [subjects.event_id(s) for s in all_] == [subjects.event_id(s) for s in all_]


def test_the_id_of_a_subject_never_changes() -> None:
    # Recorded logs hold these: another hash would make every event of theirs corrupt.
    assert subjects.event_id("bascule.r1.run.run.started") == "2hw3353py66jor2rgzr5zz5ufqa4rscx"


@given(tokens, generations, st.integers(0, 9999), st.integers(0, 255), st.integers(0, 999))
def test_every_builder_makes_a_subject_of_its_run(run: str, g: int, position: int, sample: int, ordinal: int) -> None:
    evaluation = f"g{g:02d}-dev"
    trajectory = subjects.trajectory_id(evaluation, position, sample)
    made = [
        subjects.run_started(run),
        subjects.run_end(run),
        subjects.run_paused(run, ordinal),
        subjects.run_resumed(run, ordinal),
        subjects.harness_outcome(run, g),
        subjects.candidate_proposed(run, g),
        subjects.candidate_gate(run, g),
        subjects.episodes_requested(run, evaluation, sample),
        subjects.evaluation_completed(run, evaluation),
        subjects.trajectory_logged(run, trajectory),
        subjects.trajectory_scored(run, trajectory),
        subjects.lever_chosen(run, g),
        subjects.call_outcome(run, f"g{g:02d}-policy", ordinal),
        subjects.train_requested(run, g),
        subjects.train_started(run, g, ordinal),
        subjects.adapter_checkpointed(run, g, ordinal),
        subjects.train_outcome(run, g),
        subjects.adapter_served(run, f"g{g:02d}-i{ordinal:03d}"),
        subjects.ablation_requested(run, "constant"),
    ]
    assert len(set(made)) == len(made)
    for subject in made:
        assert subject == subjects.subject(*subject.split(".")[1:])
        assert subject.split(".")[1] == run


@given(tokens, generations)
def test_the_fence_of_a_training_job_covers_what_the_job_writes(run: str, g: int) -> None:
    prefix = subjects.train_aggregate(run, g).removesuffix(">")
    assert prefix.endswith(".")
    for subject in (
        subjects.train_requested(run, g),
        subjects.train_started(run, g, 1),
        subjects.adapter_checkpointed(run, g, 1),
        subjects.train_outcome(run, g),
    ):
        assert subject.startswith(prefix)
    assert not subjects.train_outcome(run, g + 1).startswith(prefix)


@given(tokens, st.text(max_size=40) | st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=32, max_size=32))
def test_an_event_has_its_own_id_and_no_other(id_: str, other: str) -> None:
    subject = subjects.subject("r1", "traj", id_, "logged")
    assert subjects.is_event_id(subjects.event_id(subject), subject)
    assert subjects.is_event_id(other, subject) == (other == subjects.event_id(subject))


@pytest.mark.parametrize("change", ["upper", "0", "1", "8", "9", "_", " ", "\n", "+", "-", "é", "shorter", "longer"])
def test_nothing_that_reads_as_the_same_number_is_an_id(change: str) -> None:
    # As digits to the base of 32, these would be leading zeros, separators, signs or spaces.
    subject = next(s for i in range(10_000) if subjects.event_id(s := f"bascule.r1.run.pause-{i:03d}.paused")[0] == "a")
    right = subjects.event_id(subject)
    wrong = {"upper": right.upper(), "shorter": right[1:], "longer": "a" + right}.get(change, change + right[1:])
    assert subjects.is_event_id(right, subject)
    assert not subjects.is_event_id(wrong, subject)
