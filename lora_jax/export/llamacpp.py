"""What llama.cpp makes of a GGUF file: served by xllamacpp in a process of its own, asked over loopback HTTP.

A process of its own, so that a crash or a wait in its C++ is an error and not the end of the export. One thread: its
threads spin at a barrier after every operation, which takes minutes where other programs use the cores. The key/value
cache is float32 and flash attention is off: with llama.cpp's defaults (float16 cache) a float32 file differs from a
float32 computation by 1e-2 instead of 5e-5.
"""

import functools
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

__all__ = ["LlamaCpp", "centred_difference"]

_READY = "listening at "


class LlamaCpp:
    """One file, or the first of several parts, in llama.cpp: `with LlamaCpp(path, vocab_size) as llama:`.

    Args:
      path: the GGUF file.
      vocab_size: the number of ids that `logprobs` returns.
      n_ctx: longest text, in tokens.
      lora: GGUF file of an adapter to put on it.

    Raises:
      RuntimeError: llama.cpp does not load it; what it said.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vocab_size: int,
        *,
        n_ctx: int = 512,
        lora: str | os.PathLike[str] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        arguments = [os.fspath(path), str(n_ctx), *([] if lora is None else [os.fspath(lora)])]
        self._process = subprocess.Popen(
            # -P: this file's folder has modules called as packages are
            [sys.executable, "-P", __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        output = []
        for line in self._process.stdout:
            if line.startswith(_READY):
                self._address = line.removeprefix(_READY).strip()
                return
            output.append(line)
        self._stop()
        raise RuntimeError(f"llama.cpp did not load {path}:\n{''.join(output)[-3000:]}")

    def _stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # which ends it
        self._process.stdout.close()
        self._process.wait(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probabilities of the token after `ids`, float32 [vocab_size].

        The server's normaliser is off by about 1e-4; compare with `centred_difference`.
        """
        # The list is left out where the sampled token ends the text or half a character, so a harmless one is forced.
        # A bias acts on the sampling, not on the listed values.
        forced = [[self.tokenize("a")[-1], 1000.0]]
        answer = self.complete(list(ids), n_predict=1, n_probs=self.vocab_size, logit_bias=forced)
        out = np.full(self.vocab_size, np.nan, np.float32)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            out[entry["id"]] = entry["logprob"]
        if np.isnan(out).any():
            raise AssertionError(f"llama.cpp gave no log-probability for {int(np.isnan(out).sum())} ids")
        return out

    def complete(self, prompt: str | Sequence[int], *, n_predict: int = 16, **options: Any) -> dict[str, Any]:
        """llama.cpp's answer to /completion (greedy unless `temperature` is given); `content` is the text."""
        return self._post(
            "completion",
            {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False, **options},
        )

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The ids of a text."""
        return self._post("tokenize", {"content": text, "add_special": add_special, "parse_special": parse_special})[
            "tokens"
        ]

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        """The prompt text for a chat, with the opening of the assistant's turn."""
        return self._post("apply-template", {"messages": messages})["prompt"]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _opener().open(request, timeout=300) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"llama.cpp refused /{path}: {error.read().decode()}") from error


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Never a proxy for loopback. Made once: it reads all certificates, which takes longer than most answers."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def centred_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b less its median: two log-softmaxes but for their normalisers."""
    difference = a.astype(np.float64) - b.astype(np.float64)
    return difference - np.median(difference)


def _serve(path: str, n_ctx: int, lora: str | None = None) -> None:
    """The child process: serve until standard input is closed, also by the parent's death."""
    import xllamacpp as module

    xllamacpp: Any = module  # compiled, without type stubs
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = n_ctx
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    print(f"{_READY}{server.listening_address}", flush=True)
    sys.stdin.read()
    os._exit(0)  # the destructor of the server may wait for ever


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
