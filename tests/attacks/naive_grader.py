"""A grader of kernels as they are often written: one process for kernel and clock, inputs made once, the reference on
them last, compared by whatever torch says. Run unconfined as the control of attacks on clocks.
"""

import json
import time

import torch
from reference import custom_kernel as reference

B, N, D, H = 1, 48, 64, 128


def inputs():
    random = torch.Generator().manual_seed(1)
    weights = {"norm.weight": torch.randn(D, generator=random), "norm.bias": torch.randn(D, generator=random)}
    for name in ("left_proj", "right_proj", "left_gate", "right_gate", "out_gate"):
        weights[f"{name}.weight"] = torch.randn(H, D, generator=random) / H**0.5
    weights |= {f"to_out_norm.{n}": torch.randn(H, generator=random) for n in ("weight", "bias")}
    weights["to_out.weight"] = torch.randn(D, H, generator=random) / D**0.5
    x = torch.randn(B, N, N, D, generator=random)
    return x, torch.ones(B, N, N), weights, {"dim": D, "hidden_dim": H}


def timed(kernel, data, calls=5):
    out = kernel(data)
    begin = time.perf_counter()
    for _ in range(calls):
        out = kernel(data)
    return out, (time.perf_counter() - begin) / calls


torch.set_num_threads(1)
with torch.no_grad():
    given = inputs()
    _, slow = timed(reference, given)
    from kernel import custom_kernel

    found, fast = timed(custom_kernel, given)
    right = torch.allclose(found, reference(given), rtol=2e-2, atol=2e-2)
print(json.dumps({"right": bool(right), "factor": slow / max(fast, 1e-9)}))
