"""GGUF files of llama.cpp: a target's architecture and tensors, under Hugging Face's names and in its order of rows."""

import dataclasses
import re
import warnings
from collections import Counter
from typing import Any

import numpy as np

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError, SpecaufWarning
from specauf_jax.files import as_path, local_copy
from specauf_jax.models.families import FAMILIES
from specauf_jax.models.hf_target import read_target
from specauf_jax.models.rope import rope_frequencies
from specauf_jax.models.weights import target_tensors
from specauf_jax.parts import RopeScaling

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""config.json's keys → GGUF's, after the architecture's name."""
_SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""GGUF's keys after rope.scaling. → config.json's."""
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
             "rope.freq_base", "rope.freq_base_swa", "attention.sliding_window", "vocab_size", "rope.scaling.type",
             "rope.scaling.finetuned")  # fmt: skip
_NEUTRAL = {"attention.causal": True, "attention.scale": 0, "expert_count": 0, "rope.scaling.attn_factor": 1,
            "attn_logit_softcapping": 0, "final_logit_softcapping": 0, "embedding_scale": 1,
            "attention.sliding_window_pattern": 6}  # fmt: skip
"""Keys under which a model computes something else, and the values that leave it as it is."""
_LLAMA3 = RopeScaling("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
"""Of Llama 3.1 to 3.3. GGUF holds only what they come to, by how much each frequency is divided, in a tensor."""
_DIVISORS = "rope_freqs.weight"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's modules, in a layer after blk.N. → Hugging Face's, in a layer after model.layers.N."""
_OUTER_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Likewise of Gemma 3, where they differ."""
_KINDS = ("llama", "qwen2", "qwen3", "gemma3")
"""Architectures, by GGUF's names and ours."""


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open file, or all parts of a split one; its tensors stay on the disk."""

    where: str
    keys: dict[str, Any]
    tensors: dict[str, Any]
    """Hugging Face's name, or GGUF's where there is none → `gguf.ReaderTensor`."""

    @property
    def quantisation(self) -> str:
        """Types of tensors and how many have each, the most frequent first."""
        found = Counter(tensor.tensor_type.name for tensor in self.tensors.values())
        return ", ".join(f"{kind} ({count})" for kind, count in found.most_common())


def open_gguf(path) -> GGUFFile:
    """Open a file of llama.cpp; a part -00001-of-0000N stands for all N.

    Raises:
      SpecaufError: no gguf package, no file, a part missing, or a damaged one.
    """
    try:
        import gguf
    except ImportError as error:
        raise SpecaufError(f"a GGUF file, but {error.name} is not installed", "the gguf package",
                           "pip install 'specauf-jax[gguf]'") from error  # fmt: skip
    split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", str(path))
    count = int(split[2]) if split else 1
    names = [f"{split[1]}-{part:05}-of-{split[2]}.gguf" for part in range(1, count + 1)] if split else [str(path)]
    keys: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for name in names:
        if not as_path(name).is_file():
            raise SpecaufError(f"{name} is no file", "a GGUF file, and all of its parts", "check the path")
        try:
            reader = gguf.GGUFReader(local_copy(name))
            keys = keys or {key: field.contents() for key, field in reader.fields.items()}
            if reader.byte_order == "S" or keys.get("split.count", 1) not in (0, count):
                raise ValueError("the other byte order" if reader.byte_order == "S" else
                                 f"one of {keys['split.count']} parts, by its name {count}")  # fmt: skip
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise SpecaufError(f"{name} cannot be read: {error}", "a whole GGUF file of this machine's byte order, "
                               "or all parts under their first names", "copy it again") from error  # fmt: skip
        names_here = _NAMES | (_OUTER_NORMS if keys.get("general.architecture") == "gemma3" else {})
        tensors |= {_hf_name(tensor.name, names_here): tensor for tensor in reader.tensors}
    return GGUFFile(names[0], keys, tensors)


def _hf_name(name: str, modules: dict[str, str]) -> str:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", name)
    if not found or found[2] not in modules:
        return name
    return f"model.layers.{found[1]}." * (found[1] is not None) + f"{modules[found[2]]}.{found[3]}"


def read_architecture(file: GGUFFile) -> Target:
    """The architecture of a Llama, Qwen2, Qwen3 or Gemma 3, whose tensors are looked at too.

    Raises:
      SpecaufError: naming the architecture, key or tensor that is missing, wrong or not supported.
    """
    kind = file.keys.get("general.architecture")
    if kind not in _KINDS:
        raise SpecaufError(f"{file.where}: architecture {kind!r}", f"one of {', '.join(_KINDS)}", "use another model")
    own = {key.removeprefix(f"{kind}."): _short(x) for key, x in file.keys.items() if key.startswith(f"{kind}.")}
    missing = [key for key in _SIZES.values() if key not in own]
    if missing or _EMBEDDING not in file.tensors:
        raise _misfit(file, f"no {f'{kind}.{missing[0]}' if missing else 'token_embd.weight'}", "a whole model")
    for key, neutral in _NEUTRAL.items():
        if own.get(key, neutral) != neutral:
            raise _misfit(file, f"{kind}.{key} {own[key]!r}", f"{neutral}, or none")
    scaling = {ours: own[f"rope.scaling.{key}"] for key, ours in _SCALING.items() if f"rope.scaling.{key}" in own}
    scaling["rope_type"] = own.get("rope.scaling.type", "none")
    config = read_target(
        {ours: own[theirs] for ours, theirs in _SIZES.items()}
        | {
            "architectures": list(FAMILIES[kind].architectures)[:1],
            "head_dim": own.get("attention.key_length"),
            "num_key_value_heads": own.get("attention.head_count_kv", own["attention.head_count"]),
            "vocab_size": int(file.tensors[_EMBEDDING].shape[-1]),
            "tie_word_embeddings": _HEAD not in file.tensors,
            "rope_theta": own.get("rope.freq_base", 10_000.0),
            "rope_scaling": None if scaling["rope_type"] == "none" else scaling,
        }
        | (_of_gemma(own) if kind == "gemma3" else {}),
        file.where,
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, config.head_dim) != config.head_dim:
            raise _misfit(file, f"{kind}.{key} {own[key]!r}", f"the head's size, {config.head_dim}")
    read = {*_SIZES.values(), *_OPTIONAL, *_NEUTRAL, *(f"rope.scaling.{key}" for key in _SCALING)}
    if unknown := sorted(own.keys() - read):
        warnings.warn(f"{file.where} has keys that nothing here reads: {', '.join(unknown)}", SpecaufWarning,
                      stacklevel=1)  # fmt: skip
    config = _with_divisors(file, config)
    _check_tensors(file, target_tensors(config))
    return config


def _of_gemma(own: dict) -> dict:
    """What no key tells is as llama.cpp has it: five windows in a row, their RoPE's base, the scores of 62 layers."""
    wide = own["block_count"] == 62  # Gemma 3 27B, whose scores are not divided by the root of the heads' size
    size = own.get("attention.key_length", 256)
    scalar = own["embedding_length"] // own["attention.head_count"] if wide else size
    return {
        "head_dim": size,
        "sliding_window": own.get("attention.sliding_window"),
        "rope_local_base_freq": own.get("rope.freq_base_swa", 10_000.0),
        "query_pre_attn_scalar": scalar,
    }


