"""Programs of the task ``trimul``: the reference, two baselines, and the harness that searches start from.

They are texts because they are answers: each defines ``custom_kernel`` and runs in the sandbox as any candidate does.
The maths is that of AlphaFold 2 (Jumper et al. 2021, supplementary algorithm 11, "outgoing" edges) without biases in
the projections.
"""

from __future__ import annotations

from bascule.plugins.tasks.harness_files import manifest_text
from bascule.schemas.harness import HarnessManifest

#: The definition, as PyTorch's own operations. Every speed-up is over this.
REFERENCE = """\
import torch
import torch.nn.functional as F


def custom_kernel(data):
    x, mask, weights, config = data
    x = F.layer_norm(x, (config["dim"],), weights["norm.weight"], weights["norm.bias"])
    mask = mask.unsqueeze(-1)
    left = F.linear(x, weights["left_proj.weight"]) * mask * torch.sigmoid(F.linear(x, weights["left_gate.weight"]))
    right = F.linear(x, weights["right_proj.weight"]) * mask * torch.sigmoid(F.linear(x, weights["right_gate.weight"]))
    gate = torch.sigmoid(F.linear(x, weights["out_gate.weight"]))
    out = torch.einsum("bikd,bjkd->bijd", left, right)
    out = F.layer_norm(out, (config["hidden_dim"],), weights["to_out_norm.weight"], weights["to_out_norm.bias"])
    return F.linear(out * gate, weights["to_out.weight"])
"""

#: Row by row, as one would write it down first.
NAIVE = """\
import torch
import torch.nn.functional as F


def custom_kernel(data):
    x, mask, weights, config = data
    batch, n, _, dim = x.shape
    hidden = config["hidden_dim"]
    left, right, gate = (torch.empty(batch, n, n, hidden) for _ in range(3))
    for b in range(batch):
        for i in range(n):
            row = F.layer_norm(x[b, i], (dim,), weights["norm.weight"], weights["norm.bias"])
            keep = mask[b, i].unsqueeze(-1)
            for side, name in ((left, "left"), (right, "right")):
                value = row @ weights[f"{name}_proj.weight"].t()
                side[b, i] = value * keep * torch.sigmoid(row @ weights[f"{name}_gate.weight"].t())
            gate[b, i] = torch.sigmoid(row @ weights["out_gate.weight"].t())
    out = torch.empty(batch, n, n, dim)
    for b in range(batch):
        for i in range(n):
            both = (left[b, i] * right[b]).sum(dim=1)
            both = F.layer_norm(both, (hidden,), weights["to_out_norm.weight"], weights["to_out_norm.bias"])
            out[b, i] = (both * gate[b, i]) @ weights["to_out.weight"].t()
    return out
"""

#: One matrix product for the five projections, gates in place, channels first for the contraction.
FUSED = """\
import torch
import torch.nn.functional as F

NAMES = ("left_proj", "right_proj", "left_gate", "right_gate", "out_gate")


def custom_kernel(data):
    x, mask, weights, config = data
    batch, n, _, dim = x.shape
    hidden = config["hidden_dim"]
    rows = F.layer_norm(x, (dim,), weights["norm.weight"], weights["norm.bias"]).view(-1, dim)
    found = torch.cat([weights[f"{name}.weight"] for name in NAMES]) @ rows.t()
    both = found[: 2 * hidden].mul_(found[2 * hidden : 4 * hidden].sigmoid_()).mul_(mask.view(1, -1))
    left, right = both.view(2, hidden, batch, n, n)
    out = torch.matmul(left, right.transpose(-1, -2)).view(hidden, -1).t().contiguous()
    out = F.layer_norm(out, (hidden,), weights["to_out_norm.weight"], weights["to_out_norm.bias"])
    out.mul_(found[4 * hidden :].sigmoid_().t())
    return F.linear(out, weights["to_out.weight"]).view(batch, n, n, dim)
"""

