"""What the forward pass of a layer keeps for its backward pass.

Backward needs the intermediate values of every layer. Keeping all of them is fastest and takes the most memory; keeping
none but each layer's input and computing the layer again takes the least. Between them, `selective` keeps the results
of the large matmuls and of attention and recomputes what is cheap: norms, activations, adapters.
"""

import functools
from collections.abc import Callable

import jax

__all__ = ["PRESETS", "checkpoint_wrapper"]

# Names are given to tensors by `checkpoint_name`: in models/decoder.py, and in kernels/attention for "attention" and
# its log-sum-exp, without which the attention kernel would run again.
_SELECTIVE = ("q", "k", "v", "attention", "attention_lse", "residual", "gate", "up")
PRESETS = ("none", "selective", "full")


def checkpoint_wrapper(remat: str) -> Callable | None:
    """The wrapper for the function of one layer.

    Args:
      remat: "none" keeps everything, "selective" the results of large matmuls and attention, "full" recomputes all.

    Raises:
      ValueError: unknown preset.
    """
    if remat == "none":
        return None
    if remat == "full":
        policy = jax.checkpoint_policies.nothing_saveable
    elif remat == "selective":
        policy = jax.checkpoint_policies.save_only_these_names(*_SELECTIVE)
    else:
        raise ValueError(f"remat={remat!r} is unknown; known are {', '.join(PRESETS)}")
    # Inside a scan the compiler cannot merge the recomputation with the forward pass, so no barrier is needed.
    return functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
