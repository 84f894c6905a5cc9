"""llama.cpp as a test oracle: that which exports are checked with."""

import urllib.request
from typing import Any
from unittest import mock

from lora_jax.export import llamacpp
from lora_jax.export.llamacpp import centred_difference

__all__ = ["LlamaCpp", "centred_difference"]

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LlamaCpp(llamacpp.LlamaCpp):
    """Asks hundreds of times: what opens an address, and reads all certificates for that, is made once for all."""

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with mock.patch.object(urllib.request, "build_opener", lambda *_: _OPENER):
            return super()._post(path, body)
