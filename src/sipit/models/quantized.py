"""Models whose linear weights bitsandbytes holds in 8 or 4 bits: making them, and what they do to states.

nf4 and fp4 (arXiv 2305.14314) round weights alone. int8 (LLM.int8, arXiv 2208.07339) rounds activations
too, so the last digit of a sum can turn a code, and a few codes move a deep state by per cents: no
packed pass is trusted with it. And it keeps in float16 each column in which *any* row of the pass holds
a value of 6 or more, so a state depends on the other prompts of its batch and on the tokens behind it;
"int8-vectorwise" keeps none.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sipit.errors import OptionError
from sipit.models.families import family_of, module_at
from sipit.models.prefix_cache import PrefixCache

Quantizer = Literal["int8", "int8-vectorwise", "nf4", "fp4"]
QUANTIZERS: tuple[Quantizer, ...] = get_args(Quantizer)
_OUTLIER = 6.0  # the library's default: columns that hold a value this large stay in float16


def quantizer_named(name: str) -> Quantizer:
    """Return the quantiser of a name.

    Raises:
        OptionError: there is none.
    """
    if name not in QUANTIZERS:
        raise OptionError(f"quantize {name!r} is unknown; choose from {', '.join(QUANTIZERS)}")
    return name


def require_bitsandbytes(quantize: str, device: torch.device) -> Any:
    """Import and return bitsandbytes.

    Raises:
        OptionError: it is not installed or not whole, or does not run on the device.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it reports there what optional kernels it lacks
            import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:  # the latter two: its native library does not load
        raise OptionError(
            f"quantize {quantize!r} needs the package 'bitsandbytes', which cannot be imported here ({error}); install "
            "it with \"pip install 'sipit[quantized]'\", or leave quantize out"
        ) from error
    if device.type not in bitsandbytes.supported_torch_devices:
        raise OptionError(
            f"quantize {quantize!r} does not run on device {device.type!r}; choose one of "
            f"{', '.join(sorted({'cpu', 'cuda'} & set(bitsandbytes.supported_torch_devices)))}, or leave quantize out"
        )
    return bitsandbytes


def quantization_config(quantize: Quantizer, dtype: Any) -> Any:
    """Return what transformers' `from_pretrained` takes as quantization_config.

    Args:
        quantize: which.
        dtype: of the arithmetic on 4-bit weights; "auto": float32, the library's default.
    """
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if quantize in ("int8", "int8-vectorwise"):
        return make(load_in_8bit=True, llm_int8_threshold=_OUTLIER if quantize == "int8" else 0.0)
    compute = torch.float32 if dtype == "auto" else dtype
    return make(load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=compute)


def is_quantized(model: nn.Module) -> bool:
    """Return whether bitsandbytes holds any weight of the model."""
    return next(_quantized_maps(model), None) is not None


def quantizer_of(model: nn.Module) -> str | None:
    """Return how bitsandbytes holds the model's weights; None if it holds none of them."""
    for _, module in _quantized_maps(model):
        if hasattr(module, "state"):
            return "int8" if module.state.threshold > 0 else "int8-vectorwise"
        return str(module.weight.quant_state.quant_type)
    return None


def mixes_rows(model: nn.Module) -> bool:
    """Return whether a state depends on other rows of its pass: LLM.int8 with its outlier columns."""
    return quantizer_of(model) == "int8"


def rounds_activations(model: nn.Module) -> bool:
    """Return whether products round what enters them to int8, which no packed pass reproduces."""
    return quantizer_of(model) in ("int8", "int8-vectorwise")


def settled(model: nn.Module) -> nn.Module:
    """Make a quantised model compute one function on every machine, and refuse passes it cannot be checked by.

    On processors with AVX512-BF16 the library lays 4-bit weights out anew at the first pass, rounds
    their scales to bfloat16 for good, and multiplies in bfloat16 whatever dtype was asked for; writing
    the weights after that damages them. That is turned off here, as is a message at each int8 product.
    """
    for _, module in _quantized_maps(model):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if rounds_activations(model):
        trunk = module_at(model, family_of(model).trunk)
        trunk.register_forward_pre_hook(_refuse_packed, with_kwargs=True)
        log = logging.getLogger("bitsandbytes.autograd._functions")
        log.addFilter(_is_news)  # a filter already there is not added again
    return model