def _short(value):
    """A float32 as the shortest decimal, as people wrote it: 1e-06 and not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _misfit(file: GGUFFile, found: str, expected: str) -> SpecaufError:
    return SpecaufError(f"{file.where} has {found}", expected, "use another file or model")


def _with_divisors(file: GGUFFile, config: Target) -> Target:
    """The architecture with Llama 3's scaling, if the file's divisors of RoPE's frequencies are that scaling's."""
    divisors = read_tensor(file, _DIVISORS, config) if _DIVISORS in file.tensors else np.ones(1)
    if np.all(divisors == 1):
        return config
    factor = round(float(divisors.max()), 3)  # of the slowest, which is stretched whole
    scaled = dataclasses.replace(config, rope_scaling=dataclasses.replace(_LLAMA3, factor=factor))
    expected = rope_frequencies(config)[0] / rope_frequencies(scaled)[0]
    same = divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-3)
    if not same or config.rope_scaling != RopeScaling():
        raise _misfit(file, f"{_DIVISORS} that are not Llama 3's", "low_freq_factor 1, high_freq_factor 4 after 8192 "
                      "positions, and no other scaling")  # fmt: skip
    return scaled


def _check_tensors(file: GGUFFile, wanted: dict[str, tuple]) -> None:
    missing, extra = wanted.keys() - file.tensors, file.tensors.keys() - wanted - {_DIVISORS}
    if missing or extra:
        found = f"no {min(missing)}" if missing else file.tensors[min(extra)].name
        raise _misfit(file, found, f"exactly the {len(wanted)} tensors of its architecture")
    for name, shape in wanted.items():
        tensor = file.tensors[name]
        found = tuple(tensor.shape[::-1].tolist())
        if found != shape:
            raise _misfit(file, f"{tensor.name} of shape {found}", f"{shape} by its keys")
        _dequantised(file, name, slice(1))


def read_tensor(file: GGUFFile, name: str, config: Target) -> np.ndarray:
    """A tensor dequantised, float32 in Hugging Face's order, `[out, in]`.

    llama.cpp keeps the pairs of a Llama's queries and keys that RoPE turns side by side; Hugging Face, in two halves.
    It keeps the scales of Gemma's norms, of which Hugging Face takes 1.

    Raises:
      SpecaufError: it has numbers that are not finite.
    """
    x = _dequantised(file, name)
    if not np.isfinite(x).all():
        raise _misfit(file, f"numbers in {file.tensors[name].name} that are not finite", "a whole file")
    if config.block.centred and name.endswith("norm.weight"):
        x = x - 1
    if config.model_type == "llama" and re.search(r"\.[qk]_proj\.", name):
        x = x.reshape(-1, config.head_dim // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
    return x


def _dequantised(file: GGUFFile, name: str, rows: slice = slice(None)) -> np.ndarray:
    import gguf

    tensor = file.tensors[name]
    try:
        return gguf.dequantize(tensor.data[rows], tensor.tensor_type)
    except NotImplementedError as error:
        raise _misfit(file, f"{tensor.name} stored as {tensor.tensor_type.name}",
                      "a quantisation that the gguf package reads") from error  # fmt: skip
