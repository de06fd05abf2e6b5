"""GGUF files become targets: their numbers, tokens and stops, and what is refused."""

import json
import sys
from types import SimpleNamespace

import gguf
import gguf_files
import numpy as np
import pytest
from gguf_files import ALPHABET, CONTROL, END, NORMAL, START, TOKENS, TURN_END, UNKNOWN, UNUSED, USER
from safetensors.numpy import load_file

from specauf_jax import cli, files
from specauf_jax.data import gguf_tokenizer
from specauf_jax.data.chat import encode_prompt
from specauf_jax.data.tokenizer import CHATML, load_tokenizer
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.models import weights
from specauf_jax.models.gguf import open_gguf, read_architecture
from specauf_jax.models.rope import rope_frequencies
from specauf_jax.models.target import TargetStep
from specauf_jax.models.weights import load_target, target_config
from specauf_jax.parts import RopeScaling

KINDS = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "llama, tied": {"tie_word_embeddings": True},
         "qwen2, linear": {"rope_scaling": RopeScaling("linear", 4.0)},
         "qwen3, yarn": {"rope_scaling": RopeScaling("yarn", 4.0, 128, beta_fast=16.0)}}  # fmt: skip
ROPE = {
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
             "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.finetuned": True},
}  # fmt: skip


@pytest.fixture
def convert(tmp_path, capsys):
    """Runs the command on model.gguf; returns its folder and what it said."""

    def run(*flags, code=0):
        out = tmp_path / "out"
        assert cli.main(["convert", "--gguf", str(tmp_path / "model.gguf"), "--out", str(out), *flags]) == code
        said = capsys.readouterr()
        return out, said.out + said.err

    return run


def ggml(**changes):
    return {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def stops(folder):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("case", KINDS)
def test_weights_and_architecture_come_back(case, tmp_path, convert):
    kind, _, rope = case.partition(", ")
    config = gguf_files.architecture(kind, **KINDS[case])
    scaling = {f"{kind}.{key}": value for key, value in ROPE.get(rope, {}).items()}
    given = gguf_files.write(tmp_path / "model.gguf", config, changes=scaling)
    out, said = convert()
    found = load_file(out / "model.safetensors")
    assert found.keys() == given.keys() and all(np.array_equal(found[name], given[name]) for name in given)
    assert target_config(out) == config
    assert f"stored as F32 ({len(given)}), stops at <|im_end|> ({TURN_END}), <|endoftext|> ({END}): " in said
    assert "ForCausalLM of 0.0 M parameters" in said and "warning" not in said


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_numbers_are_those_of_gguf(kind, tmp_path, convert):
    config = gguf_files.architecture("llama", head_dim=32, hidden_size=64)
    given = gguf_files.write(tmp_path / "model.gguf", config, kind=kind)
    out, said = convert()
    found = load_file(out / "model.safetensors")
    assert all(np.array_equal(found[name], given[name]) for name in given) and f"stored as {kind} (16), F32 (5)" in said


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ4_XS"])
def test_kinds_that_gguf_reads_but_does_not_write(kind, tmp_path, convert):
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    config = gguf_files.architecture("qwen3", hidden_size=block, intermediate_size=block, num_hidden_layers=1)
    raw = np.random.default_rng(0).integers(0, 60, (block, size), np.uint8)  # float16 below 1 wherever they stand
    gguf_files.write(tmp_path / "model.gguf", config, more={"blk.0.ffn_up.weight": (raw, type_)})
    out, said = convert()
    found = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert np.array_equal(found, gguf.dequantize(raw, type_)) and f"{kind} (1)" in said


def test_a_target_so_made_is_read_and_decodes_in_bfloat16_shards(tmp_path, convert, monkeypatch):
    config = gguf_files.architecture("llama", tie_word_embeddings=True)
    given = gguf_files.write(tmp_path / "model.gguf", config, kind="Q8_0")
    monkeypatch.setattr(weights, "SHARD_BYTES", 8_000)
    out, _ = convert("--dtype", "bfloat16")
    assert len(list(out.glob("model-0000?-of-00005.safetensors"))) == 5 and target_config(out) == config
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    params, _ = load_target(out)
    embedding = given["model.embed_tokens.weight"].astype(weights._NUMPY["bfloat16"]).astype(np.float32)
    assert np.array_equal(params["embed_tokens"]["embedding"], embedding)
    tokenizer = load_tokenizer(out)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "ab 123"}])
    decoding = Decoding(target_step=TargetStep(config, (1,)), stop_tokens=tokenizer.stops)
    [answer] = generate(None, params, [prompt], config=decoding, max_new_tokens=4, batch_size=1)
    assert prompt[0] == START and 1 <= len(answer.tokens) <= 4


