"""The sandboxes of this machine: with all that it offers, and without namespaces."""

from __future__ import annotations

import pytest

from bascule.verifiers.sandbox.layered import LayeredSandbox


@pytest.fixture(params=[(), ("namespaces",)], ids=["all", "no-namespaces"])
def sandbox(request: pytest.FixtureRequest) -> LayeredSandbox:
    return LayeredSandbox(without=request.param)
