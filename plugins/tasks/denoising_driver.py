"""Runs in the sandbox beside a candidate's ``denoise.py``: ``driver.py SEED BUDGET``.

It is the candidate's process, so nothing here is trusted: what counts are the bytes of ``result.npy``.
"""

import importlib.util
import sys

import numpy as np

counts = np.load("counts.npy", allow_pickle=False)
spec = importlib.util.spec_from_file_location("denoise", "denoise.py")
assert spec is not None and spec.loader is not None  # noqa: PT018
module = importlib.util.module_from_spec(spec)
sys.modules["denoise"] = module
spec.loader.exec_module(module)
found = module.denoise(counts, int(sys.argv[1]), float(sys.argv[2]))
# A subclass could say of itself what it likes; its plain numbers are saved, in the precision that the score needs.
plain = np.array(found, subok=False)
if plain.dtype.kind in "biuf":
    plain = plain.astype("<f4")
np.save("result.npy", plain, allow_pickle=False)
