"""A kernel that cannot be built ends the launch with the file to remove, instead of keeping every rank waiting."""

import sys

import pytest

from launch import kernels
from launch.errors import LaunchError


def test_a_build_that_does_not_end_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(LaunchError, match=f"deepspeed_shm_comm/lock .*{tmp_path}"):
        kernels.build_kernels(timeout=0.5)