#: The reference harness's kernel: right, and slower than the reference until its parameters are searched.
START = '''\
"""Triangle multiplicative update, outgoing, in blocks of rows; what could be done otherwise is a parameter.

- block: rows of the pair representation that are projected at a time.
- projections: five matrix products ("separate"), or one with the matrices joined ("joined").
- layout: of what is projected: "rows" of channels, or "channels" first as the contraction wants them.
- gates: into "new" tensors, or where their factors lie ("in_place").
- contraction: over k for each channel by itself ("loop"), or for all at once ("batched", "einsum").
"""

import torch
import torch.nn.functional as F

PARAMS = {"block": 32, "projections": "separate", "layout": "rows", "gates": "new", "contraction": "loop"}
TUNABLE = {
    "block": {"low": 16, "high": 8192, "integer": True, "log": True},
    "projections": {"values": ["separate", "joined"]},
    "layout": {"values": ["rows", "channels"]},
    "gates": {"values": ["new", "in_place"]},
    "contraction": {"values": ["loop", "batched", "einsum"]},
}
NAMES = ("left_proj", "right_proj", "left_gate", "right_gate", "out_gate")


def projected(part, matrices, hidden):
    """The five projections of a block, each [hidden, block]."""
    if PARAMS["layout"] == "channels":
        found = [matrix @ part.t() for matrix in matrices]
        return found[0].split(hidden, dim=0) if len(found) == 1 else found
    found = [part @ matrix.t() for matrix in matrices]
    return [f.t() for f in (found[0].split(hidden, dim=1) if len(found) == 1 else found)]


def gated(value, gate, keep):
    if PARAMS["gates"] == "in_place":
        return gate.sigmoid_().mul_(value).mul_(keep)
    return torch.sigmoid(gate) * value * keep


def joined(parts, along):
    return torch.cat(parts, dim=along) if len(parts) > 1 else parts[0]


def contracted(left, right):
    """[hidden, batch, i, k] and [hidden, batch, j, k] to [hidden, batch, i, j]."""
    if PARAMS["contraction"] == "loop":
        return torch.stack([a @ b.transpose(-1, -2) for a, b in zip(left, right)])
    if PARAMS["contraction"] == "einsum":
        return torch.einsum("dbik,dbjk->dbij", left, right)
    return torch.matmul(left, right.transpose(-1, -2))


def custom_kernel(data):
    x, mask, weights, config = data
    batch, n, _, dim = x.shape
    hidden = config["hidden_dim"]
    rows, keep = x.reshape(-1, dim), mask.reshape(1, -1)
    count = rows.shape[0]
    matrices = [weights[f"{name}.weight"] for name in NAMES]
    if PARAMS["projections"] == "joined":
        matrices = [torch.cat(matrices)]
    blocks = [slice(i, i + PARAMS["block"]) for i in range(0, count, PARAMS["block"])]
    parts = []
    for block in blocks:
        part = F.layer_norm(rows[block], (dim,), weights["norm.weight"], weights["norm.bias"])
        values = projected(part, matrices, hidden)
        left = gated(values[0], values[2], keep[:, block])
        right = gated(values[1], values[3], keep[:, block])
        parts.append((left, right, torch.sigmoid(values[4])))
    left, right, gate = (joined(side, 1) for side in zip(*parts))
    shape = (hidden, batch, n, n)
    both = contracted(left.reshape(shape), right.reshape(shape)).reshape(hidden, count)
    parts = []
    for block in blocks:
        part = both[:, block].t()
        part = F.layer_norm(part, (hidden,), weights["to_out_norm.weight"], weights["to_out_norm.bias"])
        parts.append(part.mul_(gate[:, block].t()) @ weights["to_out.weight"].t())
    out = joined(parts, 0)
    return out.view(batch, n, n, dim)
'''

_HARNESS = '''\
"""Answers with the text of kernel.py; asks no model."""


def solve(example, model, tools, context):
    return context.file("kernel.py")
'''


def harness_files() -> dict[str, str]:
    """The reference harness: what it answers is its own file ``kernel.py``."""
    return {
        "harness.py": _HARNESS,
        "kernel.py": START,
        "manifest.json": manifest_text(HarnessManifest(name="kernel")),
        "system_prompt.md": "Write a fast kernel for the triangle multiplicative update.\n",
    }
