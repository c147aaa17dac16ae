"""Safetensors read and written without trust: strict headers in, the same bytes out for the same tensors.

The format: an 8-byte little-endian header length, a JSON header that maps names to dtype, shape and offsets, then the
data (https://github.com/huggingface/safetensors). The reference writer orders metadata by a randomised hash, so that
equal tensors may give unequal files; this one sorts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bascule.schemas.errors import TrainError

MAX_HEADER = 100_000_000
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in the header; ``begin`` and ``end`` are offsets into the data section."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialise floating-point tensors; the bytes depend on names, values and metadata alone."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data aligned to 8 bytes, as the reference writer does
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def read_header(data: bytes, source: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Check a file's header against its length.

    Args:
        data: the whole file.
        source: named in errors.

    Returns:
        The tensors' entries, and the metadata.

    Raises:
        TrainError: the header is too long, is no JSON object of the format, names a tensor twice, or its tensors
            overlap, leave gaps, or lie outside the file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER or 8 + length > len(data):
        raise _bad(source, f"its header length is {length} in a file of {len(data)} bytes")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(source, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(source, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(source, "its metadata is not a map of strings")
    infos = {name: _info(entry, name, source) for name, entry in header.items()}
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            raise _bad(source, f"tensor {name!r} starts at {info.begin}, where {end} was due")
        end = info.end
    if 8 + length + end != len(data):
        raise _bad(source, f"its tensors end at {8 + length + end} of {len(data)} bytes")
    return infos, metadata


def read_tensors(data: bytes, source: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Parse a checked file; tensors are copies on the CPU.

    Raises:
        TrainError: as :func:`read_header`.
    """
    infos, metadata = read_header(data, source)
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, info in infos.items():
        raw = bytearray(data[start + info.begin : start + info.end])
        flat = torch.frombuffer(raw, dtype=info.dtype) if raw else torch.empty(0, dtype=info.dtype)
        tensors[name] = flat.reshape(info.shape)
    return tensors, metadata


def _info(entry: object, name: str, source: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(source, f"tensor {name!r} has an entry of another form")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _bad(source, f"tensor {name!r} has dtype {dtype!r}, not one of {', '.join(_DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _bad(source, f"tensor {name!r} has a shape or offsets that are no natural numbers")
    begin, end = offsets
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise _bad(source, f"tensor {name!r} of shape {shape} and dtype {dtype} does not fill {end - begin} bytes")
    return TensorInfo(_DTYPES[dtype], tuple(shape), begin, end)


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _bad(source: str, reason: str) -> TrainError:
    return TrainError(
        f"{source} is not a usable safetensors file: {reason}.", next_step="Take the file from its origin again."
    )
