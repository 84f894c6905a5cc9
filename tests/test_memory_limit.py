"""The limit for a process's share of its GPU."""

import os
import stat

import jax
import pytest

from lora_jax.memory_limit import BESIDE_THE_POOL, limit_memory

GIB = 2**30


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A GPU of 80 GiB, as far as nvidia-smi and JAX say; returns what JAX says of its pool, to change."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "81920"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    stats = {}

    class Device:
        def memory_stats(self):
            return stats or {"bytes_limit": int(float(os.environ["XLA_CLIENT_MEM_FRACTION"]) * 80 * GIB)}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    return stats


def test_the_pool_is_what_the_limit_leaves(card):
    limit_memory("12GB")
    assert float(os.environ["XLA_CLIENT_MEM_FRACTION"]) * 80 * GIB == pytest.approx(
        12 * GIB - BESIDE_THE_POOL, rel=1e-3
    )


def test_a_limit_that_comes_too_late(card):
    card["bytes_limit"] = 60 * GIB
    with pytest.raises(
        RuntimeError, match=r"JAX took 60.0 GiB of the GPU before the limit was set. Set it first: call"
    ):
        limit_memory("12GB")


@pytest.mark.parametrize(
    ("limit", "message"),
    [("1GB", "take 0.75 GiB; allow more"), ("100GB", "the GPU has 80.0 GiB"), ("much", "wanted bytes, or a number")],
)
def test_limits_that_make_no_sense(card, limit, message):
    with pytest.raises(ValueError, match=message):
        limit_memory(limit)


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="nvidia-smi was not found"):
        limit_memory("12GB")
