"""Run llama.cpp itself on one prompt and keep what it leaves.

`python -m tests.oracle.llama_cpp_run KIND MODEL IDS FOLDER`: the kind "embedding" writes the answer of its server's
/embedding, "float32" and "float16" the slot that its server saves, with keys and values held so. In a process of its
own: whatever becomes of native code, the tests live on.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main(kind: str, model: str, ids: str, folder: str) -> None:
    """Write FOLDER/KIND.json or FOLDER/KIND.bin."""
    import xllamacpp

    types = xllamacpp.ggml_type
    held = types.GGML_TYPE_F16 if kind == "float16" else types.GGML_TYPE_F32
    params: Any = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 64, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.verbosity = False, 0
    params.cache_type_k = params.cache_type_v = held
    # Its fast attention rounds what it reads to float16.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if kind == "embedding":
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    else:
        params.slot_save_path, params.endpoint_slots = folder + "/", True
    server: Any = xllamacpp.Server(params)
    if kind == "embedding":
        answer = _posted(server, "/embedding", {"content": json.loads(ids)})
        (Path(folder) / "embedding.json").write_text(json.dumps(answer), "utf-8")
    else:
        _posted(server, "/completion", {"prompt": json.loads(ids), "n_predict": 1, "id_slot": 0, "cache_prompt": True})
        _posted(server, "/slots/0?action=save", {"filename": f"{kind}.bin"})


def _posted(server: Any, path: str, body: object) -> Any:
    request = urllib.request.Request(
        server.listening_address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    main(*sys.argv[1:])
