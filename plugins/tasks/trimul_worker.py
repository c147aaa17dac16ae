"""The program that runs a kernel of the task ``trimul``: ``python worker.py kernel.py MODE`` in the sandbox.

MODE is ``reference``, ``candidate``, or ``interpret`` for Triton's interpreter.

Nobody imports this file; its text is sent into the sandbox, so it uses the standard library and torch only. The same
text runs the reference and the candidate. In the candidate's process nothing here can be relied on once the kernel's
code has run, for it may have changed anything: what matters is measured and compared in the scoring process, from the
moment at which bytes come.

Frames come on standard input: 4 bytes big-endian length, one byte of what to do, and data.

- ``P`` and JSON: make the inputs of a call, all but what ``G`` brings.
- ``G`` and 2 D float32: scale and shift of each channel of ``x``. Only with them can the work begin; it ends with a
  reply that holds the SHA-256 of the output's bytes, so that nothing can be computed afterwards.
- ``O``: send the output's bytes.

Replies are JSON padded with spaces to 512 bytes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

REPLY_BYTES = 512
#: How long products are timed for the peak rate, s, and over how many steps of the clock of processor time.
PEAK_SECONDS, PEAK_STEPS = 0.1, 20
#: No core does so many operations a second.
PLAUSIBLE = 1e13
PROJECTIONS = ("left_proj", "right_proj", "left_gate", "right_gate", "out_gate")


def inputs(torch: Any, spec: dict[str, Any]) -> tuple[Any, Any, dict[str, Any], dict[str, int]]:
    """``x`` [B, N, N, D] before scale and shift, ``mask`` [B, N, N], the weights by name, the sizes; from the seed."""
    random = torch.Generator().manual_seed(spec["seed"])
    batch, n, dim, hidden = spec["batch"], spec["n"], spec["dim"], spec["hidden"]
    x = torch.empty(batch, n, n, dim).normal_(generator=random)
    if spec["distribution"] == "cauchy":
        # The ratio of two normal variables is a Cauchy variable, and quicker than torch's own.
        # Its tails are cut at a million, beyond which float32 cannot hold a variance; one in 800,000 is so large. A
        # normal variable in float32 is exactly 0 once in some ten millions.
        x.div_(torch.empty_like(x).normal_(generator=random)).mul_(2.0).nan_to_num_(nan=0.0).clamp_(-1e6, 1e6)
    mask = torch.ones(batch, n, n)
    if spec["masked"]:
        mask = torch.randint(0, 2, (batch, n, n), generator=random).to(torch.float32)

    def normal(*shape: int, over: int = 1) -> Any:
        return torch.randn(*shape, generator=random) / math.sqrt(over)

    weights = {"norm.weight": normal(dim), "norm.bias": normal(dim)}
    weights |= {f"{name}.weight": normal(hidden, dim, over=hidden) for name in PROJECTIONS}
    weights |= {"to_out_norm.weight": normal(hidden), "to_out_norm.bias": normal(hidden)}
    weights["to_out.weight"] = normal(dim, hidden, over=dim)
    return x, mask, weights, {"dim": dim, "hidden_dim": hidden}


def fault(torch: Any, out: Any, shape: Any) -> str:
    """What is wrong with the form of an output; empty if nothing is."""
    if type(out) is not torch.Tensor:
        return f"the output is a {type(out).__name__}, not a torch.Tensor"
    if out.dtype != torch.float32 or out.layout != torch.strided or out.device.type != "cpu":
        return f"the output is {out.dtype}, {out.layout} on {out.device}, not dense float32 on the CPU"
    if out.shape != shape:
        return f"the output has the shape {tuple(out.shape)}, not {tuple(shape)}"
    if not out.is_contiguous() or out.storage_offset() or out.untyped_storage().nbytes() != 4 * out.numel():
        return "the output is not contiguous, or a part of a larger tensor"
    return ""


def changed(torch: Any, data: tuple[Any, ...], kept: tuple[Any, ...]) -> bool:
    """Whether a call left its inputs other than they were."""
    same = torch.equal(data[0], kept[0]) and torch.equal(data[1], kept[1]) and data[3] == kept[3]
    return not same or list(data[2]) != list(kept[2]) or any(not torch.equal(data[2][k], v) for k, v in kept[2].items())


def copied(data: tuple[Any, ...]) -> tuple[Any, ...]:
    x, mask, weights, sizes = data
    return x.clone(), mask.clone(), {k: v.clone() for k, v in weights.items()}, dict(sizes)


def tick(clock: Callable[[], float], steps: int = 5) -> float:
    """The least step of a clock of processor time, s; 1.0 for one that hardly moves.

    Some kernels count processor time in ticks of a scheduler, 1 to 10 ms, whatever the clock says of itself; and so
    does Linux that of a process whose processor time is limited, which a thread's is not.
    """
    found, until = 1.0, time.perf_counter() + 10.0
    for _ in range(steps):
        before = now = clock()
        while now == before:
            if time.perf_counter() > until:
                return found
            now = clock()
        found = min(found, now - before)
    return found


def peak(torch: Any, step: float) -> float:
    """The most floating-point operations a second that this core gives in a matrix product, in any usual format.

    Wall time understates it on a busy core, processor time overstates it where its clock is coarse: the largest rate
    counts that is plausible, and processor time only over many steps of its clock.

    Args:
        step: of the clock of processor time, s; see :func:`tick`.
    """
    n, best = 512, 0.0
    operations = 2.0 * n**3
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(n, n, dtype=dtype)
        a @ a  # the first one makes buffers
        products, start, before = 0, time.perf_counter(), time.thread_time()
        wall = cpu = 0.0
        while wall < PEAK_SECONDS or (cpu < PEAK_STEPS * step and wall < 40 * PEAK_SECONDS):
            one = time.perf_counter()
            a @ a
            products += 1
            now = time.perf_counter()
            wall, cpu = now - start, time.thread_time() - before
            rates = [operations / max(now - one, 1e-9), products * operations / max(wall, 1e-9)]
            if cpu > 0 and cpu >= PEAK_STEPS * step:
                rates.append(products * operations / cpu)
            best = max([best, *(rate for rate in rates if rate < PLAUSIBLE)])
    return best


def load(path: str) -> Any:
    """``custom_kernel`` of the file."""
    spec = importlib.util.spec_from_file_location("kernel", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel"] = module
    spec.loader.exec_module(module)
    return module.custom_kernel


def told(what: str, error: BaseException) -> str:
    """Short enough for a reply, whatever the error says."""
    text = f"{what}: {type(error).__name__}: {error}".encode("ascii", "replace").decode()
    return "".join(c if c.isprintable() and c not in '\\"' else "?" for c in text)[:200]


def main(path: str, mode: str) -> None:
    # The protocol gets descriptors of its own: what a kernel prints goes nowhere.
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "r+b") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    if mode == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    with torch.no_grad():
        if mode == "reference":
            step = tick(time.thread_time)
            reply(sink, ok=True, peak=peak(torch, step), tick=step)
        else:
            reply(sink, ok=True)
        try:
            kernel = load(path)
        except BaseException as e:
            reply(sink, ok=False, why=told("kernel.py cannot be loaded", e))
            return
        reply(sink, ok=True)
        serve(torch, kernel, source, sink)


def serve(torch: Any, kernel: Any, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer frames until there are no more."""
    given: Any = None
    out: Any = None
    spec: dict[str, Any] = {}
    while (frame := read(source)) is not None:
        what, body = frame[:1], frame[1:]
        if what == b"P":
            spec = json.loads(body)
            out, given = None, inputs(torch, spec)
            reply(sink, ok=True)
        elif what == b"G":
            before = time.thread_time()
            x, mask, weights, sizes = given
            scale, shift = torch.frombuffer(bytearray(body), dtype=torch.float32).view(2, -1)
            data = (x.mul_(scale).add_(shift), mask, weights, sizes)
            kept = copied(data) if spec["check"] else None
            digest = ""
            try:
                out = kernel(data)
                why = fault(torch, out, data[0].shape)
                digest = "" if why else hashlib.sha256(out.numpy()).hexdigest()
            except Exception as e:
                why = told("the kernel failed", e)
            if not why and kept is not None and changed(torch, data, kept):
                why = "the kernel changed its inputs"
            reply(sink, ok=not why, why=why, sha256=digest, cpu=time.thread_time() - before)
        else:
            sink.write(out.numpy())
            sink.flush()


def read(source: BinaryIO) -> bytes | None:
    size = source.read(4)
    return source.read(int.from_bytes(size, "big")) if len(size) == 4 else None


def reply(sink: BinaryIO, **fields: Any) -> None:
    sink.write(json.dumps(fields).encode("ascii", "replace")[:REPLY_BYTES].ljust(REPLY_BYTES))
    sink.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
