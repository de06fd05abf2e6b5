"""GGUF files of small random models, as llama.cpp's converter writes them."""

import re

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from specauf_jax.architecture import Target
from specauf_jax.data.tokenizer import CHATML
from specauf_jax.models.gguf import _NAMES, _OUTER_NORMS
from specauf_jax.models.weights import target_tensors

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ a", "Ġa b", "a b", "1 2", "12 3", "Ġ 123"]
TOKENS = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END, START, TURN_END = range(len(TOKENS) - 3, len(TOKENS))
_OURS = {theirs: ours for ours, theirs in _NAMES.items()}


def architecture(model_type="llama", **changes) -> Target:
    """Two layers of width 32, or seven of Gemma 3; the embedding has more rows than there are tokens."""
    sizes = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
             "max_position_embeddings": 512, "rope_theta": 1e6, "tie_word_embeddings": False}  # fmt: skip
    if model_type == "gemma3":
        types = tuple("full_attention" if i == 5 else "sliding_attention" for i in range(7))
        sizes |= {"num_hidden_layers": 7, "tie_word_embeddings": True, "layer_types": types, "sliding_window": 24,
                  "rope_local_base_freq": 1e4, "query_pre_attn_scalar": changes.get("head_dim", 8)}  # fmt: skip
    return Target(model_type=model_type, **(sizes | changes))


def keys(config: Target) -> dict:
    """Of the file's head."""
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
    }
    if config.sliding_window is not None:
        sizes["attention.sliding_window"] = config.sliding_window
    return {f"{config.model_type}.{key}": value for key, value in sizes.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [NORMAL] * END + [CONTROL] * 3,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": TURN_END,
        "tokenizer.chat_template": CHATML,
    }


def tensors(config: Target, seed=0) -> dict[str, np.ndarray]:
    """Random ones, by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    scales = {1: 1.0, 2: config.hidden_size**-0.5}
    return {name: (rng.standard_normal(shape) * scales[len(shape)]).astype(np.float32)
            for name, shape in target_tensors(config).items()}  # fmt: skip


def write(path, config: Target, found=None, kind="F32", changes=None, more=None, **settings):
    """Write a file; returns the tensors that are in it, by Hugging Face's names and in its order.

    Args:
      path: of the file.
      config: architecture.
      found: tensors; None makes random ones.
      kind: how matrices are stored.
      changes: of `keys`; None removes one.
      more: tensors by GGUF's names; None removes one.
      settings: of `gguf.GGUFWriter`.
    """
    found, stored = tensors(config) if found is None else found, {}
    writer, kind = gguf.GGUFWriter(path, config.model_type, **settings), gguf.GGMLQuantizationType[kind]
    for key, value in (keys(config) | (changes or {})).items():
        if value is not None:
            _add_key(writer, key, value)
    rows = {}
    for name, x in found.items():
        type_ = kind if x.ndim == 2 else gguf.GGMLQuantizationType.F32
        found[name] = gguf.dequantize(gguf.quantize(x, type_), type_)
        if config.model_type == "llama" and re.search(r"[qk]_proj", name):
            x = x.reshape(-1, 2, config.head_dim // 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        if config.block.centred and name.endswith("norm.weight"):
            x = x + 1
        rows[gguf_name(name, config)] = gguf.quantize(x, type_), type_
    for name, x in (more or {}).items():
        rows[name] = x if x is None or isinstance(x, tuple) else (x, None)
    stored = {name: pair for name, pair in rows.items() if pair is not None}
    for name, (x, type_) in stored.items():
        writer.add_tensor(name, x, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def gguf_name(name: str, config: Target) -> str:
    """Of Hugging Face's."""
    names = _OURS | ({theirs: ours for ours, theirs in _OUTER_NORMS.items()} if config.block.outer_norms else {})
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(\w+)", name)
    if layer:
        return f"blk.{layer[1]}.{names[layer[2]]}.{layer[3]}"
    module, _, last = name.rpartition(".")
    return f"{names[module]}.{last}"


def _add_key(writer: gguf.GGUFWriter, key: str, value) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    add[type(value)](key, value)
