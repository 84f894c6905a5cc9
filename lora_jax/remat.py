"""What the forward pass of each layer keeps for its backward pass, as data.

Backward needs the intermediate values of every layer. Keeping all of them is fastest and takes the most memory; keeping
none but each layer's input and computing the layer again takes the least. Between them lies a plan: for every group of
consecutive layers, which named tensors are saved, kept in 8 bits, moved to the host's memory, or computed again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.config import did_you_mean
from lora_jax.kernels.attention.attention import IMPLEMENTATIONS
from lora_jax.kernels.kept import Policy

__all__ = ["ACTIONS", "ALL", "NAMES", "PRESETS", "QUANTIZABLE", "RematPlan"]

# What `checkpoint_name` calls the tensors of a layer: in models/decoder.py, and in the kernels for what only they see.
# Without its log-sum-exp a saved attention is of no use, the kernel would run again. "thin" are the products of
# adapters' A with their inputs: a few numbers for each token, which take a pass over its whole input to make.
NAMES = ("input", "q", "k", "v", "attention", "attention_lse", "residual", "gate", "up", "thin")
# Not attention_lse, which an exponential function is taken of, nor thin, which is small and holds numbers of experts.
QUANTIZABLE = tuple(name for name in NAMES if name not in ("attention_lse", "thin"))
ACTIONS = ("save", "recompute", "offload", "save_quantized")
ALL = "*"  # in place of a name: every value, named or not

Actions = tuple[tuple[str, str], ...]  # (name, action) in the order of NAMES; what is not listed is computed again


@dataclasses.dataclass(frozen=True)
class RematPlan:
    """What to keep, by groups of consecutive layers from the first layer on. Hashable.

    Each group is (number of layers, {name: action}). The number is None in the last group for "all that are left". A
    name is one of NAMES, the action one of:

    * "save": it stays in the device's memory from forward to backward;
    * "save_quantized": it is kept in 8 bits, 53 % of the bytes of bfloat16, and backward reads the rounded tensor: the
      loss stays as it is, gradients are a little off (lora_jax.tools.quantized_activations says by how much);
    * "offload": it is copied to the host's memory (pinned) and back; the device keeps one layer's copy;
    * "recompute": backward computes it again from what was kept. So it is with every name that is not listed.

    "input", the layer's input, must be kept: it is saved unless the plan says otherwise. Whatever is computed again is
    computed from it, so if it is rounded, so are they. `{"*": "save"}` keeps every value that backward needs, named or
    not, so that nothing is computed again; for a part of the layers it copies their weights.

    With `mlp_rows` the feed-forward layers compute so many tokens at a time, so that the largest arrays of a long row
    exist in part only, and their weights are decoded for every part. It is for plans that recompute gate and up.

    `flash_attention` names attention's implementation, where it is not to be the fastest: on long rows cuDNN's backward
    pass needs more memory than "mosaic".

    Raises:
      ValueError: an unknown name or action, a name that is not kept in 8 bits (only QUANTIZABLE are), or numbers of
        layers that make no sense.
    """

    groups: tuple[tuple[int | None, Actions | Mapping[str, str]], ...]
    mlp_rows: int | None = None
    flash_attention: str | None = None

    def __post_init__(self):
        """Brings groups that mean the same into the same form."""
        if not self.groups:
            raise ValueError("a rematerialisation plan needs at least one group of layers, got none")
        groups = []
        for place, (count, actions) in enumerate(self.groups):
            if count is None and place + 1 < len(self.groups):
                raise ValueError(f"only the last of {len(self.groups)} groups may be of all layers that are left")
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise ValueError(f"a group of layers needs a number of at least 1 or None (all left), got {count!r}")
            groups.append((count, _canonical(dict(actions))))
        object.__setattr__(self, "groups", tuple(groups))
        rows = self.mlp_rows
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ValueError(f"mlp_rows is a number of tokens, at least 1, or None for all at once, got {rows!r}")
        if self.flash_attention not in (None, *IMPLEMENTATIONS):
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"flash_attention={self.flash_attention!r} is unknown; known are {known}")

    @classmethod
    def of(cls, value: "str | RematPlan | Sequence[Mapping[str, Any]]") -> "RematPlan":
        """A plan from the name of a preset or from what a YAML file holds.

        A YAML file holds a list of groups; `layers` is a number or `rest`, the other keys are names:

            - {layers: 8, gate: save, up: save, attention: save, attention_lse: save}
            - {layers: rest, input: offload}
            - {mlp_rows: 8192}
            - {flash_attention: mosaic}

        Raises:
          ValueError: no preset of that name, or something that is not such a list.
        """
        if isinstance(value, RematPlan):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise ValueError(
                    f"remat={value!r} is unknown; known are {', '.join(PRESETS)}, and lists of groups."
                    f"{did_you_mean(value, [*PRESETS, 'auto'])}"
                )
            return PRESETS[value]
        if not isinstance(value, Sequence) or not all(isinstance(group, Mapping) for group in value):
            raise ValueError(f"remat={value!r}: wanted a preset ({', '.join(PRESETS)}) or a list of groups of layers")
        groups, more = [], {}
        for group in value:
            if set(group) in ({"mlp_rows"}, {"flash_attention"}):
                more |= group
                continue
            count = group.get("layers")
            if count is None:
                raise ValueError(f"remat: the group {dict(group)} does not say of how many `layers`; a number or rest")
            actions = {name: action for name, action in group.items() if name != "layers"}
            groups.append((None if count == "rest" else count, actions))
        return cls(tuple(groups), **more)

    def to_list(self) -> list[dict[str, Any]]:
        """The plan as `of` reads it."""
        groups = [{"layers": "rest" if count is None else count, **dict(actions)} for count, actions in self.groups]
        more = {"mlp_rows": self.mlp_rows, "flash_attention": self.flash_attention}
        return [*groups, *({name: value} for name, value in more.items() if value is not None)]

    def __str__(self) -> str:
        """The name of the preset it is, or its groups in words."""
        if self.flash_attention is not None:
            return f"{RematPlan(self.groups, self.mlp_rows)}; attention by {self.flash_attention}"
        if self.mlp_rows is not None:
            return f"{RematPlan(self.groups)}; feed-forward layers {self.mlp_rows} tokens at a time"
        for name, preset in PRESETS.items():
            if preset == self:
                return name
        rest = "all layers" if len(self.groups) == 1 else "the rest"
        return "; ".join(_in_words(f"{count} layers" if count else rest, dict(a)) for count, a in self.groups)

    @property
    def offloads(self) -> bool:
        """Whether something goes to the host's memory."""
        return any(action == "offload" for _, actions in self.groups for action in dict(actions).values())

    def resolve(self, num_layers: int) -> list[tuple[int, dict[str, str]]]:
        """The groups of a model of `num_layers` layers: (number of layers, {name: action}).

        Raises:
          ValueError: the plan is for another number of layers.
        """
        fixed = sum(count or 0 for count, _ in self.groups)
        left = num_layers - fixed if self.groups[-1][0] is None else 0
        if left < 0 or (self.groups[-1][0] is not None and fixed != num_layers):
            raise ValueError(
                f"the rematerialisation plan has groups of {fixed} layers, the model has {num_layers}; give the last "
                "group the layers `rest`, or numbers that add up"
            )
        groups = [(left if count is None else count, dict(actions)) for count, actions in self.groups]
        return [group for group in groups if group[0]]

    def wrappers(self, num_layers: int) -> list[tuple[int, Callable | None]]:
        """For each group of layers, how many there are and what wraps the function of one layer (None: nothing).

        Raises:
          ValueError: the plan is for another number of layers.
        """
        return [(count, _wrapper(actions)) for count, actions in self.resolve(num_layers)]


