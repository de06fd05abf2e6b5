"""Keys of a config.json that this project does not read: which change nothing, which would change what is computed.

A key that brings tensors of its own needs no place here: tensors that a model does not have are refused.
"""

import warnings
from collections.abc import Iterable

from specauf_jax.checks import nearest
from specauf_jax.errors import SpecaufError, SpecaufWarning

_WORDS = (
    # transformers' bookkeeping
    "architectures auto_map dtype torch_dtype transformers_version transformers.js_config model_type name_or_path "
    "initializer_range use_cache return_dict output_attentions output_hidden_states torchscript use_bfloat16 "
    "cache_implementation tf_legacy_loss chunk_size_feed_forward cross_attention_hidden_size problem_type id2label "
    "label2id finetuning_task task_specific_params tokenizer_class prefix is_decoder tie_encoder_decoder "
    "add_cross_attention pretraining_tp is_llama_config unsloth_fixed unsloth_version attn_implementation "
    "use_flash_attn "
    # special tokens, and settings of generation, which other files and flags hold
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id mask_token begin_suppress_tokens "
    "suppress_tokens forced_bos_token_id forced_eos_token_id bad_words_ids max_length min_length do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences output_scores "
    "return_dict_in_generate remove_invalid_values exponential_decay_length_penalty "
    # training only
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop num_anchors loss_type loss_decay_gamma gamma "
    # a part of what another key turns on
    "swa_window_size max_window_layers use_qk_norm"
)
_HARMLESS = frozenset(_WORDS.split())
"""Keys that change no number."""


def _each(keys: str, *neutral) -> dict[str, tuple]:
    return dict.fromkeys(keys.split(), neutral)


_NEUTRAL = (
    # which positions a slot sees
    _each("causal use_swa sliding_window_non_causal use_bidirectional_attention is_encoder_decoder alibi", False)
    | _each("attention_chunk_size sliding_window_size sliding_window_pattern window_size", 0)
    # scores, values, residuals and logits
    | _each("final_logit_softcapping attn_logit_softcapping logit_softcapping logits_soft_cap clip_qkv", 0)
    | _each("output_multiplier logits_scaling logit_scale lm_head_multiplier embedding_multiplier scale_emb", 1)
    | _each("embedding_scale input_embedding_scale residual_multiplier attention_value_scale key_multiplier", 1)
    | _each("mup_scale width_multiplier", 1)
    | _each("attention_multiplier query_pre_attn_scalar attention_scale softmax_scale scale_depth dim_model_base")
    | _each("attention_sink_bias add_full_attention_sink_bias add_swa_attention_sink_bias attention_sinks", False)
    | _each("scale_embedding normalize_embedding use_parallel_residual parallel_attn norm_after", False)
    # RoPE
    | _each("is_neox_style", True)
    | _each("rope_interleave rope_interleaved rotary_interleaved use_mrope", False)
    | _each("partial_rotary_factor rotary_pct rotary_percentage rope_pct", 1)
    | _each("no_rope_layer_interval no_rope_layers rope_local_base_freq swa_rope_theta", 0, [])
    | _each("position_scheme", "incremental")
    | _each("hidden_activation", "silu")
    | _each("pruned_heads", {}, [])
)
"""Keys under which a model computes something else: all values that leave it as it is, null besides."""

_EQUAL = {"draft_vocab_size": "vocab_size", "target_vocab_size": "vocab_size", "target_hidden_size": "hidden_size"}
"""Keys that must repeat another one's value."""


def check_keys(values: dict, where: str, read: Iterable[str], *, strict: bool = False) -> None:
    """Refuse what is not computed here, and warn of keys that nobody here knows.

    Args:
      values: an object of config.json.
      where: its name, for messages.
      read: keys that the caller looks at.
      strict: refuse unknown keys too.

    Raises:
      SpecaufError: naming the key.
    """
    read = set(read)
    for key in sorted(values.keys() - read):
        neutral = [values.get(_EQUAL[key])] if key in _EQUAL else _NEUTRAL.get(key)
        if neutral is not None and values[key] is not None and values[key] not in neutral:
            wanted = " or ".join(repr(value) for value in neutral) or "none"
            raise SpecaufError(f"{where}: {key} is {values[key]!r}", wanted, "use a model without it")
    unknown = unknown_keys(values, read)
    if unknown and strict:
        raise SpecaufError(
            f"{where}: unknown key {unknown[0]!r}{nearest(unknown[0], read)}",
            f"keys of {', '.join(sorted(read))}",
            "correct it, or remove it if the drafter was trained without it",
        )
    if unknown:
        named = ", ".join(f"{key}{nearest(key, read)}" for key in unknown)
        warnings.warn(f"{where} has keys that nothing here reads: {named}", SpecaufWarning, stacklevel=1)


def unknown_keys(values: dict, read: Iterable[str]) -> list[str]:
    """Keys that stand in no table here, sorted, but for those whose value says that nothing is asked for."""
    known = _HARMLESS | _NEUTRAL.keys() | _EQUAL.keys() | set(read)
    return sorted(key for key in values.keys() - known if not key.startswith("_") and not _says_nothing(values[key]))


def _says_nothing(value) -> bool:
    return value is None or (value is not True and value in (False, 0, 1, "", [], {}))
