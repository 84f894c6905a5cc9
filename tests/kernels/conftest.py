"""What interpret mode lets pass and a GPU does not."""

import pytest
from jax.experimental.pallas import triton as plgpu


@pytest.fixture(autouse=True)
def dots_that_a_gpu_computes(monkeypatch):
    """Triton compiles a dot over fewer than 16 elements to wrong numbers, without a word."""
    dot = plgpu.dot

    def checked(x, y, trans_a=False, trans_b=False, **kwargs):
        (m, k), n = x.shape[:: -1 if trans_a else 1], y.shape[0 if trans_b else 1]
        assert min(m, n, k) >= 16, f"a dot of [{m}, {k}] and [{k}, {n}]"
        return dot(x, y, trans_a=trans_a, trans_b=trans_b, **kwargs)

    monkeypatch.setattr(plgpu, "dot", checked)
