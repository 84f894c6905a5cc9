"""How an implementation is chosen."""

import json
import types

import jax
import pytest

from lora_jax.kernels import dispatch
from lora_jax.kernels.dispatch import resolve, using

SUPPORTED = {"xla": None, "triton": None, "mosaic": "it needs a Hopper GPU"}


def test_the_first_preference_that_can_is_taken():
    assert resolve("op", None, SUPPORTED, ("mosaic", "triton", "xla")) == "triton"
    assert resolve("op", "xla", SUPPORTED, ("mosaic", "triton", "xla")) == "xla"


def test_a_named_implementation_never_falls_back():
    with pytest.raises(NotImplementedError, match="op: implementation='mosaic' cannot do this call: it needs a Hopper"):
        resolve("op", "mosaic", SUPPORTED, ("xla",))
    with pytest.raises(ValueError, match="known are xla, triton, mosaic"):
        resolve("op", "cuda", SUPPORTED, ("xla",))


def test_using_names_what_a_call_leaves_open():
    with using(op="triton", other="xla"):
        assert resolve("op", None, SUPPORTED, ("xla",)) == "triton"
        assert resolve("op", "xla", SUPPORTED, ("xla",)) == "xla"  # the call's own word comes first
        with using(op="mosaic"), pytest.raises(NotImplementedError):
            resolve("op", None, SUPPORTED, ("xla",))
        assert resolve("op", None, SUPPORTED, ("xla",)) == "triton"
    assert resolve("op", None, SUPPORTED, ("xla",)) == "xla"


def test_a_reason_is_asked_for_only_where_it_matters():
    asked = []

    def why(name, reason):
        return lambda: asked.append(name) or reason

    supported = {"xla": None, "triton": why("triton", "no"), "mosaic": why("mosaic", None)}
    assert resolve("op", None, supported, ("triton", "xla")) == "xla"
    assert asked == ["triton"]
    with using(op="triton"), pytest.raises(NotImplementedError, match="cannot do this call: no"):
        resolve("op", None, supported, ("xla",))
    assert asked == ["triton", "triton"]


def test_the_users_own_measurements_come_first(monkeypatch, tmp_path):
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("LORA_JAX_TUNING", str(file))
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="NVIDIA X1")])
    ask = dispatch.tuning.__wrapped__  # without the cache
    assert ask("op") == ()  # no GPU
    monkeypatch.setattr(dispatch, "default_platform", lambda: "gpu")
    assert ask("op") == ()  # no measurements
    file.write_text(json.dumps({"NVIDIA X1": {"op": [{"n": 1}]}, "NVIDIA X2": {"op": [{"n": 2}]}}))
    assert ask("op") == ({"n": 1},)
    assert ask("other") == ()
    for damaged in ("{", "[]"):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"tuning.json is not a table of tunings .*delete it, or measure again"):
            ask("op")
