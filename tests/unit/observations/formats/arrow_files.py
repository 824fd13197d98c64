"""Activations as SAELens' runner leaves them, by Hugging Face datasets' save_to_disk."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

HOOK = "blocks.2.hook_resid_pre"


def arrow_folder(path: Path, contexts: Tensor, ids: Tensor | None, hook: str = HOOK) -> Path:
    """Contexts (N, T, D) in two files, as save_to_disk lays them out."""
    path.mkdir()
    names = []
    for number, part in enumerate(torch.arange(len(contexts)).chunk(2)):
        columns = {hook: pa.array(contexts[part].tolist(), pa.list_(pa.list_(pa.float32())))}
        if ids is not None:
            columns["token_ids"] = pa.array(ids[part].tolist(), pa.list_(pa.int32()))
        table = pa.table(columns)
        names.append(f"data-{number:05d}-of-00002.arrow")
        with pa.OSFile(str(path / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text("{}")
    return path
