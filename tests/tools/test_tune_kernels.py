"""The table that tuning makes of its measurements."""

from lora_jax.tools.tune_kernels import table_rows


def test_a_form_holds_until_half_way_to_the_next_measurement():
    few = {"forward": "triton_in_loop", "dx": "triton", "tiles": {"shuffle": True}}
    many = {"forward": "triton", "dx": "triton"}
    assert table_rows([(1, few), (16, few), (64, many), (4096, many)]) == [{"m": 32, **few}, {"m": None, **many}]
    assert table_rows([(8, many)]) == [{"m": None, **many}]
