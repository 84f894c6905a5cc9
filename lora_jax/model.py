"""`CausalLM`: a loaded model, its adapter and where it came from; what the user holds in hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from lora_jax.models.decoder import Decoder, DecoderConfig
from lora_jax.models.streamed import Streamed, offload, on_device, to_host

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lora_jax.lora import LoraConfig

__all__ = ["CausalLM"]


class CausalLM:
    """A causal language model with a frozen base and, after `get_peft_model`, a trained adapter.

    The arrays live in `module`, a Flax NNX module; `split()` gives them as plain pytrees for pure functions.
    """

    def __init__(
        self,
        module: Decoder,
        *,
        hf_config: dict[str, Any],
        source: Path,
        name_or_path: str | None = None,
        max_seq_length: int | None = None,
    ):
        self.module = module
        self.hf_config = hf_config  # config.json as the source had it
        self.source = source  # the folder it was loaded from
        self.name_or_path = name_or_path or str(source)  # what the user called it: a hub id or a folder
        self.max_seq_length = max_seq_length or module.config.max_position
        self.lora_config: LoraConfig | None = None
        self.mesh: Mesh | None = None  # of the devices that hold the arrays, after `shard`
        self._compiled: dict[str, Any] = {}  # jitted functions of this model, by name

    @property
    def config(self) -> DecoderConfig:
        """The architecture."""
        return self.module.config

    @property
    def streams_layers(self) -> bool:
        """Whether the layers' weights lie in the host's memory; see `offload_layers`."""
        return bool(self.streamed_codes())

    def streamed_codes(self) -> list[Streamed]:
        """Those of the layers' weights that lie in the host's memory."""
        weights = [part.weight.get_value() for _, _, part in self.module.block_linears()]
        return [codes for weight in weights if isinstance(codes := getattr(weight, "packed", None), Streamed)]

    def split(self) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        """(graph, trained leaves, frozen leaves); `nnx.merge(graph, lora, frozen)` is the module again."""
        graph, lora, frozen = nnx.split(self.module, nnx.LoRAParam, ...)
        return graph, lora, frozen

    def update_lora(self, lora: nnx.State) -> None:
        """Puts trained leaves, in the form that `split` gave them, back into the model."""
        nnx.update(self.module, lora)

    def shard(self, mesh: "str | Mapping[str, int] | Mesh") -> "CausalLM":
        """Shares the model out over several devices, in place, and returns it; steps made from it then use them all.

        Args:
          mesh: "auto", sizes such as {"data": 2, "fsdp": 4}, or a mesh; see `lora_jax.sharding.make_mesh`.

        Raises:
          ValueError: sizes that do not fit the number of devices, or do not divide the model.
          NotImplementedError: the model cannot be divided along such an axis, or its layers are in the host's memory.
        """
        from lora_jax.sharding import make_mesh, place

        if self.streams_layers:
            raise NotImplementedError("the model's layers are in the host's memory: load it without offload_layers")
        if self.head_on_host:
            raise NotImplementedError("the model's head is in the host's memory: load it without offload_head")
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(self.split()[2]))
        mesh = make_mesh(mesh, model_bytes=stored)
        place(self, mesh)
        self.mesh = mesh
        return self

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many."""
        from lora_jax.lora import print_trainable_parameters

        print_trainable_parameters(self)

    def offload_embedding(self) -> None:
        """Keeps the table of token embeddings in the host's memory: 1 GiB of the device for an 8B Llama 3.

        Training steps then want batches that `with_embeddings` has completed; `SFTTrainer` does that. Generation and
        `logits` copy the table to the device when they are called.

        Raises:
          ValueError: the model's head is the same table, which the loss needs on the device.
        """
        if self.config.tie_embeddings:
            raise ValueError(
                f"offload_embedding: the head of {self.name_or_path} is its embedding table, which the loss needs on "
                "the device; leave it there"
            )
        self.module.embed_tokens.offload()

    @property
    def head_on_host(self) -> bool:
        """Whether the weight of lm_head lies in the host's memory; see `offload_head`."""
        head = self.module.lm_head
        return head is not None and not on_device(head.weight.get_value())

    def offload_head(self) -> None:
        """Keeps the weight of lm_head in the host's memory: 1 GiB of the device for an 8B Llama 3.

        A step copies it to the device for the loss, and has its place for the layers' backward pass. Generation and
        `logits` copy it when they are called.

        Raises:
          ValueError: the head is the embedding table, is trained, or the backend has no pinned host memory.
          NotImplementedError: the model is shared out over several devices.
        """
        head = self.module.lm_head
        if head is None:
            raise ValueError(
                f"offload_head: the head of {self.name_or_path} is its embedding table, which tokens are looked up in; "
                "leave it on the device"
            )
        if head.trained is not None:
            raise ValueError('offload_head: the head is trained (modules_to_save=["lm_head"]), and has to be at hand')
        if self.mesh is not None:
            raise NotImplementedError("offload_head: the model is shared out over several devices; share it out more")
        head.weight.set_value(to_host(head.weight.get_value()))

    def offload_layers(self) -> None:
        """Keeps the linear layers' weights in the host's memory, for models that do not fit the device even in NF4.

        Of a layer they are copied to the device when it needs them, forward and again backward, while the layer before
        is at work: with long rows that costs little, in generation every token waits for all of them.

        Raises:
          ValueError: the layers' weights are not in NF4, or the backend has no pinned host memory.
          NotImplementedError: the model is shared out over several devices.
        """
        if self.mesh is not None:
            raise NotImplementedError("offload_layers: the model is shared out over several devices; share it out more")
        if not self.streams_layers:
            offload(self.module)

    def with_embeddings(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with "inputs_embeds" [..., D] for its "input_ids" [...], if the embedding table is offloaded.

        The rows are copied on the host, while the device is busy with steps that were sent to it before: pass
        "input_ids" as a numpy array, since one on the device would have to be waited for.
        """
        embedding = self.module.embed_tokens
        if not embedding.offloaded or embedding.trained is not None:
            return dict(batch)
        return {**batch, "inputs_embeds": embedding.rows(np.asarray(batch["input_ids"]))}

    def logits(self, input_ids, attention_mask=None) -> jax.Array:
        """Logits [B, T, V] in float32 for token ids [B, T].

        Args:
          input_ids: int [B, T].
          attention_mask: int or bool [B, T], 0 for padding on the left or right of a row; None for no padding. What
            stands at padding positions of the result means nothing.
        """
        from lora_jax.generation import logits

        return logits(self, input_ids, attention_mask)

    def generate(self, input_ids, **options):
        """Generates text; see `lora_jax.generation.generate`."""
        from lora_jax.generation import generate

        return generate(self, input_ids, **options)

    def save_pretrained(self, folder: str | Path, **options) -> Path:
        """Writes the adapter as a PEFT folder; see `lora_jax.export.peft.save_adapter`."""
        from lora_jax.export.peft import save_adapter

        return save_adapter(self, Path(folder), **options)

    def save_pretrained_merged(self, folder: str | Path, tokenizer: Any = None, **options) -> Path:
        """Writes base and adapter as one Hugging Face folder; see `lora_jax.export.hf.save_merged`."""
        from lora_jax.export.hf import save_merged

        return save_merged(self, Path(folder), tokenizer, **options)

    def save_pretrained_gguf(
        self, folder: str | Path, tokenizer: Any = None, quantization_method: str | Sequence[str] = "f16", **options
    ) -> list[Path]:
        """Writes base and adapter as GGUF files for llama.cpp; see `lora_jax.export.gguf.save_gguf`."""
        from lora_jax.export.gguf import save_gguf

        return save_gguf(self, Path(folder), tokenizer, quantization_method, **options)

    def save_pretrained_gguf_lora(self, folder: str | Path, file_type: str = "f32", **options) -> Path:
        """Writes the adapter alone as a GGUF file for llama.cpp; see `lora_jax.export.gguf_lora.save_gguf_lora`."""
        from lora_jax.export.gguf_lora import save_gguf_lora

        return save_gguf_lora(self, Path(folder), file_type, **options)

    def save_pretrained_ollama(self, folder: str | Path, tokenizer: Any = None, file_type="q8_0", **options) -> Path:
        """Writes a folder for `ollama create`; see `lora_jax.export.ollama.save_ollama`."""
        from lora_jax.export.ollama import save_ollama

        return save_ollama(self, Path(folder), tokenizer, file_type, **options)

    def push_to_hub(self, repo_id: str, tokenizer: Any = None, **options) -> str:
        """Uploads the adapter as a PEFT folder to the Hugging Face hub; see `lora_jax.hub.save_and_push`."""
        from lora_jax.hub import save_and_push

        return save_and_push(self.save_pretrained, repo_id, tokenizer, **options)

    def push_to_hub_merged(self, repo_id: str, tokenizer: Any = None, **options) -> str:
        """Uploads base and adapter as one Hugging Face folder; see `lora_jax.hub.save_and_push`."""
        from lora_jax.hub import save_and_push

        return save_and_push(self.save_pretrained_merged, repo_id, tokenizer, **options)

    def push_to_hub_gguf(
        self, repo_id: str, tokenizer: Any = None, quantization_method: str | Sequence[str] = "q8_0", **options
    ) -> str:
        """Uploads base and adapter as GGUF files; see `lora_jax.hub.save_and_push`."""
        from lora_jax.hub import save_and_push

        options["quantization_method"] = quantization_method
        return save_and_push(self.save_pretrained_gguf, repo_id, tokenizer, **options)
