"""What each server takes of an adapter as it is, read off their own loaders, and how one starts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.adapter_file import AdapterFile

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


@dataclass(frozen=True)
class Features:
    """What an adapter uses, as far as servers differ on it."""

    rank: int
    """Its highest."""
    dora: bool = False
    rslora: bool = False
    ranks: bool = False
    """Whether ranks differ between modules."""
    alphas: bool = False
    """Whether some modules have an alpha of their own."""
    saved: Sequence[str] = ()
    """Modules trained as a whole."""
    tokens: bool = False
    bias: bool = False
    embeddings: bool = False
    frozen: bool = False
    """Whether weights of the base stand beside the adapter that it did not train: peft writes embeddings along that were resized. (With `saved` they may be
    those, or be tied to them.)"""
    experts: bool = False
    convolutions: bool = False


def features(file: AdapterFile) -> Features:
    """What an adapter uses, by its config and its tensors."""
    config, state = file.config, file.state
    saved = tuple(config.get("modules_to_save") or ())
    trained = (".lora_", "trainable_tokens_delta")
    factors = {key: tensor for key, tensor in state.items() if key.endswith("lora_A.weight")}
    ranks = {tensor.shape[0] for tensor in factors.values()} or {config["r"]}
    return Features(
        rank=max(ranks),
        dora=bool(config.get("use_dora")),
        rslora=bool(config.get("use_rslora")),
        ranks=len(ranks) > 1,
        alphas=bool(config.get("alpha_pattern")),
        saved=saved,
        tokens=bool(config.get("trainable_token_indices")),
        bias=config.get("bias", "none") != "none",
        embeddings=any(".lora_embedding_" in key for key in state),
        frozen=not saved and any(not key.endswith(".bias") and not any(part in key for part in trained) for key in state),
        experts=bool(config.get("target_parameters")),
        convolutions=any(tensor.ndim > 2 for tensor in factors.values()),
    )


@dataclass(frozen=True)
class Server:
    """One server and its loader of adapters."""

    name: str
    refuses: dict[str, str]
    """feature -> why it cannot have it in an adapter at all: it must be merged"""
    misreads: dict[str, str]
    """feature -> what it would do with it; the same update written as plain LoRA of one rank is read rightly"""
    serve_adapter: str
    serve_model: str
    max_rank: int | None = None
    source: str = ""

    def reasons(self, found: Features) -> tuple[list[str], list[str]]:
        """(why only a merged model will do, why it must be written as plain LoRA first)"""
        merged = [why for feature, why in self.refuses.items() if getattr(found, feature)]
        if self.max_rank is not None and found.rank > self.max_rank:
            merged.append(f"rank {found.rank} is above the highest it serves, {self.max_rank}")
        return merged, [why for feature, why in self.misreads.items() if getattr(found, feature)]


NOT_LINEAR = {
    "tokens": "trained rows of the embedding are no LoRA update",
    "embeddings": "adapted embeddings are served for few architectures or none",
    "frozen": "weights of a resized embedding are not read: tokens that were added would be missing",
    "experts": "adapted experts are in peft's target_parameters, which it does not read",
    "convolutions": "adapted convolutions are not served",
}
ONE_SCALE = {
    "ranks": "rank_pattern is not read: all modules would be scaled by one rank",
    "alphas": "alpha_pattern is not read: all modules would be scaled by one alpha",
}
SERVERS = {
    "peft": Server(
        "peft", {}, {}, 'PeftModel.from_pretrained(model, "{folder}")', 'AutoModelForCausalLM.from_pretrained("{folder}")',
        source="the format is peft's own",
    ),
    "vllm": Server(
        "vLLM",
        {
            "dora": "its loader stops at use_dora: DoRA is not supported",
            "saved": "its loader stops at modules_to_save: {saved}",
            "bias": "trained biases are not supported",
            **NOT_LINEAR,
        },
        ONE_SCALE,
        "vllm serve {base}{revision} --enable-lora --max-lora-rank {vllm_rank} --lora-modules {name}={folder}",
        "vllm serve {folder}",
        max_rank=VLLM_RANKS[-1],
        source="vllm/lora/peft_helper.py, vllm/config/lora.py (0.10 to 0.22)",
    ),
    "sglang": Server(
        "SGLang",
        {
            "dora": "use_dora is not supported",
            "saved": "modules_to_save is not read: {saved} would be the base's, in silence",
            "bias": "trained biases are not read",
            **NOT_LINEAR,
        },
        {
            "ranks": "rank_pattern is not supported",
            "alphas": "alpha_pattern is not supported",
            "rslora": "use_rslora is not read: the update would be scaled by alpha / r",
        },
        "python -m sglang.launch_server --model-path {base}{revision} --enable-lora --max-lora-rank {rank} --lora-paths {name}={folder}",
        "python -m sglang.launch_server --model-path {folder}",
        source="python/sglang/srt/lora/lora_config.py (2026)",
    ),
    "tgi": Server(
        "text-generation-inference",
        {
            "dora": "the magnitudes are not read: it would serve another model, in silence",
            "saved": "modules_to_save is not read: {saved} would be the base's, in silence",
            "bias": "trained biases are not read",
            **NOT_LINEAR,
        },
        ONE_SCALE,
        "LORA_ADAPTERS={name}={folder} text-generation-launcher --model-id {base}{revision}",
        "text-generation-launcher --model-id {folder}",
        source="server/text_generation_server/adapters/lora.py (3.x)",
    ),
    "llama.cpp": Server(
        "llama.cpp",
        {
            "dora": "its converter stops at the magnitudes, which are neither A nor B",
            "saved": "its converter stops at weights trained as a whole: {saved}",
            "bias": "its converter stops at trained biases",
            **NOT_LINEAR,
        },
        {
            "alphas": "alpha_pattern is not read: modules would get the alpha of the others",
            "rslora": "use_rslora is not read: the update would be scaled by alpha / r",
        },
        "python llama.cpp/convert_hf_to_gguf.py {base}{remote} --outfile base.gguf --outtype bf16\n"
        "python llama.cpp/convert_lora_to_gguf.py {folder} --base {base} --outfile adapter.gguf\n"
        "llama-server -m base.gguf --lora adapter.gguf",
        "python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype bf16\n"
        "llama-quantize model.gguf model-q4_k_m.gguf Q4_K_M\n"
        "llama-server -m model-q4_k_m.gguf",
        source="convert_lora_to_gguf.py, convert_hf_to_gguf.py (2026)",
    ),
}  # fmt: skip