def _refuse_packed(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
    if isinstance(options.get("past_key_values"), PrefixCache):
        raise OptionError(
            "int8 products round activations, so states from packed passes lie per cents of their norm off ordinary "
            "ones; load the model with quantize 'nf4' or 'fp4', or unquantised"
        )


def _is_news(record: logging.LogRecord) -> bool:
    """Drop what LLM.int8 says at every product of float32 states."""
    return "inputs will be cast" not in str(record.msg)


def scales(model: nn.Module) -> dict[str, Tensor]:
    """Return what turns a quantised model's codes into weights, by name; empty for any other model.

    They are no parameters. `state_dict` has them too, but calling it damages weights that the library
    laid out anew; see `settled`.
    """
    found: dict[str, Tensor] = {}
    for name, module in _quantized_maps(model):
        quant_state = getattr(module.weight, "quant_state", None)
        if quant_state is not None:
            packed = cast("dict[str, Any]", quant_state.as_dict(packed=True))
            found |= {f"{name}.weight.{key}": value for key, value in packed.items()}
        else:
            found[f"{name}.SCB"] = _row_scales(module)
    return found


@torch.no_grad()
def quantized_copy(model: nn.Module, blocks: nn.Module, quantize: Quantizer) -> tuple[nn.Module, float]:
    """Return a copy with the linear maps inside the blocks quantised, and the weights' relative error.

    As loading with `quantize` does, for a model that is loaded already.

    Args:
        model: a causal LM in float.
        blocks: the part of it to quantise.
        quantize: which.
    """
    library = require_bitsandbytes(quantize, next(model.parameters()).device)
    twin = copy.deepcopy(model)
    inside = {id(module) for module in blocks.modules()}
    error = size = 0.0
    for (name, given), module in zip(list(model.named_modules()), list(twin.modules()), strict=True):
        if id(given) not in inside or type(given) not in (nn.Linear, Conv1D):
            continue
        weight = cast(Tensor, module.weight).T if type(given) is Conv1D else cast(Tensor, module.weight)
        new = _quantized_map(library, weight, cast("Tensor | None", module.bias), quantize)
        twin.set_submodule(name, new)
        error += float((dequantized(new).double() - weight.double()).square().sum())
        size += float(weight.double().square().sum())
    return settled(twin).eval(), (error / size) ** 0.5 if size else 0.0


def _quantized_map(library: Any, weight: Tensor, bias: Tensor | None, quantize: Quantizer) -> nn.Module:
    """Return a quantised linear map. (outputs, inputs), (outputs,)."""
    outputs, inputs = weight.shape
    place, values = weight.device, weight.detach().cpu().contiguous()
    if quantize in ("int8", "int8-vectorwise"):
        threshold = _OUTLIER if quantize == "int8" else 0.0
        new = library.nn.Linear8bitLt(inputs, outputs, bias is not None, has_fp16_weights=False, threshold=threshold)
        new.weight = library.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to(place)
    else:
        options = {"compress_statistics": False, "quant_type": quantize}
        new = library.nn.Linear4bit(inputs, outputs, bias is not None, compute_dtype=weight.dtype, **options)
        new.weight = library.nn.Params4bit(values, requires_grad=False, module=new, **options).to(place)
    new.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return cast(nn.Module, new.to(place))


@torch.no_grad()
def dequantized_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose quantised maps are plain ones that hold, in float32, the weights their codes mean.

    Activations are not rounded in it, which those of int8 models otherwise are.
    """
    twin = copy.deepcopy(model)
    for name, module in list(_quantized_maps(twin)):
        weight = dequantized(module)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = module.bias
        twin.set_submodule(name, plain)
    for place in ("quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "hf_quantizer"):
        if place in twin.__dict__:  # the library then lets it be cast
            delattr(twin, place)
    return twin


def dequantized(module: nn.Module) -> Tensor:
    """Return the weight that a quantised map's codes mean, in float32. (outputs, inputs)."""
    import bitsandbytes

    weight: Any = module.weight
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is not None:
        values: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, quant_state)
        return values.float()
    return cast(Tensor, weight.data).float() * (_row_scales(module).float() / 127)[:, None]


def _row_scales(module: Any) -> Tensor:
    """Return the scales of an int8 map, which move from its weight to its state at the first pass. (outputs,)."""
    kept = getattr(module.weight, "SCB", None)
    return cast(Tensor, module.state.SCB if kept is None else kept)


def _quantized_maps(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linear maps that bitsandbytes holds; it is not imported for models without any."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear):
            yield name, module