def _canonical(actions: Mapping[str, str]) -> Actions:
    known = (*NAMES, ALL)
    for name, action in actions.items():
        if name not in known:
            raise ValueError(f"rematerialisation: {name!r} names no tensor of a layer; there are {', '.join(known)}")
        if action not in ACTIONS:
            raise ValueError(f"rematerialisation: {name}: {action!r} is unknown; there are {', '.join(ACTIONS)}")
        if action == "save_quantized" and name not in QUANTIZABLE:
            raise ValueError(
                f"rematerialisation: {name!r} is not kept in 8 bits, only {', '.join(QUANTIZABLE)} are; save it"
            )
    if ALL in actions:
        if dict(actions) != {ALL: "save"}:
            raise ValueError(f'rematerialisation: "{ALL}" goes alone and with "save" only, got {dict(actions)}')
        return ((ALL, "save"),)
    if actions.get("input") == "recompute":
        raise ValueError("rematerialisation: a layer's input is what the layer is computed from: save or offload it")
    kept = {"input": "save", **actions}
    return tuple((name, kept[name]) for name in NAMES if kept.get(name, "recompute") != "recompute")


def _in_words(where: str, actions: dict[str, str]) -> str:
    if ALL in actions:
        return f"{where}: save everything"
    parts = [
        f"{action} {' '.join(names)}"
        for action in ("save", "save_quantized", "offload")
        if (names := [name for name, a in actions.items() if a == action])
    ]
    return f"{where}: {', '.join(parts)}"


def _wrapper(actions: Mapping[str, str]) -> Callable | None:
    if ALL in actions:
        return None
    kinds = ("save", "offload", "save_quantized")
    policy = Policy(*(frozenset(name for name, action in actions.items() if action == kind) for kind in kinds))
    # No barrier is needed here: the compiler cannot merge what a loop computes again with what an earlier loop
    # computed, and where layers are written out the decoder puts barriers.
    return functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)


def _preset(**actions: str) -> RematPlan:
    return RematPlan(((None, tuple(actions.items())),))


PRESETS = {
    "none": RematPlan(((None, ((ALL, "save"),)),)),
    # The results of the large matmuls and of attention; norms, activations and adapters are computed again.
    "selective": _preset(**dict.fromkeys(NAMES, "save")),
    "full": _preset(thin="save"),
    "offload": _preset(input="offload", thin="save"),
}
