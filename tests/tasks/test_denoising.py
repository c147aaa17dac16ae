"""The task denoising: its splits, its rules, its programs run in the sandbox, and cheats scored for what they are."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bascule.plugins.loader import plugins
from bascule.plugins.tasks import counts, magic
from bascule.plugins.tasks.denoising import MAGIC, NO_DENOISING, REVERSED, ZEROS, Denoising
from bascule.plugins.tasks.denoising_private import MAX_BYTES, Cut, DenoisingPrivate, Judged
from bascule.plugins.tasks.denoising_results import NotAMatrix, matrix
from bascule.plugins.tasks.denoising_scores import bounds, figures, reward
from bascule.plugins.tasks.denoising_splits import parted, secret
from bascule.runtime.cli.configuration import configure
from bascule.schemas.errors import ConfigError
from bascule.schemas.harness import make_harness
from bascule.schemas.run import parse_config
from bascule.schemas.trajectory import Scored
from bascule.verifiers.gate import gate
from bascule.verifiers.sandbox.layered import LayeredSandbox

SECRET = bytes(range(32))
SMALL = {"data": "simulated"}
EXAMPLE = "tissue-7"

Judge = Callable[[str], Judged]


@pytest.fixture(autouse=True, scope="module")
def _own_key(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A key of these tests' own; data sets stay where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bascule.plugins.tasks.denoising.canary_key", lambda: b"\7" * 32)
        yield


@pytest.fixture(scope="module")
def sandbox() -> LayeredSandbox:
    return LayeredSandbox()


@pytest.fixture(scope="module")
def face(sandbox: LayeredSandbox) -> DenoisingPrivate:
    face = Denoising(SMALL).private()
    face.use(sandbox)
    return face


@pytest.fixture(scope="module")
def judge(face: DenoisingPrivate) -> Judge:
    return lambda text: face.judge("dev", EXAMPLE, text)


def npy(values: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def program(body: str) -> str:
    return f"import numpy as np\n\ndef denoise(counts, seed, budget_s):\n    {body}\n"


# Splits


def test_no_data_set_and_no_tissue_is_in_two_splits() -> None:
    for params in ({}, SMALL, {"split_seed": 0}):
        public = Denoising(params).public()
        groups = {s: {e.group for e in public.split(s)} for s in ("train", "dev", "sealed")}
        assert not groups["train"] & groups["dev"]
        assert not groups["train"] & groups["sealed"]
        assert not groups["dev"] & groups["sealed"]
        ids = [e.id for s in groups for e in public.split(s)]
        assert len(set(ids)) == len(ids)


def test_dev_and_sealed_have_enough_examples_for_the_gate_to_see_a_gain_in_all() -> None:
    public = Denoising({}).public()
    assert len(public.dev) == len(public.sealed) == 6
    config = parse_config({"task": {"name": "denoising"}, **Denoising({}).defaults()})
    assert config.gate.alpha > 0.5**6
    assert gate([0.3] * 6, [0.0] * 6, config=config.gate, seed=0)[0]


def test_the_published_split_is_made_again_up_to_the_order_of_cells_and_genes() -> None:
    tissue = counts.simulated(1, cells=40, genes=60)
    seen = np.random.RandomState(3).binomial(tissue, 0.9)
    found = parted(tissue, SECRET, seed=3)
    kept = seen.sum(0) > 0
    assert sorted(map(tuple, np.sort(seen[:, kept], axis=1))) == sorted(map(tuple, np.sort(found.train, axis=1)))
    assert (found.test >= 0).all()
    assert found.test.sum() == (tissue - seen)[:, kept].sum()
    assert found.train.shape == (40, kept.sum())


def test_a_private_split_follows_from_its_secret_alone() -> None:
    tissue = counts.simulated(1, cells=40, genes=60)
    first, again = parted(tissue, SECRET), parted(tissue, SECRET)
    other = parted(tissue, secret(SECRET, "other"))
    assert np.array_equal(first.train, again.train)
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(np.sort(first.train, axis=None), np.sort(other.train, axis=None))
    assert 0.85 < first.train.sum() / (first.train.sum() + first.test.sum()) < 0.95


def test_a_tissue_is_the_same_everywhere() -> None:
    tissue = counts.simulated(1, cells=30, genes=20)
    assert tissue.dtype == np.int32
    assert np.array_equal(tissue, counts.simulated(1, cells=30, genes=20))
    assert not np.array_equal(tissue, counts.simulated(2, cells=30, genes=20))


# Figures


def test_the_figures_equal_the_published_formulas() -> None:
    rs = np.random.RandomState(0)
    train, test = rs.poisson(3.0, (12, 9)), rs.poisson(0.4, (12, 9))
    denoised = rs.gamma(2.0, 1.0, (12, 9))
    found = figures(train, test, denoised, bounds(train, test))

    def logs(x: Any) -> Any:
        return np.log1p(np.array([row * 10_000 / row.sum() if row.sum() else row for row in x.astype(float)]))

    def mse(x: Any) -> Any:
        return ((logs(x) - logs(test)) ** 2).mean()

    def loss(x: Any) -> Any:
        x = x * test.sum() / train.sum()
        return (test - x * np.log(test + 1e-6)).mean()

    assert found.mse == pytest.approx(mse(denoised))
    assert found.mse_norm == pytest.approx((mse(train) - mse(denoised)) / mse(train))
    norm = (loss(train) - loss(denoised)) / (loss(train) - loss(test))
    assert found.poisson_norm_published == pytest.approx(norm)
    rate = denoised * test.sum() / train.sum()
    assert found.poisson_true == pytest.approx((rate - test * np.log(rate + 1e-6)).mean())
    assert found.sum_ratio == pytest.approx(denoised.sum() / train.sum())


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_published_error_does_not_see_the_scale_and_the_strict_rule_does(scale: float) -> None:
    train, test = parted(counts.simulated(1, cells=100, genes=250), SECRET)
    against = bounds(train, test)
    sound = figures(train, test, magic.magic(train), against)
    scaled = figures(train, test, magic.magic(train) * scale, against)
    assert scaled.mse_norm == pytest.approx(sound.mse_norm)
    assert reward(sound, against, "strict")[0] == pytest.approx(max(0.0, sound.mse_norm))
    zero, why = reward(scaled, against, "strict")
    assert zero == 0
    assert "totals of cells" in why


def test_the_paper_rule_rewards_zeros_and_the_strict_rule_does_not() -> None:
    train, test = parted(counts.simulated(3), SECRET)
    against = bounds(train, test)
    zeros = figures(train, test, np.zeros(train.shape), against)
    assert reward(zeros, against, "paper")[0] > 0.1
    assert reward(zeros, against, "strict")[0] == 0


def test_molecules_put_on_one_gene_and_a_power_of_magic_lose_by_the_poisson_bound() -> None:
    train, test = parted(counts.simulated(2), SECRET)
    against = bounds(train, test)
    smooth = magic.magic(train)
    totals = train.sum(1, keepdims=True)
    dumped = smooth / 2
    dumped[:, [0]] += totals - dumped.sum(1, keepdims=True)
    sharp = smooth**1.5
    sharp *= totals / sharp.sum(1, keepdims=True)
    assert reward(figures(train, test, smooth, against), against, "strict")[0] > 0.1
    for trick in (dumped, sharp):
        found = figures(train, test, trick, against)
        assert found.mse_norm > 0.1
        zero, why = reward(found, against, "strict")
        assert zero == 0
        assert "Poisson loss" in why


def test_absurd_numbers_have_no_reward() -> None:
    train, test = parted(counts.simulated(1, cells=30, genes=40), SECRET)
    against = bounds(train, test)
    found = figures(train, test, np.full(train.shape, 1e308), against)
    assert reward(found, against, "strict")[0] == 0
    assert reward(found, against, "paper")[0] == 0


# Recorded figures


def test_magic_on_immune_cells_reaches_what_its_authors_code_does() -> None:
    (train, test), against = _published(counts.celltypist())
    found = figures(train, test, magic.magic(train), against)
    assert found.mse_norm == pytest.approx(0.2226, abs=0.002)
    assert against.poisson_true == pytest.approx(0.120, abs=0.001)
    assert reward(found, against, "strict")[0] == found.mse_norm


def _published(found: Any) -> Any:
    pair = parted(found, SECRET, seed=0)
    return pair, bounds(*pair)


# Results


def test_a_result_is_read_as_numpy_reads_it() -> None:
    values = np.arange(12.0).reshape(3, 4)
    for kept in (values, values.astype("<f4"), values.astype(">f8"), values.astype("i2"), np.asfortranarray(values)):
        assert np.array_equal(matrix(npy(kept), (3, 4)), values)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no npy file"),
        (b"\x93NUMPY", "no npy file"),
        (b"\x93NUMPY\x09\x00" + bytes(64), "format 9.0"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(64), "header"),
        (b"\x93NUMPY\x01\x00\x40\x00" + b"(" * 64, "header"),
        (npy(np.ones((3, 4)))[:-1], "longer or shorter"),
        (npy(np.ones((3, 4))) + b"x", "longer or shorter"),
        (npy(np.ones((4, 3))), "not 3 x 4"),
        (npy(np.ones(12)), "header"),
        (npy(np.ones((3, 4, 1))), "header"),
        (npy(np.ones((3, 4), complex)), "header"),
        (npy(np.ones((3, 4), "U3")), "header"),
        (npy(np.ones((3, 4), "m8[s]")), "header"),
        (npy(np.ones((3, 4), object)), "header"),
        (npy(np.ones((3, 4), [("a", "f8")])), "header"),
        (npy(np.full((3, 4), np.nan)), "finite"),
        (npy(np.full((3, 4), np.inf)), "finite"),
        (npy(np.full((3, 4), -1e-9)), "negative"),
        (npy(np.ones((3, 4))).replace(b"(3, 4)", b"(3,-4)"), "header"),
        (npy(np.ones((3, 4))).replace(b"(3, 4), }      ", b"(9999999999, 4)"), "header"),
        (npy(np.ones((3, 4))).replace(b"<f8", b"<f3"), "type f3"),
        (npy(np.ones((3, 4))).replace(b"<f8", b"|O8"), "header"),
    ],
)
def test_whatever_is_no_matrix_of_real_numbers_is_refused_with_its_reason(data: bytes, why: str) -> None:
    with pytest.raises(NotAMatrix, match=why):
        matrix(data, (3, 4))


# Programs


def test_sound_programs_gain_and_the_reference_is_one(judge: Judge) -> None:
    harness = make_harness(Denoising(SMALL).harness())
    for text in (MAGIC.read_text(), harness.files["denoise.py"].replace('"scale": 500.0', '"scale": 30000.0')):
        found = judge(text)
        assert found.figures is not None, found.reason
        assert found.figures.mse_norm > -0.1
        assert found.figures.least_ratio > 0.5
        assert "totals" not in found.reason


def test_baselines_are_programs_that_run_and_zeros_and_reversed_magic_fail(judge: Judge) -> None:
    for text in (ZEROS, MAGIC.read_text() + REVERSED):
        found = judge(text)
        assert found.verdict == Scored(reward=0.0, passed=False)
        assert "totals of cells" in found.reason
    untouched = judge(NO_DENOISING)
    assert untouched.figures is not None
    assert untouched.figures.mse_norm == pytest.approx(0.0, abs=1e-12)
    assert untouched.verdict == Scored(reward=0.0, passed=False)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return counts * 1e-3", "totals of cells"),
        ("return counts * 1e30", "totals of cells"),
        ("return np.full(counts.shape, 1e300)", "finite"),
        ("return np.full(counts.shape, np.nan)", "finite"),
        ("return -counts", "negative"),
        ("return counts + 0j", "header|stopped"),
        ("return counts.astype(object)", "no result"),
        ("return counts.T", " x "),
        ("return counts[:-1]", " x "),
        ("return counts.ravel()", "header"),
        ("return None", "no result"),
        ("raise RuntimeError('lost')", "lost"),
        ("return np.broadcast_to(np.float32(1), (10**5, 10**5))", "no result|stopped"),
        ("import os; os._exit(0)", "no result"),
        ("import os; os.symlink('counts.npy', 'result.npy'); os._exit(0)", "no result"),
        ("import os; os.mkdir('result.npy'); os._exit(0)", "no result"),
        ("import os; open('result.npy', 'wb').write(b'x' * 200); os._exit(0)", "no npy file"),
        ("open('result.npy', 'wb').truncate(1 << 34); import os; os._exit(0)", "no result|stopped|longer"),
    ],
)
def test_what_is_no_denoised_matrix_is_a_failure_with_its_reason(judge: Judge, body: str, why: str) -> None:
    found = judge(program(body))
    assert isinstance(found.verdict, Scored)
    assert found.verdict.reward == 0
    assert any(part in found.reason for part in why.split("|")), found.reason


def test_a_result_of_a_subclass_counts_for_its_plain_numbers(judge: Judge) -> None:
    text = (
        "import numpy as np\n\nclass Fine(np.ndarray):\n    def sum(self, *a, **k):\n        return 1.0\n\n"
        "def denoise(counts, seed, budget_s):\n    return (counts * 0.0).view(Fine)\n"
    )
    found = judge(text)
    assert found.verdict == Scored(reward=0.0, passed=False)
    assert found.figures is not None
    assert found.figures.sum_ratio == 0


def test_a_program_that_prints_is_scored_and_one_that_prints_without_end_is_stopped(judge: Judge) -> None:
    quiet = judge(program("return counts + 1"))
    assert quiet.figures is not None, quiet.reason
    assert judge(program("print('x' * 1000); return counts + 1")) == quiet
    endless = judge(program("\n    while True: print('x' * 65536, flush=True)"))
    assert isinstance(endless.verdict, Scored)
    assert (endless.verdict.reward, endless.figures) == (0, None)


def test_a_program_without_end_is_stopped_and_fails(sandbox: LayeredSandbox) -> None:
    face = Denoising({**SMALL, "limit": 3}).private()
    face.use(sandbox)
    found = face.judge("dev", EXAMPLE, program("\n    while True: pass"))
    assert found.verdict == Scored(reward=0.0, passed=False, well_formed=False)
    assert "stopped" in found.reason


def test_what_is_held_out_cannot_be_drawn_again_and_lies_nowhere_in_the_sandbox(sandbox: LayeredSandbox) -> None:
    """The program has the tissue itself and the published seed, and so all that the split was made of but the order."""
    tissue = counts.simulated(7, cells=40, genes=60)
    train, test = parted(tissue, SECRET, seed=0)
    body = f"""
    whole = np.array({tissue.tolist()})
    drawn = np.random.RandomState(0).binomial(whole, 0.9)
    held = (whole - drawn)[:, drawn.sum(0) > 0]
    return held if held.shape == counts.shape else counts
    """
    attack = program(body)
    assert len(attack) < MAX_BYTES
    names = program("import os; assert sorted(os.listdir('.')) == ['counts.npy', 'denoise.py', 'driver.py'], 'more'")
    cut = Cut(data="whole", seed=0)
    face = DenoisingPrivate({("dev", "whole"): cut}, {"whole": tissue}, b"\7" * 32)
    face.use(sandbox)
    found = face.judge("dev", "whole", attack)
    assert found.figures is not None, found.reason
    # Whoever knew the order would have an error of 0, which is 1 on this scale; in another order it is no better.
    assert found.figures.mse_norm < 0.2
    assert figures(train, test, test.astype(float), bounds(train, test)).mse_norm == 1
    assert "more" not in face.judge("dev", "whole", names).reason


@pytest.mark.parametrize("answer", [None, "", " \n", "x" * (MAX_BYTES + 1), "denoise = 1", "def denoise(:", "\ud800"])
def test_an_answer_that_is_no_program_fails_and_is_not_unscored(face: DenoisingPrivate, answer: str | None) -> None:
    assert face.score("dev", EXAMPLE, answer) == Scored(reward=0.0, passed=False, well_formed=False)


def test_an_example_of_another_split_has_no_verdict(face: DenoisingPrivate) -> None:
    with pytest.raises(KeyError):
        face.score("sealed", EXAMPLE, ZEROS)


# Data of the user's own, and parameters


def test_a_users_file_is_read_dense_and_sparse_and_only_counts_are_taken(tmp_path: Path) -> None:
    import h5py
    from scipy import sparse

    tissue = counts.simulated(1, cells=90, genes=50)
    kept = tissue[:, (tissue > 0).sum(0) >= counts.LEAST_CELLS]
    for name, node, made in (
        ("dense", "X", None),
        ("csr", "raw/X", sparse.csr_array(tissue)),
        ("csc", "layers/counts", sparse.csc_array(tissue)),
    ):
        with h5py.File(tmp_path / f"{name}.h5ad", "w") as file:
            if made is None:
                file[node] = tissue.astype(np.float32)
                continue
            group = file.create_group(node)
            group.attrs["shape"], group.attrs["encoding-type"] = made.shape, f"{name}_matrix"
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(made, part)
        assert np.array_equal(counts.from_h5ad(tmp_path / f"{name}.h5ad"), kept)
    task = Denoising({"h5ad": str(tmp_path / "csr.h5ad")})
    assert [e.group for e in task.public().sealed][:2] == ["own-2", "own-3"]
    pinned = task.pinned
    assert task.public().version == f"1-{pinned['sha256'][:16]}"
    chosen = {"name": "denoising", "params": {"h5ad": str(tmp_path / "csr.h5ad")}}
    assert configure({"task": chosen}, [], plugins()).task.params == pinned, "a run records which file it was"
    recorded = Denoising(pinned)
    assert recorded.public() == task.public()
    recorded.private()
    with h5py.File(tmp_path / "csr.h5ad", "a") as file:
        file["raw/X/data"][0] += 1
    assert task.public().version != f"1-{pinned['sha256'][:16]}", "other data are another task"
    for opened in (recorded.private, recorded.public):
        with pytest.raises(ConfigError, match=r"csr\.h5ad has changed"):
            opened()
    with h5py.File(tmp_path / "logs.h5ad", "w") as file:
        file["X"] = np.log1p(tissue)
    with pytest.raises(ConfigError, match="no counts"):
        Denoising({"h5ad": str(tmp_path / "logs.h5ad")}).private()
    (tmp_path / "text.h5ad").write_text("no file of this kind")
    with pytest.raises(ConfigError, match="cannot be read as h5ad"):
        counts.from_h5ad(tmp_path / "text.h5ad")


@pytest.mark.parametrize(
    "params",
    [
        {"mode": "strict"},
        {"score_mode": "kind"},
        {"data": "none"},
        {"h5ad": "/nowhere.h5ad"},
        {"sha256": "0" * 64},
        {"split_seed": -1},
        {"data": "simulated", "split_seed": 0},
        {"limit": 0},
        {"limit": True},
    ],
)
def test_a_parameter_that_cannot_be_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Denoising(params)


def test_its_first_harness_is_valid_tunable_and_small() -> None:
    from bascule.plugins.authors.parameters import parameters

    harness = make_harness(Denoising({}).harness())
    assert {p.name for p in parameters(harness)} == {"scale", "components", "neighbours", "steps"}
    assert len(harness.files["denoise.py"].encode()) < MAX_BYTES
    assert len((MAGIC.read_text() + REVERSED).encode()) < MAX_BYTES
