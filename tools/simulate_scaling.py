"""Estimated scaling of QLoRA steps up to 1,024 GPUs, from counted bytes and operations; a table in Markdown.

    python -m lora_jax.tools.simulate_scaling

Nothing of it was measured on so many GPUs; docs/scaling.md states the assumptions.
"""

from lora_jax.cards import card_of
from lora_jax.lora import LoraConfig
from lora_jax.plan import of_config
from lora_jax.scaling import NVLINK, gpus_of, plan_mesh, plan_meshes, step_seconds
from lora_jax.tools.bench_step import SHAPES, hf_config

__all__ = ["MODELS", "rows", "scaling"]

MODELS = {
    "34B": dict(hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
                num_key_value_heads=8, vocab_size=64000, max_position_embeddings=131072),
    "70B": SHAPES["llama3.3-70b"],
    "405B": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                 num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072),
    "8B": SHAPES["llama3.1-8b"],
}  # fmt: skip
HOST = 8


def rows(model: str, gpus: str, batch: int = 1, length: int = 2048) -> list[str]:
    """Lines of a table: every mesh of some GPUs for a model."""
    count, host, card = gpus_of(gpus)
    config, lines = hf_config(MODELS[model]), []
    for plan in plan_meshes(lambda mesh: of_config(config, LoraConfig(), batch, length, mesh=mesh), card, count, host):
        mesh = " x ".join(f"{axis} {n}" for axis, n in plan.devices.items() if n > 1)
        cells = [model, gpus, mesh, f"{plan.work.weights / 2**30:.1f}", f"{plan.memory / 2**30:.1f}"]
        lines.append("| " + " | ".join([*cells, "yes" if plan.plan else "no", f"{plan.wire.total / 1e9:.1f}"]) + " |")
    return lines


def scaling(model: str, fsdp: int, batch: int, length: int, counts: list[int]) -> list[str]:
    """Lines of a table: step time and efficiency on so many H100s, in hosts of eight, the same rows for each."""
    config, card, lines = hf_config(MODELS[model]), card_of("H100"), []
    for count in counts:
        f = min(fsdp, count)
        plan = plan_mesh(
            lambda mesh: of_config(config, LoraConfig(), batch, length, mesh=mesh),
            card,
            {"data": count // f, "fsdp": f},
        )
        fast, slow = step_seconds(plan, NVLINK, HOST)
        tokens = count * batch * length
        cells = [
            f"{count:,}",
            f"data {count // f} x fsdp {f}",
            f"{plan.wire.total / 1e9:.2f}",
            f"{1e3 * plan.compute:,.0f}",
        ]
        cells += [
            f"{1e3 * fast:,.0f} to {1e3 * slow:,.0f}",
            f"{tokens / slow / 1e3:,.0f} to {tokens / fast / 1e3:,.0f}",
        ]
        cells += [f"{100 * plan.compute / slow:.0f} to {100 * plan.compute / fast:.0f} %"]
        lines.append("| " + " | ".join([model, *cells]) + " |")
    return lines


def main() -> None:
    """Prints both tables."""
    print("| model | GPUs | mesh | weights, GiB | peak, GiB | fits | received, GB |\n|" + " --- |" * 7)
    for model, gpus in (("34B", "2x24GB"), ("70B", "4x48GB"), ("405B", "8x80GB")):
        print("\n".join(rows(model, gpus)))
    head = "model | GPUs | mesh | received, GB | computing, ms | step, ms | 1,000 tokens/s | efficiency"
    print(f"\n| {head} |\n|" + " --- |" * 8)
    for model, fsdp, batch in (("8B", 1, 2), ("70B", 8, 2), ("405B", 8, 1)):
        counts = [n for n in (1, 8, 16, 64, 256, 1024) if n >= fsdp]
        print("\n".join(scaling(model, fsdp, batch, 2048, counts)))


if __name__ == "__main__":
    main()
