"""Loading a Hugging Face model and its tokenizer in the wanted precision."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from peftkit import quant
from peftkit.config import Config, ConfigError, suggest
from peftkit.layers import is_linear, output_head, quantize_experts

logger = logging.getLogger(__name__)

BUILTIN = Path(__file__).parent / "builtin"
BUILTIN_MODELS = ("tiny",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelConfig(Config):
    """The base model of a recipe."""

    name: str
    """A hub id, a local folder, or builtin:tiny."""
    quantize: Literal["nf4", "fp4", "int8"] | None = None
    """How the linear layers are stored; null keeps them as they are. 4 bits always come with double quantisation."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of what is not quantised and of all arithmetic; auto is bfloat16 where the hardware has it, else float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention backend; auto is transformers' choice, and in training on a CPU skips what masks hide."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


def best_dtype() -> torch.dtype:
    """bfloat16 where this machine computes in it natively, else float32 (fp16 overflows in many models)."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return torch.backends.mps.is_available()
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype that a recipe's or caller's `dtype` means."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return best_dtype()
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}{suggest(str(dtype), DTYPES)} (there are: auto, {', '.join(DTYPES)})")
    return DTYPES[dtype]


def locate(name: str) -> str:
    """What transformers is to load for `name`: a folder or a hub id. Raises ConfigError for what can be neither."""
    if name.startswith("builtin:"):
        model = name.removeprefix("builtin:")
        if model not in BUILTIN_MODELS:
            raise ConfigError(f"unknown built-in model {name!r}{suggest(model, BUILTIN_MODELS)} (there is: builtin:tiny)")
        return str(BUILTIN / model)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"model: {name} is a folder without config.json, so not a Hugging Face model")
        return str(path)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], 1)
        raise ConfigError(f"model: there is no folder {name}" + (f"; did you mean {near[0]!r} in {path.parent}?" if near else ""))
    return name


def _from_hub(what: str, name: str, load: Any, **options: Any) -> Any:
    """`load(name, **options)`, with transformers' many ways to fail told in one line."""
    try:
        return load(locate(name), **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _cannot_load(what, name, error) from error


def _cannot_load(what: str, name: str, error: Exception) -> ConfigError:
    """What a person can do about it: transformers uses one class of error for a file that is missing and for a model that it does not know."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    told = f"model: cannot load the {what} of {name!r}: {reason[:300]}"
    if "Unrecognized configuration class" in reason:
        return ConfigError(
            f"model: {name!r} is no language model of text: transformers has no causal or encoder-decoder one for its "
            f"{reason.partition('configuration class ')[2].split(' for ')[0]}"
        )
    if isinstance(error, ImportError) or "attn_implementation" in reason or "does not support an attention" in reason:
        return ConfigError(told)
    if "does not recognize this architecture" in str(error):
        return ConfigError(f"{told}\n  this version of transformers does not know it: a newer one may")
    if Path(locate(name)).is_dir():
        return ConfigError(f"{told}\n  the folder is not whole: copy or download it again")
    return ConfigError(
        f"{told}\n  a name that is no local folder is looked up on the Hugging Face hub: check its spelling, the network, "
        "HF_HUB_OFFLINE, and for gated models `hf auth login`"
    )


def load_config(name: str, revision: str | None = None) -> Any:
    """The model's config.json, without its weights."""
    return _from_hub("config", name, AutoConfig.from_pretrained, revision=revision)


def reads_with_encoder(config: Any) -> bool:
    """Whether a model has an encoder for the prompt and a decoder for the answer (T5, BART). All that differs for them asks this."""
    return bool(getattr(config, "is_encoder_decoder", False))


def model_class(config: Any) -> Any:
    """The auto class that loads models of this config."""
    return AutoModelForSeq2SeqLM if reads_with_encoder(config) else AutoModelForCausalLM


def from_config(config: Any, name: str, **options: Any) -> PreTrainedModel:
    """A model of a config with new weights, or with none where the caller has set the device meta. Raises ConfigError for one that is no language model."""
    try:
        return model_class(config).from_config(config, **options)
    except (ValueError, ImportError) as error:
        raise _cannot_load("architecture", name, error) from error


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None where its folder holds none."""
    place = Path(locate(name))
    if place.is_dir() and not any((place / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        return None
    return _from_hub("tokenizer", name, AutoTokenizer.from_pretrained, revision=revision)


def _unquantizable(name: str, revision: str | None) -> list[str]:
    """The linears that must stay as they are on a CPU, with the head; empty where all can be in 4 bits."""
    config = load_config(name, revision)
    with torch.device("meta"):
        skeleton = from_config(config, name)
    head = output_head(skeleton)
    left = [n for n, m in skeleton.named_modules() if quant.misread_on_cpu(m) and m is not head]
    if not left:
        return []
    logger.warning(
        "%d linears of %s stay unquantised, such as %s: their input width is no multiple of %d, and bitsandbytes' CPU kernels misread such weights",
        len(left), name, left[0], quant.BLOCK,
    )  # fmt: skip
    return left + [n for n, m in skeleton.named_modules() if m is head]


def _check_quantized(model: PreTrainedModel, name: str) -> None:
    """Warns of linears that transformers leaves as they are since their class is not nn.Linear itself; raises ConfigError where it leaves all."""
    own = {n: m for n, m in model.named_modules() if is_linear(m) and type(m) not in (torch.nn.Linear, Conv1D) and not quant.is_quantized(m)}
    classes = ", ".join(sorted({type(module).__name__ for module in own.values()}))
    if own and not quant.quantized_modules(model):
        raise ConfigError(
            f"model: {name} cannot be quantised: transformers quantises nn.Linear and Conv1D only, and its linears are {classes}; leave quantize out"
        )
    if own:
        size = sum(parameter.nbytes for module in own.values() for parameter in module.parameters())
        logger.warning(
            "%d linears of %s (%s, %s bytes) stay unquantised: transformers quantises nn.Linear and Conv1D only", len(own), name, classes, f"{size:,}"
        )


def load(
    name: str,
    quantize: quant.Quantization | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str = "auto",
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The language model `name` (a hub id, a local folder or builtin:tiny; causal or encoder-decoder) and its tokenizer, ready to attach to.

    quantize: "nf4" or "fp4" (with double quantisation), "int8", or None. dtype: of the arithmetic and of what is not
    quantised; by default bfloat16 where the hardware has it, else float32. The tokenizer is None where there is none.
    Raises ConfigError where the model cannot be found.
    """
    if quantize not in (None, "nf4", "fp4", "int8"):
        raise ConfigError(f"unknown quantisation {quantize!r}{suggest(str(quantize), ('nf4', 'fp4', 'int8'))} (there are: nf4, fp4, int8)")
    dtype = resolve_dtype(dtype)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "output_loading_info": True}
    if attention != "auto":
        options["attn_implementation"] = attention
    if quantize is not None:
        left = _unquantizable(name, revision) if quantize != "int8" and device.type == "cpu" else []
        options["quantization_config"] = quant.quantization_config(quantize, dtype, left or None)
        options["device_map"] = {"": device}
    model, report = _from_hub("weights", name, model_class(load_config(name, revision)).from_pretrained, **options)
    if any(key.endswith("scales_of_scales") for key in report["unexpected_keys"]):
        raise ConfigError(f"model: {name} was saved while its experts were in 4 bits, which transformers cannot read back; save the adapter, or merge first")
    if quantize is not None:
        _check_quantized(model, name)
    if quantize in ("nf4", "fp4"):  # transformers has quantised the linears
        for experts, reason in quantize_experts(model, quantize).items():
            logger.warning("%s stays unquantised: %s", experts, reason)
    if quantize is None:
        model = model.to(device)
    quant.protect(model)
    return model, load_tokenizer(name, revision)
