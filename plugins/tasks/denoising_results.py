"""A matrix that comes back from a program, read from the bytes of an npy file without trusting them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY"
#: Real numbers of fixed size; no objects, structures, texts or complex numbers.
_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
# What numpy.save writes of a plain matrix, and nothing else that could be written there.
_HEADER = re.compile(
    rb"\{'descr': '([<>|])([biuf]\d)', 'fortran_order': (True|False), 'shape': \((\d{1,10}), (\d{1,10})\), \}[ ]*\n"
)
_LONGEST_HEADER = 1024


class NotAMatrix(ValueError):
    """The bytes are not the matrix that was asked for; says why."""


def matrix(data: bytes, shape: tuple[int, int]) -> NDArray[np.floating]:
    """The finite, nowhere negative matrix of ``shape`` in an npy file (format 1.0 to 3.0, NumPy's ``lib.format``).

    Nothing is allocated by what the header says: its shape must be ``shape``, and its data as long as that needs.

    Raises:
        NotAMatrix: it is something else.
    """
    import numpy as np

    if data[:6] != _MAGIC or len(data) < 12:
        raise NotAMatrix("result.npy is no npy file")
    width = {(1, 0): 2, (2, 0): 4, (3, 0): 4}.get((data[6], data[7]))
    if width is None:
        raise NotAMatrix(f"result.npy is of the format {data[6]}.{data[7]}")
    start = 8 + width
    end = start + int.from_bytes(data[8:start], "little")
    header = _HEADER.fullmatch(data[start:end]) if end - start <= _LONGEST_HEADER else None
    if header is None:
        raise NotAMatrix("the header of result.npy is not that of a plain matrix of real numbers")
    order, kind, fortran, cells, genes = (part.decode() for part in header.groups())
    if kind not in _TYPES:
        raise NotAMatrix(f"result.npy holds the type {kind}")
    if (int(cells), int(genes)) != shape:
        raise NotAMatrix(f"the result is {cells} x {genes}, not {shape[0]} x {shape[1]}")
    size = int(kind[1:])
    if len(data) - end != shape[0] * shape[1] * size:
        raise NotAMatrix("result.npy is longer or shorter than its header says")
    dtype = np.dtype(kind if order == "|" else order + kind)
    values = np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if fortran == "True" else "C")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise NotAMatrix("the result is not finite everywhere")
    if (values < 0).any():
        raise NotAMatrix("the result is negative somewhere")
    return values
