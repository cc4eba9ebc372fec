"""Shared by all tests: results and runs go to a temporary folder, wandb stays offline, and Triton runs in its interpreter."""

import os

import pytest

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def output_root(tmp_path, monkeypatch):
    """artifacts/, runs/ and book/ of a test lie in its own temporary folder."""
    root = tmp_path / "output"
    monkeypatch.setenv("LMSYS_OUTPUT", str(root))
    monkeypatch.delenv("LMSYS_MACHINE", raising=False)
    monkeypatch.delenv("LMSYS_SCALE", raising=False)
    return root
