"""The tokenizer inside a GGUF file, as files of a Hugging Face folder.

It splits texts as llama.cpp does; transformers' conversion ignores tokenizer.ggml.pre, and takes bos for eos.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from specauf_jax.data.chat import turn_end
from specauf_jax.data.tokenizer import STOP_TOKENS, load_tokenizer
from specauf_jax.errors import SpecaufError, SpecaufWarning

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = range(1, 6)
"""Of tokenizer.ggml.token_type."""
ENDS = (*STOP_TOKENS, "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")
"""Tokens that end an answer in every file that has them, whatever its keys name (as in llama.cpp)."""
_END_IF_SPECIAL = "</s>"  # of Gemma it is a tag of HTML, where llama.cpp ends, too
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
"""Our names of special tokens → their keys, before _token_id."""

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_AND_NUMBERS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                      r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What tokenizer.ggml.pre stands for."""

    splits: tuple[str, ...]
    """A text is split by the first, what comes of it by the second, and so on."""
    whole_words: bool = False
    """A word that is a token is that token, whatever merges say."""
    add_bos: bool = False
    nfc: bool = False
    """As the original tokenizers do; llama.cpp does not."""


_KINDS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Kind((_WORDS_AND_NUMBERS % 3,), True, True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Kind((_WORDS_AND_NUMBERS % 1,), nfc=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _Kind((r"\p{N}", _WORDS))),
    "gpt-2": _Kind((_WORDS,)),
    "default": _Kind((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def write_tokenizer(keys: dict[str, Any], where: str, embeddings: int, folder: Path) -> dict[int, str]:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
      keys: of the GGUF file.
      where: its name, for messages.
      embeddings: of the model.
      folder: local, to write into.

    Returns:
      Tokens that end an answer by their ids, that of the end of a text first.

    Raises:
      SpecaufError: naming the key that is missing, wrong or not supported.
    """
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    try:
        tokens, ids, tokenizer = _tokenizer(own, where, embeddings)
        text = tokenizer.to_str(pretty=True)
    except SpecaufError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise SpecaufError(f"{where}: no tokenizer comes of its keys: {error!r}", "tokens and merges that fit",
                           "use another file") from error  # fmt: skip
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    added = tokenizer.get_added_tokens_decoder()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if ids[name] is not None}
    _write(folder / "tokenizer_config.json", settings | _template(keys))
    stops = [ids["eos"], ids["eot"], ids["eom"], *(
        id_ for id_, token in added.items()
        if token.content in ENDS or (token.content == _END_IF_SPECIAL and token.special)
    )]  # fmt: skip
    if _template(keys):
        stops.append(turn_end(load_tokenizer(folder)))
    found = {id_: tokens[id_] for id_ in stops if id_ is not None}
    if not found:
        raise _wrong(where, "eos_token_id", None, "a token that ends an answer")
    special = {"bos_token_id": ids["bos"], "eos_token_id": list(found), "pad_token_id": ids["pad"]}
    _write(folder / "generation_config.json", {key: value for key, value in special.items() if value is not None})
    return found


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _wrong(where: str, key: str, found, expected: str) -> SpecaufError:
    return SpecaufError(f"{where}: tokenizer.ggml.{key} is {found!r}", expected,
                        "use another file, or the tokenizer of the model's Hugging Face folder")  # fmt: skip


def _vocabulary(own: dict, where: str, embeddings: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, without those at the end that only fill up the embedding."""
    tokens = own.get("tokens") or []
    types = own.get("token_type") or [_NORMAL] * len(tokens)
    count = len(tokens)
    if not count or not len(types) == len(set(tokens)) == count <= embeddings:
        raise SpecaufError(f"{where} has {count} tokens, {len(set(tokens))} different, {len(types)} types and "
                           f"{embeddings} embeddings", "tokenizer.ggml.tokens, a type and an embedding for each",
                           "use another file")  # fmt: skip
    while types[count - 1] == _UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    return tokens[:count], types[:count]


def _tokenizer(own: dict, where: str, embeddings: int) -> tuple[list[str], dict[str, Any], Any]:
    """Tokens, the special ones' ids (None where there is none), and the `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, processors

    tokens, types = _vocabulary(own, where, embeddings)
    default = {"bos": 1, "eos": 2, "unk": 0} if own.get("model") == "llama" else {}
    ids: dict[str, Any] = {name: own.get(f"{key}_token_id", default.get(name)) for name, key in _NAMES.items()}
    for name, id_ in ids.items():
        if id_ is not None and not 0 <= id_ < len(tokens):
            raise _wrong(where, f"{_NAMES[name]}_token_id", id_, f"an id below {len(tokens)}")
    make = {"gpt2": _byte_level, "llama": _sentencepiece}.get(own.get("model", ""))
    if make is None:
        raise _wrong(where, "model", own.get("model"), "gpt2 or llama")
    tokenizer, add_bos = make(own, where, tokens, types, ids)
    for token, kind in zip(tokens, types, strict=True):
        special = kind in (_UNKNOWN, _CONTROL)
        if special or kind == _USER:
            added = AddedToken(token, normalized=False, special=special)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    front, back = (
        [(tokens[ids[name]], ids[name])] if own.get(f"add_{name}_token", given) and ids[name] is not None else []
        for name, given in (("bos", add_bos), ("eos", False))
    )
    ends = processors.TemplateProcessing(
        single=[*(token for token, _ in front), "$A", *(token for token, _ in back)], special_tokens=front + back
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), ends])
    return tokens, ids, tokenizer


def _byte_level(own: dict, where: str, tokens: list[str], types: list[int], ids: dict):
    """A BPE over bytes, as GPT-2's; and whether texts begin with bos if no key says so."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = own.get("pre", "default")
    if name not in _KINDS:
        raise _wrong(where, "pre", name, f"one of {', '.join(_KINDS)}")
    if name == "default":
        warnings.warn(f"{where} does not say how its tokenizer splits texts: llama.cpp's default is taken, "
                      "which may not be how the model learned", SpecaufWarning, stacklevel=1)  # fmt: skip
    kind = _KINDS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in own["merges"]]
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges, ignore_merges=kind.whole_words))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in kind.splits]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind.add_bos


def _sentencepiece(own: dict, where: str, tokens: list[str], types: list[int], ids: dict):
    """SentencePiece's BPE, whose merges follow from scores; as `_byte_level`."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    vocabulary, scores = _numbered(tokens), dict(zip(tokens, own["scores"], strict=False))
    others = [token for token, kind in zip(tokens, types, strict=True) if kind != _NORMAL]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores, others),
            unk_token=tokens[ids["unk"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = own.get("add_space_prefix", True)
    normal, decoded = [normalizers.Replace(" ", "▁")], [decoders.Replace("▁", " ")]
    decoded += [decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefixed + normal)
    tokenizer.decoder = decoders.Sequence(decoded + [decoders.Strip(" ", 1, 0)] * prefixed)
    return tokenizer, True


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _template(keys: dict) -> dict:
    """chat_template of tokenizer_config.json: one text, or several by name; nothing without one."""
    first = "tokenizer.chat_template"
    named = {key.removeprefix(f"{first}."): text for key, text in keys.items() if key.startswith(f"{first}.")}
    if not named:
        return {"chat_template": keys[first]} if first in keys else {}
    named |= {"default": keys[first]} if first in keys else {}
    return {"chat_template": [{"name": name, "template": text} for name, text in named.items()]}
