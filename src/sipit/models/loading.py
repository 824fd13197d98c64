"""From a name to a `LanguageModel`: hub id, local folder, GGUF file, or pinned small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sipit.errors import ModelError, OptionError
from sipit.models.language_model import LanguageModel
from sipit.models.pinned import PINNED, pinned_folder
from sipit.models.quantized import (
    Quantizer,
    is_quantized,
    quantization_config,
    quantizer_named,
    require_bitsandbytes,
    settled,
)
from sipit.models.quiet import quiet_transformers
from sipit.observations import dtype_named
from sipit.storage import shown


def load(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
) -> LanguageModel:
    """Load a causal language model and check that it can be cut after any block.

    Args:
        name_or_path: a pinned model ("smollm2-135m", "gemma-3-270m"), a folder, a .gguf file, or a hub id.
        device: "auto" (cuda, else mps, else cpu), or any torch device.
        dtype: "auto" (as stored; float32 for GGUF files), "float32", "bfloat16", "float16", "float64".
        quantize: "int8" (LLM.int8, as bitsandbytes makes it), "int8-vectorwise" (the same without
            outlier columns), "nf4" or "fp4"; None: no weights are quantised but those stored so.

    Raises:
        FetchError: a pinned model is not there and cannot be fetched.
        ModelError: nothing of that name can be loaded, or the self-check refuses it.
        OptionError: the device, dtype or quantiser is unknown or absent.
        StorageError: the cache folder cannot be written.
    """
    place = _device(device)
    kind = dtype if dtype == "auto" else dtype_named(dtype)
    name = str(Path(name_or_path).expanduser()) if str(name_or_path).startswith("~") else str(name_or_path)
    which = None if quantize is None else quantizer_named(quantize)
    if which is not None:
        require_bitsandbytes(which, place)
    if name in PINNED:
        model, tokenizer = _from_pretrained(pinned_folder(name), kind, place, which)
    elif name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ModelError(f"cannot load {name}: no such file; check its name")
        if which is not None:
            raise OptionError(f"{name} holds weights quantised already; leave quantize out, or pass a folder or hub id")
        dtype = torch.float32 if kind == "auto" else kind
        model, tokenizer = _from_pretrained(path.parent, dtype, place, gguf_file=path.name)
    else:
        looks_local = Path(name).is_absolute() or name.startswith(".")
        if looks_local and not Path(name).is_dir():
            raise ModelError(f"cannot load {shown(name)}: no such folder; check its name")
        model, tokenizer = _from_pretrained(name, kind, place, which)
    model = settled(model) if is_quantized(model) else model.to(place)
    return LanguageModel(model.eval(), tokenizer, name=name)


def _from_pretrained(
    source: str | Path, dtype: Any, place: torch.device, quantize: Quantizer | None = None, **options: Any
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = str(Path(source) / options["gguf_file"]) if options else str(source)
    try:
        with quiet_transformers():
            if options:
                _require_plausible(Path(named))
            quantizing = {} if options else _quantizing(source, dtype, place, quantize)
            read: Any = AutoModelForCausalLM.from_pretrained
            model, loaded = read(
                source, dtype=dtype, output_loading_info=True, trust_remote_code=False, **quantizing, **options
            )
    except OptionError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{named!r} is a model by code of its own (auto_map in its config), which is never run here; "
                "pass a model of a family that transformers has"
            ) from error
        raise ModelError(
            f"cannot load a causal language model from {shown(named)!r} ({_first_sentence(error)}); pass a pinned name "
            f"({', '.join(PINNED)}), a folder with config.json, a .gguf file, or a hub id that is "
            "reachable or already downloaded"
        ) from error
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        absent = sorted([*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])])
        raise ModelError(
            f"{named!r} lacks {len(absent)} of the model's weights (first: {absent[0]}), which would be drawn at "
            "random; fetch or save the whole model again"
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
            is_usable = _can_encode(tokenizer, model.get_input_embeddings().weight.shape[0])
    except Exception:  # noqa: BLE001  as above
        is_usable = False
    return model, tokenizer if is_usable else None  # weights without a tokenizer are useful: ids in, ids out


def _require_plausible(path: Path) -> None:
    """Refuse a GGUF file that claims more blocks than it holds tensors: the library would build them all first."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for key, field in reader.fields.items():
        if key.endswith(".block_count") and int(field.contents()) > len(reader.tensors):
            raise ValueError(f"it claims {field.contents()} blocks and holds {len(reader.tensors)} tensors")


def _can_encode(tokenizer: Any, vocab_size: int) -> bool:
    """Return whether a tokenizer has a vocabulary that fits; of a folder without one the library makes an empty one."""
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    return len(tokenizer) > len(set(tokenizer.all_special_ids)) and len(ids) > 0 and max(ids) < vocab_size


def _quantizing(source: str | Path, dtype: Any, place: torch.device, quantize: Quantizer | None) -> dict[str, Any]:
    """Return the options that make `from_pretrained` quantise, or put quantised weights where they are wanted."""
    from transformers import AutoConfig

    stored = getattr(AutoConfig.from_pretrained(source, trust_remote_code=False), "quantization_config", None)
    if stored is None and quantize is None:
        return {}
    if stored is not None and quantize is not None:
        raise OptionError(f"{str(source)!r} holds weights quantised already; leave quantize out")
    options = {"device_map": {"": str(place)}}  # the library does not move them later
    return options if quantize is None else {**options, "quantization_config": quantization_config(quantize, dtype)}


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(
            f"device {name!r} is not available here; choose auto, cpu, cuda or mps as this machine has them"
        ) from error
    return place


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120].rstrip(". ")
