"""The tokenizer inside a GGUF file, as a Hugging Face folder.

transformers has a conversion, which splits texts of every BPE as GPT-2 does and takes bos for eos; so ours follows what
llama.cpp does with the same keys, and the original tokenizers where they do more (NFC).
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from specauf_jax.data.chat import turn_end
from specauf_jax.data.tokenizer import load_tokenizer
from specauf_jax.errors import SpecaufError, SpecaufWarning

_UNKNOWN, _CONTROL, _USER, _UNUSED = 2, 3, 4, 5
"""Of tokenizer.ggml.token_type."""
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>")
"""Tokens that end an answer in every file that has them, whatever its keys name (llama.cpp's rule)."""

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What tokenizer.ggml.pre stands for."""

    splits: tuple[str, ...]
    """A text is split by the first, what comes of it by the second, and so on."""
    whole_words: bool = False
    """A word that is a token is that token, whatever merges say."""
    add_bos: bool = False
    nfc: bool = False


_LLAMA3 = _Kind((_CASELESS.format(digits="{1,3}"),), whole_words=True, add_bos=True)
_QWEN2 = _Kind((_CASELESS.format(digits=""),), nfc=True)
_DIGITS = _Kind((r"\p{N}", _WORDS))
_KINDS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), _DIGITS),
    "gpt-2": _Kind((_WORDS,)),
    "tekken": _Kind((_TEKKEN,), whole_words=True, add_bos=True),
    "default": _Kind((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


def write_tokenizer(keys: dict[str, Any], where: str, folder: Path) -> tuple[list[int], list[str]]:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
      keys: of the GGUF file.
      where: its name, for messages.
      folder: local, to write into.

    Returns:
      Ids that end an answer, the end-of-text token's first; and the tokens.

    Raises:
      SpecaufError: naming the key that is missing, wrong or not supported.
    """
    from tokenizers import AddedToken

    own = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    tokens, types = _vocabulary(own, where)
    make = {"gpt2": _byte_level, "llama": _sentencepiece}.get(own.get("model"))
    if make is None:
        raise SpecaufError(f"{where}: tokenizer.ggml.model is {own.get('model')!r}", "gpt2 or llama",
                           "use another model, or the tokenizer of its Hugging Face folder")  # fmt: skip
    ids = {name: _special(own, where, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom")}
    ids |= {"unk": _special(own, where, "unknown_token_id", len(tokens)),
            "pad": _special(own, where, "padding_token_id", len(tokens))}  # fmt: skip
    try:
        tokenizer, add_bos = make(own, where, tokens, types, ids)
        for token, kind in zip(tokens, types, strict=True):
            if kind in (_UNKNOWN, _CONTROL) or token in ENDS:
                tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
            elif kind == _USER:
                tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    except SpecaufError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise SpecaufError(f"{where}: no tokenizer comes of its keys: {error}", "tokens and merges that fit",
                           "use another file") from error  # fmt: skip
    _surround(tokenizer, tokens, ids, own.get("add_bos_token", add_bos), own.get("add_eos_token", False))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if ids[name] is not None},
        **_templates(keys),
    }
    _write(folder / "tokenizer_config.json", settings)
    stops = [ids["eos"], ids["eot"], ids["eom"], *(tokens.index(token) for token in ENDS if token in tokens)]
    if "chat_template" in settings:
        stops.append(turn_end(load_tokenizer(folder)))
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if not stops:
        raise SpecaufError(f"{where} names no token that ends an answer", "tokenizer.ggml.eos_token_id",
                           "use another file")  # fmt: skip
    named = {"bos_token_id": ids["bos"], "pad_token_id": ids["pad"], "eos_token_id": stops}
    _write(folder / "generation_config.json", {key: value for key, value in named.items() if value is not None})
    return stops, tokens


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _vocabulary(own: dict, where: str) -> tuple[list[str], list[int]]:
    """Tokens and their types, without those that only fill up the embedding."""
    tokens, types = own.get("tokens"), own.get("token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise SpecaufError(f"{where} has no tokenizer.ggml.tokens", "a tokenizer", "use a file with its tokenizer")
    types = [1] * len(tokens) if types is None else types
    if not isinstance(types, list) or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise SpecaufError(f"{where}: tokenizer.ggml.tokens has {len(tokens)} tokens, {len(set(tokens))} of them "
                           f"different, and there are {len(types)} types", "one type a token, and no token twice",
                           "use another file")  # fmt: skip
    count = len(tokens)
    while count and types[count - 1] == _UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    return tokens[:count], types[:count]


def _special(own: dict, where: str, key: str, count: int) -> int | None:
    found = own.get(key)
    if found is not None and not (isinstance(found, int) and 0 <= found < count):
        raise SpecaufError(f"{where}: tokenizer.ggml.{key} is {found!r}", f"an id below {count}", "use another file")
    return found


def _byte_level(own: dict, where: str, tokens: list[str], types: list[int], ids: dict):
    """A BPE over bytes, as GPT-2's; and whether texts begin with bos if no key says so."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = own.get("pre", "default")
    if name not in _KINDS:
        raise SpecaufError(f"{where}: tokenizer.ggml.pre is {name!r}", f"one of {', '.join(_KINDS)}",
                           "use the tokenizer of the model's Hugging Face folder")  # fmt: skip
    if name == "default":
        warnings.warn(f"{where} does not say how its tokenizer splits texts: they are split as llama.cpp does then, "
                      "which may not be how the model learned", SpecaufWarning, stacklevel=1)  # fmt: skip
    kind = _KINDS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in own.get("merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind.whole_words))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in kind.splits]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind.add_bos


def _sentencepiece(own: dict, where: str, tokens: list[str], types: list[int], ids: dict):
    """SentencePiece's BPE, whose merges follow from the scores; as `_byte_level`."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    scores = own.get("scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise SpecaufError(f"{where} has no tokenizer.ggml.scores", "one for each token", "use another file")
    for name, default in (("bos", 1), ("eos", 2), ("unk", 0)):
        ids[name] = default if ids[name] is None else ids[name]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    skipped = [token for token, kind in zip(tokens, types, strict=True) if kind != 1]
    merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=False)), skipped)
    unknown = tokens[ids["unk"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = own.get("add_space_prefix", True)
    front, back = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if prefixed else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *back]
    )
    return tokenizer, True


def _surround(tokenizer, tokens: list[str], ids: dict, bos: bool, eos: bool) -> None:
    """Let texts begin with bos and end with eos, as the file says."""
    from tokenizers import processors

    front = [tokens[ids["bos"]]] if bos and ids["bos"] is not None else []
    back = [tokens[ids["eos"]]] if eos and ids["eos"] is not None else []
    ends = processors.TemplateProcessing(
        single=[*front, "$A", *back],
        pair=[*front, "$A", *back, *(f"{token}:1" for token in front), "$B:1", *(f"{token}:1" for token in back)],
        special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(front + back)],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), ends])


def _templates(keys: dict) -> dict:
    """chat_template for tokenizer_config.json: one text, or several by name."""
    prefix = "tokenizer.chat_template"
    found = {key.removeprefix(f"{prefix}."): text for key, text in keys.items() if key.startswith(f"{prefix}.")}
    if prefix in keys:
        found["default"] = keys[prefix]
    if set(found) == {"default"}:
        return {"chat_template": found["default"]}
    return {"chat_template": [{"name": name, "template": text} for name, text in found.items()]} if found else {}
