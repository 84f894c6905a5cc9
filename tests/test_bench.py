"""`lora_jax.bench.measure_step`: what it says of a step is what the step does."""

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax.bench import measure_step
from lora_jax.step import sum_of_losses
from tests import tiny


def test_a_step_is_measured(tmp_path):
    model = tiny.open_model(tiny.write_folder(tmp_path / "model"))
    lora_jax.get_peft_model(model, r=4, verbose=False)
    tiny.randomize_adapter(model)
    graph, lora, frozen = model.split()
    before = jax.device_get(lora)
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 3, 17), dtype=np.int32)
    loss_of = jax.jit(lambda row: sum_of_losses(graph, lora, frozen, {"input_ids": row, "labels": row}))
    sums = [loss_of(row) for row in ids]
    expected = sum(float(loss) for loss, _ in sums) / sum(int(count) for _, count in sums)
    times = measure_step(model, batch=3, length=17, accumulation=2, remat="full", steps=3, warmup=1)
    assert times.tokens == 2 * 3 * 17 and len(times.seconds) == 3 and min(times.seconds) > 0
    assert times.tokens_per_second == times.tokens / sorted(times.seconds)[1]
    np.testing.assert_allclose(times.losses, expected, rtol=1e-5)  # float32 sums in another order; steps of 2e-10
    # Arguments and results are there in any case: more than weights and the optimizer's two moments.
    assert times.program_bytes > sum(leaf.nbytes for leaf in jax.tree.leaves((frozen, lora, lora, lora)))
    assert times.plan == "full"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), model.split()[1], before)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"batch": 0}, "at least 1"), ({"length": 1}, "at least 2"), ({"length": 257}, "256 positions")]
)
def test_shapes_that_make_no_sense(wrong, said, tmp_path):
    model = tiny.open_model(tiny.write_folder(tmp_path / "model"))
    with pytest.raises(ValueError, match=said):
        measure_step(model, **{"batch": 1, "length": 16, **wrong})
