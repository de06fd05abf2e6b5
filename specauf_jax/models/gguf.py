"""GGUF files of llama.cpp: a target's architecture and tensors, under Hugging Face's names and in its order of rows."""

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError, SpecaufWarning
from specauf_jax.files import as_path, local_copy
from specauf_jax.models.hf_config import TARGET_ARCHITECTURES, read_target

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""config.json's keys → those of GGUF, after the architecture's name."""
_OTHER_KEYS = {
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("rope.freq_base", "vocab_size"),
}
_NEUTRAL = {
    **dict.fromkeys(("expert_count", "attention.sliding_window", "attention.clamp_kqv", "attention.scale"), 0),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "rope.scaling.attn_factor"), 1),
    "attention.causal": True,
}
"""Keys under which a model computes something else, and the values that leave it as it is."""
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all Llama 3.1 to 3.3. GGUF holds what they come to, one factor a frequency, in the tensor _FACTORS."""
_FACTORS = "rope_freqs.weight"

_PARTS = {
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
"""Parts of a layer: GGUF's name → Hugging Face's."""
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open file, or all parts of a split one; tensors stay on the disk until they are read."""

    where: str
    keys: dict[str, Any]
    tensors: dict[str, Any]
    """Name → `gguf.ReaderTensor`, whose `shape` runs from the last axis to the first."""

    @property
    def quantisation(self) -> str:
        """Types of the tensors and how many have each, the most frequent first."""
        found = Counter(tensor.tensor_type.name for tensor in self.tensors.values())
        return ", ".join(f"{kind} ({count})" for kind, count in found.most_common())

    def read(self, name: str) -> np.ndarray:
        """A tensor dequantised, float32 `[out, in]`.

        Raises:
          SpecaufError: of a type that gguf cannot dequantise, or with numbers that are not finite.
        """
        return _finite(_dequantised(self.tensors[name], self.where), name, self.where)


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
    names = [f"{split[1]}-{part + 1:05}-of-{split[2]}.gguf" for part in range(count)] if split else [str(path)]
    keys, tensors = {}, {}
    for name in names:
        if not as_path(name).is_file():
            raise SpecaufError(f"{name} does not exist, or is no file", "a GGUF file, and all of its parts",
                               "check the path")  # fmt: skip
        file = local_copy(name)
        try:
            reader = gguf.GGUFReader(file)
            values = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise SpecaufError(f"{name} cannot be read: {error}", "a whole GGUF file", "copy it again") from error
        if reader.byte_order == "S" or values.get("split.count", 1) not in (0, count):
            found = "has the other byte order" if reader.byte_order == "S" else (
                f"is one of {values['split.count']} parts")  # fmt: skip
            raise SpecaufError(f"{name} {found}", "a whole file for this machine, or parts named -00001-of-0000N.gguf",
                               "take the file as it was published")  # fmt: skip
        keys = keys or values
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    return GGUFFile(names[0], keys, tensors)


def read_architecture(file: GGUFFile) -> Target:
    """The architecture of a file of Llama, Qwen2 or Qwen3.

    Raises:
      SpecaufError: naming the architecture, key or tensor that is missing, wrong or not supported.
    """
    kind, known = file.keys.get("general.architecture"), {kind: name for name, kind in TARGET_ARCHITECTURES.items()}
    if kind not in known:
        raise SpecaufError(f"{file.where}: architecture {kind!r}", f"one of {', '.join(known)}", "use another model")
    own = {key.removeprefix(f"{kind}."): x for key, x in file.keys.items() if key.startswith(f"{kind}.")}
    for key in (*_SIZES.values(), "token_embd.weight"):
        if key not in own | file.tensors:
            name = key if "." in key and key not in _SIZES.values() else f"{kind}.{key}"
            raise SpecaufError(f"{file.where} has no {name}", "every size, and the embedding", "use a whole model")
    values = {ours: own[theirs] for ours, theirs in _SIZES.items()}
    heads, head_dim = values["num_attention_heads"], own.get("attention.key_length")
    if head_dim is None and isinstance(heads, int) and heads > 0:
        head_dim = values["hidden_size"] // heads
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise SpecaufError(f"{file.where}: {kind}.{key} is {own[key]!r}", f"the head's size, {head_dim}",
                               "use another model")  # fmt: skip
    for key in own.keys() & _NEUTRAL.keys():
        if own[key] != _NEUTRAL[key]:
            raise SpecaufError(f"{file.where}: {kind}.{key} is {own[key]!r}", f"{_NEUTRAL[key]}, or none",
                               "use a model without it")  # fmt: skip
    unknown = sorted(key for key in own.keys() - _SIZES.values() - _OTHER_KEYS - _NEUTRAL.keys()
                     if not key.startswith("rope.scaling."))  # fmt: skip
    if unknown:
        warnings.warn(f"{file.where} has keys that nothing here reads: {', '.join(unknown)}", SpecaufWarning,
                      stacklevel=1)  # fmt: skip
    theta = _short(own.get("rope.freq_base", 10_000.0))
    values |= {
        "architectures": [known[kind]],
        "rms_norm_eps": _short(values["rms_norm_eps"]),
        "head_dim": head_dim,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "vocab_size": int(file.tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": {"rope_theta": theta, **_rope_scaling(file, kind, own, theta, head_dim)},
    }
    return read_target(values, file.where)


def tensor_readers(file: GGUFFile, config: Target, wanted: dict[str, tuple]) -> dict[str, Callable[[], np.ndarray]]:
    """Hugging Face's name → a function that reads the tensor, float32; each is checked before any is read.

    Args:
      file: of `open_gguf`.
      config: of `read_architecture`.
      wanted: name → shape, all that the architecture has.

    Raises:
      SpecaufError: a tensor is missing, unknown, of another shape, or of a type that gguf cannot dequantise.
    """
    names = {_hf_name(name): name for name in file.tensors if name != _FACTORS}
    for found, names_found in (("has no", wanted.keys() - names.keys()), ("has", names.keys() - wanted.keys())):
        if names_found:
            raise SpecaufError(f"{file.where} {found} {min(names_found)}", f"the {len(wanted)} tensors of a "
                               f"{config.model_type} model of {config.num_hidden_layers} layers",
                               "use a whole model of this architecture")  # fmt: skip
    for name, shape in wanted.items():
        tensor = file.tensors[names[name]]
        if tuple(tensor.shape[::-1].tolist()) != shape:
            raise SpecaufError(f"{file.where}: {tensor.name} has shape {tuple(tensor.shape[::-1].tolist())}",
                               f"{shape} by the file's keys", "use a whole model")  # fmt: skip
        _dequantised(tensor, file.where, slice(1))

    def reader(name: str) -> Callable[[], np.ndarray]:
        permuted = config.model_type == "llama" and re.search(r"\.[qk]_proj\.", name)
        return lambda: _halves(file.read(names[name]), config.head_dim) if permuted else file.read(names[name])

    return {name: reader(name) for name in wanted}


def _hf_name(name: str) -> str:
    """Of a tensor; one that no table knows keeps GGUF's."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in _PARTS:
        return f"model.layers.{layer[1]}.{_PARTS[layer[2]]}.{kind}"
    return f"{_ENDS[stem]}.{kind}" if stem in _ENDS else name


def _halves(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from llama.cpp's order, pairs that RoPE turns side by side, to Hugging Face's two halves."""
    return x.reshape(-1, head_dim // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def _rope_scaling(file: GGUFFile, kind: str, own: dict, theta: float, head_dim: int) -> dict:
    """RoPE's scaling as in config.json: by keys, or Llama 3's by its factors."""
    prefix = "rope.scaling."
    given = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
    scaling, found = given.get("type", "none"), {}
    if scaling not in ("none", "linear", "yarn"):
        raise SpecaufError(f"{file.where}: {kind}.rope.scaling.type is {scaling!r}", "none, linear or yarn",
                           "use another model")  # fmt: skip
    if scaling != "none":
        names = {"factor": "factor", "original_context_length": "original_max_position_embeddings"} | _YARN
        found = {"rope_type": scaling} | {ours: _short(given[key]) for key, ours in names.items() if key in given}
        unknown = given.keys() - names - {"type", "finetuned", "attn_factor"}
        if unknown:
            raise SpecaufError(f"{file.where} has {kind}.rope.scaling.{min(unknown)}", ", ".join(names),
                               "use a model without it")  # fmt: skip
    if _FACTORS in file.tensors:
        factors = file.read(_FACTORS)
        if not np.all(factors == 1):
            found = _llama3(factors, theta, head_dim, file.where, found)
    return found


def _llama3(factors: np.ndarray, theta: float, head_dim: int, where: str, given: dict) -> dict:
    """Llama 3's scaling, if it is what these factors of RoPE's frequencies come from; the slowest has the whole one."""
    low, high, length = _LLAMA3.values()
    factor = round(float(factors.max()), 3)
    turns = length / (2 * np.pi) * theta ** -(np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if given or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise SpecaufError(f"{where}: {_FACTORS} are not those of Llama 3", f"no other scaling, and the factors of "
                           f"{', '.join(f'{key} {value}' for key, value in _LLAMA3.items())}",
                           "use another model")  # fmt: skip
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _short(value):
    """The shortest decimal that is this float32, as people wrote it: 1e-06 and not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _dequantised(tensor, where: str, rows: slice = slice(None)) -> np.ndarray:
    import gguf

    try:
        return gguf.dequantize(tensor.data[rows], tensor.tensor_type)
    except NotImplementedError as error:
        raise SpecaufError(f"{where}: {tensor.name} is stored as {tensor.tensor_type.name}",
                           "a quantisation that the gguf package dequantises", "use another file") from error  # fmt: skip


def _finite(x: np.ndarray, name: str, where: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise SpecaufError(f"{where}: {name} has numbers that are not finite", "a whole GGUF file", "copy it again")
    return x