def test_one_shard_holds_what_fits(tmp_path, convert, monkeypatch):
    gguf_files.write(tmp_path / "model.gguf", gguf_files.architecture())
    written = []
    monkeypatch.setattr(weights, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(weights, "write_tensors",
                        lambda tensors, path: written.append(sum(x.nbytes for x in tensors.values())))  # fmt: skip
    convert()
    assert len(written) > 1 and max(written) <= 50_000 + 288 * 32 * 4


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_known_by_its_divisors(factor, tmp_path, convert):
    config = gguf_files.architecture("llama", head_dim=32, rope_theta=5e5, max_position_embeddings=131_072)
    scaling = RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    scaled = gguf_files.architecture("llama", head_dim=32, rope_theta=5e5, max_position_embeddings=131_072,
                                     rope_scaling=scaling)  # fmt: skip
    divisors = rope_frequencies(config)[0] / rope_frequencies(scaled)[0]
    assert len(set(divisors.round(3).tolist())) > 2
    gguf_files.write(tmp_path / "model.gguf", config, more={"rope_freqs.weight": divisors})
    assert target_config(convert()[0]) == scaled


def test_divisors_of_one_are_none(tmp_path, convert):
    config = gguf_files.architecture()
    gguf_files.write(tmp_path / "model.gguf", config, more={"rope_freqs.weight": np.ones(4, np.float32)})
    assert target_config(convert()[0]) == config


def test_any_part_of_a_split_file_stands_for_all(tmp_path, convert):
    config = gguf_files.architecture("qwen3")
    given = gguf_files.write(tmp_path / "model.gguf", config, split_max_tensors=9)
    (tmp_path / "model.gguf").symlink_to("unused")
    first, *others = sorted(tmp_path.glob("model-*.gguf"))
    assert len(others) == 2
    for part in (first, others[-1]):
        out = tmp_path / part.stem
        assert cli.main(["convert", "--gguf", str(part), "--out", str(out)]) == 0
        found = load_file(out / "model.safetensors")
        assert found.keys() == given.keys() and all(np.array_equal(found[name], given[name]) for name in given)
    others[0].unlink()
    assert cli.main(["convert", "--gguf", str(first), "--out", str(tmp_path / "new")]) == 2
    first.rename(tmp_path / "part.gguf")
    assert cli.main(["convert", "--gguf", str(tmp_path / "part.gguf"), "--out", str(tmp_path / "new")]) == 2


# ---------------------------------------------------------------------------------------------
# Tokens


SPLITS = {
    "llama-bpe": ["123", "1", " ", "123"],
    "qwen2": ["1", "2", "3", "1", " ", "1", "2", "3"],
    "smollm": ["1", "2", "3", "1", " ", "1", "2", "3"],
    "gpt-2": ["123", "1", " 123"],
    "default": ["123", "1", " ", "123"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_numbers_are_split_as_each_kind_does(pre, tmp_path, convert):
    gguf_files.write(tmp_path / "model.gguf", gguf_files.architecture(), changes=ggml(pre=pre, bos_token_id=END))
    out, said = convert()
    tokenizer = load_tokenizer(out)
    ids = tokenizer("1231 123", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([id_]) for id_ in ids] == SPLITS[pre]
    assert (tokenizer("a")["input_ids"][0] == END) == (pre == "llama-bpe")
    assert ("llama.cpp's default is taken" in said) == (pre == "default")


def test_only_qwens_texts_are_composed_and_only_llamas_words_are_looked_up_whole(tmp_path):
    where = gguf_files.architecture()
    found = {}
    for pre in ("qwen2", "llama-bpe"):
        changes = ggml(pre=pre, tokens=[*TOKENS, "xyz"], token_type=[NORMAL] * len(TOKENS) + [NORMAL])
        gguf_tokenizer.write_tokenizer(gguf_files.keys(where) | changes, "file", 999, tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        found[pre] = len(tokenizer.encode("e\u0301")), len(tokenizer.encode("xyz"))
    assert found == {"qwen2": (2, 3), "llama-bpe": (3, 1)}


def test_flags_of_the_ends_of_texts(tmp_path):
    keys = gguf_files.keys(gguf_files.architecture())
    changes = ggml(pre="llama-bpe", bos_token_id=START, add_bos_token=False, add_eos_token=True)
    gguf_tokenizer.write_tokenizer(keys | changes, "file", 999, tmp_path)
    assert load_tokenizer(tmp_path)("a")["input_ids"] == [TOKENS.index("a"), TURN_END]


PIECES = ["<unk>", "aa", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "▁a", "ab", "▁ab", "<tool>"]
SENTENCEPIECE = ggml(model="llama", pre="default", tokens=PIECES, scores=[0.0] * 8 + [-1.0, 2.0, 1.0, -1000.0],
                     token_type=[UNKNOWN, CONTROL, CONTROL, 6, 6, *[NORMAL] * 6, USER], eos_token_id=None)  # fmt: skip


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_scores(prefix, tmp_path, convert):
    changes = SENTENCEPIECE | ggml(add_space_prefix=prefix)
    gguf_files.write(tmp_path / "model.gguf", gguf_files.architecture(), changes=changes)
    out, _ = convert()
    tokenizer = load_tokenizer(out)
    ids = {text: tokenizer.tokenize(text) for text in ("ab ab", "é<tool>a")}
    front = ["▁"] if prefix else []
    assert ids["ab ab"] == (["▁ab", "▁ab"] if prefix else ["ab", "▁ab"])
    assert ids["é<tool>a"] == [*front, "<0xC3>", "<0xA9>", "<tool>", "▁a" if prefix else "a"]
    assert 1 not in tokenizer("baa", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    encoded = tokenizer("ab ab")["input_ids"]
    assert encoded[0] == 1 and tokenizer.decode(encoded, skip_special_tokens=True) == "ab ab" and stops(out) == [2]


def test_padding_is_no_token_but_unused_ones_within_are(tmp_path):
    tokens = [*TOKENS[:END], f"[PAD{END}]", *TOKENS[END:]]
    tokens += [f"[PAD{len(tokens)}]", f"[PAD{len(tokens) + 1}]"]
    types = [NORMAL] * END + [UNUSED] + [CONTROL] * 3 + [UNUSED] * 2
    keys = gguf_files.keys(gguf_files.architecture()) | ggml(tokens=tokens, token_type=types, eos_token_id=END + 1)
    gguf_tokenizer.write_tokenizer(keys, "file", len(tokens), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == len(tokens) - 2
    assert tokenizer.convert_ids_to_tokens(END) == f"[PAD{END}]" and tokenizer.eos_token_id == END + 1


OWN = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} <|over|>{% endif %}{% endfor %}"


def test_every_stop_is_named(tmp_path):
    """The keys', those known by name, and what the template writes after an answer."""
    tokens = [*TOKENS, "<|over|>", "<|eom_id|>", "<|a|>", "<|b|>", "</s>"]
    types = [NORMAL] * END + [CONTROL] * 7 + [NORMAL]
    keys = gguf_files.keys(gguf_files.architecture()) | {"tokenizer.chat_template": OWN}
    id_ = tokens.index
    keys |= ggml(tokens=tokens, token_type=types, eos_token_id=id_("<|a|>"), eot_token_id=id_("<|b|>"))
    found = gguf_tokenizer.write_tokenizer(keys, "file", 999, tmp_path)
    named = ["<|a|>", "<|b|>", "<|endoftext|>", "<|im_end|>", "<|eom_id|>", "<|over|>"]
    assert found == {id_(token): token for token in named} and stops(tmp_path) == list(found)
    assert load_tokenizer(tmp_path).stops == tuple(sorted(found))


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[-1]['content'] }}"])
def test_templates_that_end_no_turn(template, tmp_path):
    keys = gguf_files.keys(gguf_files.architecture()) | {"tokenizer.chat_template": template}
    keys = {key: value for key, value in keys.items() if value is not None}
    found = gguf_tokenizer.write_tokenizer(keys, "file", 999, tmp_path)
    assert list(found) == [TURN_END, END] and load_tokenizer(tmp_path).chat_template == template


def test_templates_by_name(tmp_path):
    keys = gguf_files.keys(gguf_files.architecture()) | {"tokenizer.chat_template.tool_use": "{{ tools }}"}
    gguf_tokenizer.write_tokenizer(keys, "file", 999, tmp_path)
    assert load_tokenizer(tmp_path).chat_template == {"tool_use": "{{ tools }}", "default": CHATML}


# ---------------------------------------------------------------------------------------------
# What is refused


def not_finite(config):
    found = gguf_files.tensors(config)
    found["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    return found


CONFIG = gguf_files.architecture("llama")
MANY = [*TOKENS, *(f"new {i}" for i in range(30))]
ROW, VECTOR = np.ones((1, 32), np.float32), np.ones(8, np.float32)
REFUSED = {
    "another architecture": (dict(changes={"general.architecture": "gemma2"}), "'gemma2'; one of llama, qwen2, qwen3"),
    "no size": (dict(changes={"llama.embedding_length": None}), "no llama.embedding_length"),
    "a wrong size": (dict(changes={"llama.attention.head_count": "4"}), "num_attention_heads is '4'"),
    "sizes that do not fit": (dict(changes={"llama.feed_forward_length": 65}), "ffn_down.weight of shape (32, 64)"),
    "turns part of a head": (dict(changes={"llama.rope.dimension_count": 4}), "llama.rope.dimension_count 4"),
    "other values": (dict(changes={"llama.attention.value_length": 4}), "llama.attention.value_length 4"),
    "not causal": (dict(changes={"llama.attention.causal": False}), "llama.attention.causal False"),
    "experts": (dict(changes={"llama.expert_count": 8}), "llama.expert_count 8"),
    "longrope": (dict(changes={"llama.rope.scaling.type": "longrope"}), "'longrope'; default, linear, llama3, yarn"),
    "no factor": (dict(changes={"llama.rope.scaling.type": "linear"}), "no factor"),
    "other divisors": (dict(more={"rope_freqs.weight": np.array([1, 1, 2, 9], np.float32)}), "rope_freqs.weight that"),
    "no embedding": (dict(more={"token_embd.weight": None}), "no token_embd.weight"),
    "no tensor": (dict(more={"blk.1.ffn_up.weight": None}), "no model.layers.1.mlp.up_proj.weight"),
    "a bias": (dict(more={"blk.1.attn_q.bias": VECTOR}), "blk.1.attn_q.bias; exactly the 21 tensors"),
    "unknown tensor": (dict(more={"blk.0.new.weight": VECTOR}), "blk.0.new.weight"),
    "a wrong shape": (dict(more={"output_norm.weight": VECTOR}), "output_norm.weight of shape (8,); (32,) by its keys"),
    "whole numbers": (dict(more={"output.weight": np.ones((288, 32), np.int8)}), "output.weight stored as I8"),
    "not finite": (dict(found=not_finite(CONFIG)), "numbers in blk.1.ffn_up.weight that are not finite"),
    "the other byte order": (dict(endianess=gguf.GGUFEndian.BIG), "the other byte order"),
    "part of a split file": (dict(changes={"split.count": 3}), "one of 3 parts"),
    "no tokens": (dict(changes=ggml(tokens=None)), "has 0 tokens"),
    "too many tokens": (dict(changes=ggml(tokens=MANY, token_type=None)), "288 embeddings"),
    "one token twice": (dict(changes=ggml(tokens=[*TOKENS[:-1], "a"])), "264 different"),
    "too few types": (dict(changes=ggml(token_type=[NORMAL])), "1 types"),
    "another tokenizer": (dict(changes=ggml(model="rwkv")), "tokenizer.ggml.model is 'rwkv'; gpt2 or llama"),
    "another kind": (dict(changes=ggml(pre="poro-chat")), "tokenizer.ggml.pre is 'poro-chat'; llama-bpe, llama3"),
    "an id that is none": (dict(changes=ggml(eos_token_id=999)), "eos_token_id is 999; an id below 265"),
    "no merges": (dict(changes=ggml(merges=None)), "no tokenizer comes of its keys: KeyError('merges')"),
    "merges of no tokens": (dict(changes=ggml(merges=["z q"])), "no tokenizer comes of its keys"),
    "no scores": (dict(changes=SENTENCEPIECE | ggml(scores=None)), "KeyError('scores')"),
    "nothing ends": (dict(changes=ggml(tokens=[*ALPHABET, "ab"], merges=["a b"], token_type=None, eos_token_id=None)),
                     "eos_token_id is None"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, convert):
    settings, named = REFUSED[case]
    gguf_files.write(tmp_path / "model.gguf", CONFIG, **settings)
    before = sorted(tmp_path.iterdir())
    _, said = convert(code=2)
    for part in named.split("; "):
        assert part in said
    assert "to do:" in said and sorted(tmp_path.iterdir()) == before


def test_what_gguf_cannot_dequantise_is_refused_before_the_work(tmp_path):
    settings, _ = REFUSED["whole numbers"]
    gguf_files.write(tmp_path / "model.gguf", CONFIG, **settings)
    with pytest.raises(SpecaufError, match="stored as I8"):
        read_architecture(open_gguf(tmp_path / "model.gguf"))


def test_damaged_files(tmp_path, convert):
    path = tmp_path / "model.gguf"
    assert "no file" in convert(code=2)[1]
    gguf_files.write(path, CONFIG)
    whole = path.read_bytes()
    cuts = [0, 3, 4, 7, 20, 100, 1000, *range(2000, len(whole), len(whole) // 12), len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert "model.gguf cannot be read" in convert(code=2)[1], cut
    path.write_bytes(b"GGML" + whole[4:])
    assert "magic" in convert(code=2)[1]
    path.write_bytes(whole[:4] + b"\x63" + whole[5:])
    assert "version 99" in convert(code=2)[1]
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]


def test_bytes_turned_at_random_end_in_a_refusal_or_a_target(tmp_path, convert):
    path, rng = tmp_path / "model.gguf", np.random.default_rng(0)
    gguf_files.write(path, CONFIG)
    whole = path.read_bytes()
    head = len(whole) - sum(x.nbytes for x in gguf_files.tensors(CONFIG).values())
    for number in range(40):
        turned = bytearray(whole)
        turned[rng.integers(head)] ^= 1 << rng.integers(8)
        path.write_bytes(turned)
        code = cli.main(["convert", "--gguf", str(path), "--out", str(tmp_path / str(number))])
        assert code in (0, 2) and (tmp_path / str(number)).exists() == (code == 0)


def test_nothing_is_overwritten(tmp_path, convert):
    gguf_files.write(tmp_path / "model.gguf", CONFIG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "already holds" in convert(code=2)[1]
    inside = tmp_path / "model.gguf" / "out"
    assert cli.main(["convert", "--gguf", str(tmp_path / "model.gguf"), "--out", str(inside)]) == 2


def test_a_full_disk_is_told_before_the_work(tmp_path, convert, monkeypatch):
    gguf_files.write(tmp_path / "model.gguf", CONFIG)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**14))
    assert "0.0 MiB free" in convert(code=2)[1]


def test_without_the_package_it_says_what_to_install(tmp_path, convert, monkeypatch):
    gguf_files.write(tmp_path / "model.gguf", CONFIG)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'specauf-jax[gguf]'" in convert(code=2)[1]


def test_unknown_keys_are_told(tmp_path, convert):
    gguf_files.write(tmp_path / "model.gguf", CONFIG, changes={"llama.pooling_type": 1})
    assert "has keys that nothing here reads: pooling_type" in convert()[1]
