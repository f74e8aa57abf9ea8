"""Random tiny models of every supported architecture, and what they are compared by."""

from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from spikellm.config.choices import DType, ModelSource
from spikellm.config.model import ModelConfig
from spikellm.model.conversion import prepare
from spikellm.model.prefix import attach_prefix
from spikellm.model.stored import Stored

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 144,  # 36 * 4: no power of two, two Kronecker factors
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# name -> (architecture, options): "llama-biases" has biases in every Linear, "qwen3" a head width that is not D / H
TINY = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 128}),
}
PUBLISHED_MODELS = {
    "llama2_7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "llama3_8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    },
}  # fmt: skip
# A dtype is no matter of the architecture: every one in those that models come in, one in float64.
NAMES_AND_DTYPES = [*product(TINY, (torch.float32, torch.bfloat16)), ("llama", torch.float64)]
names_and_dtypes = pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES, ids=str)
BOS = 256  # bytes are 0 to 255


def tiny_model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    """A random model in which everything matters: weights of unit gain, norm weights that are not one, nonzero biases.

    In other dtypes the same weights, rounded, as a checkpoint would be read: RoPE's frequencies stay float32.
    """
    architecture, own = TINY[name]
    config = AutoConfig.for_model(architecture, **SIZES | own | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.5, generator=generator)
            else:
                gain = 1.0 if "embed" in key else parameter.shape[1] ** -0.5
                parameter.normal_(std=gain, generator=generator)
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def transparent_model(name: str = "llama", **options):
    """A tiny model rotated, its slots empty, behind a prefix of one token."""
    model = tiny_model(name, **options)
    prepare(model, rotation_seed=0)
    attach_prefix(model, [1])
    return model


def layer_outputs(model, windows: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states [W, L, D] behind every decoder layer, from forwards of the whole model; float64."""
    found = []
    for window in windows:
        seen = []
        handles = [
            layer.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output)) for layer in model.model.layers
        ]
        model(window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(torch.cat(seen))
    return list(torch.stack(found, 1).double())


def norm_ratio(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm()).item()


def byte_tokenizer(*, adds_bos: bool = False, special: tuple[str, ...] = ("bos", "eos")) -> PreTrainedTokenizerFast:
    """Every byte a token, and the special tokens that are named: from `BOS` on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {f"{name}_token": {"bos": "<s>", "eos": "</s>"}.get(name, f"<{name}>") for name in special}
    tokenizer.add_special_tokens(list(named.values()))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def byte_model(folder: Path, *, shard: str = "50GB", **options) -> list[str]:
    """A local model with a tokenizer of 258 tokens, in files of at most `shard`, as arguments."""
    tiny_model(**{"vocab_size": 258, "bos_token_id": BOS} | options).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer(adds_bos=True).save_pretrained(folder)
    return ["model.source=hub", f"model.path={folder}"]


def greedy(model, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """The tokens and the likeliest ones after them, without a cache: what `generate` must give."""
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


def watch(modules) -> list:
    """What accelerate's hooks see from now on: the modules in the order of their calls, one entry a call."""
    called: list = []

    class Watched(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            called.append(module)
            return super().pre_forward(module, *args, **kwargs)

    for module in modules:
        add_hook_to_module(module, Watched(execution_device="cpu"))
    return called


def saved(name: str, folder: Path, dtype: DType = DType.float32, **options) -> ModelConfig:
    """A tiny model in a folder, in several shards."""
    tiny_model(name, dtype=getattr(torch, dtype.value), **options).save_pretrained(folder, max_shard_size="100KB")
    return ModelConfig(name=name, source=ModelSource.hub, path=str(folder), dtype=dtype)


def keeping(folder: Path):
    """Parts in a folder (`offload.Keep`), and the names of those that were computed."""
    computed = []

    def keep(part, compute):
        place = folder / part
        if not place.exists():
            place.mkdir(parents=True)
            compute(place)
            computed.append(part)
        return place

    return keep, computed


def reads(monkeypatch) -> list[str]:
    """Names of tensors that are read from files from now on."""
    found: list[str] = []
    get = Stored.__getitem__
    monkeypatch.setattr(Stored, "__getitem__", lambda self, key: found.append(key) or get(self, key))
    return found
