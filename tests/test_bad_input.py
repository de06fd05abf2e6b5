"""Every mistake gets a message and exit code 2, and leaves every file as it was."""

import errno
import hashlib
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

from specauf_jax import cli, files
from specauf_jax.data.dataset import read_manifest, write_dataset, write_manifest
from specauf_jax.data.tokenizer import copy_tokenizer
from specauf_jax.errors import SpecaufError
from specauf_jax.models.weights import save_drafter, save_target
from specauf_jax.sharding import check_batch

S, V = 64, 300
COMMANDS = {
    "prepare": {"input": "text", "out": "new", "vocab-size": V, "sequence-length": S},
    "pretrain": {
        "data": "data",
        "out": "new",
        "target.hidden-size": 16,
        "target.intermediate-size": 24,
        "target.head-dim": 8,
        "target.num-hidden-layers": 2,
        "train.steps": 2,
        "train.batch-size": 2,
    },
    "regenerate": {
        "data": "data",
        "target": "target",
        "out": "new",
        "prompt-length": 8,
        "max-new-tokens": 4,
        "batch-size": 4,
    },
    "train": {
        "target": "target",
        "data": "data",
        "out": "new",
        "drafter.block-size": 4,
        "drafter.num-hidden-layers": 1,
        "train.steps": 2,
        "train.batch-size": 2,
        "train.num-anchors": 4,
        "train.checkpoint-every": 1,
    },
    "generate": {"target": "target", "drafter": "drafter", "prompts": "prompts.jsonl", "out": "new", "batch-size": 2},
    "evaluate": {"target": "target", "drafter": "drafter", "prompts": "a=prompts.jsonl", "out": "new"},
    "export": {"run": "run", "out": "new"},
    "report": {"": "run", "out": "new"},
}
"""A command that works, by the folders of `world`; "" is a positional argument, None drops an option."""


def arguments(command: str, **changes) -> list[str]:
    """The command line, with `train__steps=3` for --train.steps 3."""
    options = COMMANDS[command] | {name.replace("__", ".").replace("_", "-"): x for name, x in changes.items()}
    line = [command]
    for name, value in options.items():
        if value is not None:
            line += [f"--{name}"] * bool(name) + str(value).split()
    return line


@contextmanager
def working_in(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def compile_once(folder):
    """Let later cases find what earlier ones compiled; returns what ends that."""
    changed = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in changed}

    def use(settings):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at its settings once

    use(changed)
    return lambda: use(before)


@pytest.fixture(scope="module")
def world(request, tmp_path_factory) -> Path:
    """Everything that the commands read, at the smallest size."""
    root = tmp_path_factory.mktemp("world")
    request.addfinalizer(compile_once(tmp_path_factory.mktemp("compiled")))
    (root / "text").mkdir()
    for name in ("one", "two", "three"):
        lines = [f"{name} {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(20)]
        (root / "text" / f"{name}.txt").write_text("".join(lines))
    (root / "prompts.jsonl").write_text('{"prompt": "the quick"}\n{"prompt": "brown fox"}\n')
    (root / "turns.jsonl").write_text('{"turns": ["how many dogs?", "and foxes?"]}\n')
    with working_in(root):
        assert cli.main(arguments("prepare", out="data")) == 0
        target = tiny.target_config(vocab_size=V)
        save_target(tiny.target_params(target), target, root / "target", eos_token_id=0)
        copy_tokenizer(root / "data" / "tokenizer", root / "target")
        drafter = tiny.drafter_config(target, num_hidden_layers=1, target_layer_ids=(1,), mask_token_id=3)
        save_drafter(tiny.drafter_params(drafter), drafter, root / "drafter", provenance={"steps": 0})
        assert cli.main(arguments("train", out="run")) == 0
    return root


@pytest.fixture
def here(world, tmp_path, monkeypatch) -> Path:
    """A copy of `world` to damage, as the working directory."""
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def contents(folder: Path) -> dict[str, str]:
    """Every path under `folder`, hidden ones too, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def refused(capsys, line: list[str], expected: int = 2) -> str:
    """What the command says on its way out with its exit code."""
    capsys.readouterr()
    try:
        code = cli.main(line)
    except SystemExit as exit_:  # from the parser of arguments
        code = exit_.code
    said = capsys.readouterr().err
    assert code == expected, said
    assert "Traceback" not in said
    return said


# ---------------------------------------------------------------------------------------------
# Damage


def edit_json(path: str, change):
    def damage():
        values = json.loads(Path(path).read_text())
        change(values)
        Path(path).write_text(json.dumps(values))

    return damage


def put(path: str, text: str):
    def damage():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)

    return damage


def truncate(pattern: str, keep: float = 0.5):
    def damage():
        found = [path for path in Path().glob(pattern) if path.is_file()]
        assert found
        for path in found:
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return damage


def remove(pattern: str):
    def damage():
        found = list(Path().glob(pattern))
        assert found
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def edit_tensors(folder: str, change):
    def damage():
        tensors = load_file(f"{folder}/model.safetensors")
        change(tensors)
        save_file(tensors, f"{folder}/model.safetensors")

    return damage


def reshape(tensors):
    tensors["model.norm.weight"] = np.ones(17, np.float32)


def add(tensors):
    tensors["model.extra.weight"] = np.ones(1, np.float32)


def spoil(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan


def lose_a_shard():
    names = load_file("target/model.safetensors")
    Path("target/model.safetensors").rename("target/model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 + ('norm' in name)}-of-00002.safetensors" for name in names}
    Path("target/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def unsupervise():
    manifest = read_manifest("data")
    shutil.rmtree("data/dataset")
    row = {"tokens": np.ones(S, np.int32), "loss_mask": np.zeros(S, bool), "document_ids": np.ones(S, np.int32)}
    write_dataset([row] * 3, "data", S)
    write_manifest("data", manifest | {"rows": 3})


def forget_the_template():
    for folder in ("data/tokenizer", "target"):
        edit_json(f"{folder}/tokenizer_config.json", lambda c: c.pop("chat_template"))()


def dflash(**values):
    return edit_json("drafter/config.json", lambda c: c["dflash_config"].update(values))


def other_drafter(**changes):
    def damage():
        config = tiny.target_config(**{"vocab_size": V} | changes)
        drafter = tiny.drafter_config(config, num_hidden_layers=1, target_layer_ids=(1,), mask_token_id=3)
        save_drafter(tiny.drafter_params(drafter), drafter, "drafter")

    return damage


def begun_with(**settings):
    """The parts of a regeneration that was interrupted."""
    return put("new.parts/settings.json", json.dumps({"seed": 0} | settings))


def foreign_data():
    assert cli.main(arguments("prepare", input="text/one.txt", out="other")) == 0


def other_template():
    chat = {"messages": [{"role": "user", "content": "dogs?"}, {"role": "assistant", "content": "lazy"}]}
    put("chats.jsonl", json.dumps(chat))()
    assert cli.main(arguments("prepare", input="chats.jsonl", out="chats", tokenizer="target", vocab_size=None)) == 0
    put("target/chat_template.jinja", "{{ messages }}")()


def pad_without_embedding():
    for folder in ("data/tokenizer", "target"):
        edit_json(f"{folder}/tokenizer_config.json", lambda c: c.update(pad_token="[PAD]"))()
    put("turns.jsonl", '{"turns": ["[PAD] dogs"]}')()


TARGET_CONFIG = "target/config.json"
CASES = {
    # prepare
    "prepare: input": ("prepare", {"input": "nowhere"}, None, "input nowhere does not exist"),
    "prepare: record": ("prepare", {"input": "turns.jsonl"}, None, "turns.jsonl:1: neither 'conversations'"),
    "prepare: out exists": ("prepare", {"out": "data"}, None, "data already holds a prepared dataset; another --out"),
    "prepare: out in a file": ("prepare", {"out": "prompts.jsonl/new"}, None, "prompts.jsonl is no folder"),
    "prepare: two sources": ("prepare", {"corpus": "stdlib"}, None, "2 sources given; exactly one"),
    # pretrain
    "data missing": ("pretrain", {"data": "nowhere"}, None, "nowhere/manifest.json does not exist; specauf prepare"),
    "manifest key": (
        "pretrain",
        {},
        edit_json("data/manifest.json", lambda m: m.pop("rows")),
        "manifest.json lacks rows",
    ),
    "manifest JSON": ("pretrain", {}, put("data/manifest.json", "{"), "manifest.json cannot be read"),
    "dataset truncated": (
        "regenerate",
        {},
        truncate("data/dataset/*array_record*", 0.4),
        "data/dataset is truncated or damaged",
    ),
    "dataset rows": (
        "regenerate",
        {},
        edit_json("data/manifest.json", lambda m: m.update(rows=99)),
        "data/dataset holds; the manifest's 99",
    ),
    "pretrain: vocabulary": ("pretrain", {"target__vocab_size": 400}, None, "vocab_size is 400 for a tokenizer of 300"),
    "pretrain: heads": ("pretrain", {"target__num_attention_heads": 3}, None, "3 query heads over 2"),
    "accumulation": ("pretrain", {"train__accumulation": 3}, None, "batch_size 2 does not divide into accumulation 3"),
    "mesh": ("pretrain", {"mesh__tensor": 7}, None, "mesh replica=1 fsdp=-1 tensor=7 on 1 devices; --mesh.tensor"),
    "pretrain: seed": ("pretrain", {"train__seed": -1}, None, "seed is -1"),
    # regenerate
    "regenerate: out exists": ("regenerate", {"out": "data"}, None, "data already holds a prepared dataset"),
    "regenerate: other parts": (
        "regenerate",
        {},
        begun_with(seed=5),
        "new.parts holds parts made with another; seed; restore them, or delete",
    ),
    "regenerate: vocabulary": (
        "regenerate",
        {},
        edit_json("data/manifest.json", lambda m: m.update(largest_token_id=300)),
        "data holds token 300, the target has 300 of them; --tokenizer",
    ),
    "regenerate: tokenizer": ("regenerate", {"data": "other"}, foreign_data, "other was made with another tokenizer"),
    "regenerate: template": ("regenerate", {"data": "chats"}, other_template, "made with another chat template than"),
    "regenerate: template arguments": (
        "regenerate",
        {"template_args": "day=1"},
        None,
        "data was prepared with template arguments {}; those given: day=1; specauf prepare",
    ),
    "regenerate: nothing to answer": (
        "regenerate",
        {"prompt_length": 64},
        None,
        "documents has anything to answer; lower --prompt-length",
    ),
    "regenerate: documents": ("regenerate", {"documents": -1}, None, "documents is -1"),
    "regenerate: top_k": ("regenerate", {"top_k": -1}, None, "top_k is -1"),
    "regenerate: seed": ("regenerate", {"seed": -1}, None, "seed is -1"),
    "train: tokenizer": (
        "train",
        {"data": "other"},
        foreign_data,
        "other was made with another tokenizer; --tokenizer",
    ),
    "train: template": ("train", {"data": "chats"}, other_template, "another chat template than that of target"),
    # train: target
    "target missing": ("train", {"target": "nowhere"}, None, "nowhere does not exist; specauf pretrain"),
    "target JSON": ("train", {}, put(TARGET_CONFIG, '{"vocab_size": 3'), f"{TARGET_CONFIG} is not JSON"),
    "architecture": (
        "train",
        {},
        edit_json(TARGET_CONFIG, lambda c: c.update(architectures=["GPT2LMHeadModel"])),
        "architecture 'GPT2LMHeadModel'; LlamaForCausalLM",
    ),
    "config key": (
        "train",
        {},
        edit_json(TARGET_CONFIG, lambda c: c.pop("head_dim")),
        f"{TARGET_CONFIG} has no head_dim",
    ),
    "config type": (
        "train",
        {},
        edit_json(TARGET_CONFIG, lambda c: c.update(hidden_size="16")),
        f"{TARGET_CONFIG}: hidden_size is '16'; a whole number",
    ),
    "RoPE scaling": (
        "train",
        {},
        edit_json(TARGET_CONFIG, lambda c: c["rope_parameters"].update(rope_type="longrope")),
        "RoPE of type 'longrope'",
    ),
    "RoPE object": (
        "train",
        {},
        edit_json(TARGET_CONFIG, lambda c: c.update(rope_parameters="default")),
        f"{TARGET_CONFIG}: rope_parameters is 'default'",
    ),
    "RoPE base": (
        "train",
        {},
        edit_json(TARGET_CONFIG, lambda c: c["rope_parameters"].update(rope_theta="big")),
        f"{TARGET_CONFIG}: rope_theta is 'big'",
    ),
    "tensor missing": (
        "train",
        {},
        edit_tensors("target", lambda t: t.pop("model.norm.weight")),
        "target: tensors do not fit config.json: 1 missing, first model.norm.weight",
    ),
    "tensor extra": ("train", {}, edit_tensors("target", add), "1 unknown, first model.extra.weight"),
    "tensor shape": ("train", {}, edit_tensors("target", reshape), "model.norm.weight has shape (17,); (16,)"),
    "weights truncated": ("train", {}, truncate("target/model.safetensors"), "target/model.safetensors cannot be read"),
    "weights empty": ("train", {}, truncate("target/model.safetensors", 0), "target/model.safetensors cannot be read"),
    "weights missing": ("train", {}, remove("target/model.safetensors"), "target has no weights; model.safetensors"),
    "shard missing": ("train", {}, lose_a_shard, "model-00002-of-00002.safetensors does not exist; every shard"),
    "index": (
        "train",
        {},
        lambda: (lose_a_shard(), put("target/model.safetensors.index.json", '{"weight_map": {"a": 1}}')()),
        "model.safetensors.index.json has no weight_map",
    ),
    # train: drafter, data, settings
    "layer ids order": (
        "train",
        {"drafter__target_layer_ids": "1 0"},
        None,
        "drafter.target_layer_ids is [1, 0]; ascending",
    ),
    "layer ids range": (
        "train",
        {"drafter__target_layer_ids": "0 3"},
        None,
        "target_layer_ids is [0, 3]; target's 3 layers",
    ),
    "mask id range": ("train", {"drafter__mask_token_id": 300}, None, "drafter.mask_token_id is 300; below; 300"),
    "mask id unknown": (
        "train",
        {},
        edit_json("data/manifest.json", lambda m: m.update(mask_token_id=None)),
        "no mask token; --drafter.mask-token-id",
    ),
    "drafter width": ("train", {"drafter__hidden_size": 32}, None, "drafter.hidden_size is 32; the target's 16"),
    "block of one": ("train", {"drafter__block_size": 1}, None, "drafter.block_size is 1; at least 2"),
    "block beyond the row": ("train", {"drafter__block_size": 65}, None, "block_size 65 in rows of 64 tokens"),
    "anchors beyond the row": ("train", {"train__num_anchors": 64}, None, "num_anchors 64 in rows of 64; at most 63"),
    "no anchor": ("train", {}, unsupervise, "data: no eligible anchor in 3 rows; loss mask"),
    "train: mesh": (
        "train",
        {"mesh__replica": 2, "mesh__fsdp": 2},
        None,
        "mesh replica=2 fsdp=2 tensor=1 on 1 devices",
    ),
    "unknown field": ("train", {"train__num_anchor": 4}, None, "--train.num-anchor; --train.num-anchors"),
    "wrong type": ("train", {"train__steps": "many"}, None, "many; int"),
    "wrong choice": ("train", {"objective__name": "griffon"}, None, "griffon; griffin"),
    "learning rate": ("train", {"train__learning_rate": 0}, None, "learning_rate is 0"),
    "no recipe": ("train", {"config": "nowhere.py"}, None, "nowhere.py does not exist; a recipe"),
    "other recipe": (
        "train",
        {"config": "recipe.py"},
        put("recipe.py", "from specauf_jax.config import Mesh\nconfig = Mesh()\n"),
        "recipe.py defines config = Mesh; config = Train; specauf train",
    ),
    "broken recipe": (
        "train",
        {"config": "recipe.py"},
        put("recipe.py", "config = Train(\n"),
        "recipe.py cannot be run",
    ),
    "no decode prompts": ("train", {"train__decode_every": 1}, None, "no held-out prompts; --train.decode-files"),
    "decode file": (
        "train",
        {"train__decode_every": 1, "train__decode_files": "nowhere.jsonl"},
        None,
        "nowhere.jsonl does not exist",
    ),
    "decode template": (
        "train",
        {"train__decode_every": 1, "train__decode_files": "turns.jsonl"},
        forget_the_template,
        "no chat template",
    ),
    "decode token": (
        "train",
        {"train__decode_every": 1, "train__decode_files": "turns.jsonl"},
        pad_without_embedding,
        "a prompt holds token 300 of the tokenizer, the target has 300",
    ),
    "decode every": ("train", {"train__decode_every": -1}, None, "decode_every is -1"),
    "train: out in a file": ("train", {"out": "prompts.jsonl/new"}, None, "prompts.jsonl is no folder"),
    # train: checkpoints
    "other learning rate": (
        "train",
        {"out": "run", "train__learning_rate": 0.5},
        None,
        "run/checkpoints belongs to a run with train.learning_rate = 0.0006, not 0.5; use another --out",
    ),
    "more differences": (
        "train",
        {"out": "run", "train__seed": 1, "objective__name": "full"},
        None,
        "objective.name = 'auf', not 'full' (and 1 more differences)",
    ),
    # generate
    "no prompts": ("generate", {"prompts": "nowhere.jsonl"}, None, "nowhere.jsonl does not exist"),
    "prompt line": (
        "generate",
        {},
        put("prompts.jsonl", '{"prompt": "a"}\n\n{"prompt": \n'),
        "prompts.jsonl:3: broken JSON",
    ),
    "prompts empty": ("generate", {}, put("prompts.jsonl", "\n"), "prompts.jsonl holds no prompt"),
    "prompt keys": ("generate", {}, put("prompts.jsonl", '{"text": "a"}'), 'prompts.jsonl:1; {"text": "a"}; {"turns"'),
    "prompt empty": ("generate", {}, put("prompts.jsonl", '{"prompt": ""}'), "prompts.jsonl:1"),
    "no template": ("generate", {"prompts": "turns.jsonl"}, forget_the_template, "the tokenizer has no chat template"),
    "prompt token": (
        "generate",
        {"prompts": "turns.jsonl"},
        pad_without_embedding,
        "a prompt holds token 300 of the tokenizer, the target has 300",
    ),
    "prompt surrogate": (
        "generate",
        {},
        put("prompts.jsonl", '{"prompt": "a\\ud83d"}'),
        "prompts.jsonl:1: holds half a surrogate pair",
    ),
    "template arguments": ("generate", {"template_args": "day"}, None, "--template-args day; NAME=VALUE"),
    "template argument": ("generate", {"template_args": "day=1"}, None, "'day', which the chat template does not read"),
    "stop tokens": (
        "generate",
        {},
        put("target/generation_config.json", '{"eos_token_id": "</s>"}'),
        "generation_config.json: eos_token_id is '</s>'",
    ),
    "config nested too deep": (
        "generate",
        {},
        lambda: Path(TARGET_CONFIG).write_text("[" * 100_000 + "]" * 100_000),
        "target/config.json is not JSON: nested too deep",
    ),
    "manifest nested too deep": (
        "train",
        {},
        lambda: Path("data/manifest.json").write_text("[" * 100_000 + "]" * 100_000),
        "data/manifest.json cannot be read: nested too deep",
    ),
    "a size of many digits": (
        "generate",
        {},
        edit_json(TARGET_CONFIG, lambda c: c.update(head_dim=10**400)),
        "target/config.json: head_dim is 1000",
    ),
    "no drafter": ("generate", {"drafter": None}, None, "speculative without --drafter; --method autoregressive"),
    "temperature": ("generate", {"temperature": -1}, None, "temperature is -1.0; use 0 for greedy"),
    "top_p": ("generate", {"top_p": 0}, None, "top_p is 0.0; (0, 1]"),
    "generate: seed": ("generate", {"seed": -1}, None, "seed is -1"),
    "tokenizer missing": ("generate", {}, remove("target/tokenizer.json"), "target/tokenizer.json does not exist"),
    "tokenizer broken": ("generate", {}, put("target/tokenizer.json", "{}"), "target/tokenizer.json cannot be read"),
    "tokenizer larger": (
        "generate",
        {"method": "autoregressive", "drafter": None},
        lambda: shrink_vocabulary(),
        "target/tokenizer.json has ids up to 299, the model 290",
    ),
    "drafter's width": ("generate", {}, other_drafter(hidden_size=32), "drafter.hidden_size is 32; the target's 16"),
    "drafter's depth": ("generate", {}, other_drafter(num_hidden_layers=4), "a target of 4 layers, this one has 3"),
    "drafter's vocabulary": (
        "generate",
        {},
        other_drafter(vocab_size=310),
        "drafter.vocab_size is 310; the target's 300",
    ),
    "drafter's mask id": ("generate", {}, dflash(mask_token_id=300), "drafter.mask_token_id is 300"),
    "drafter's mask type": ("generate", {}, dflash(mask_token_id="3"), "drafter/config.json; mask_token_id is '3'"),
    "drafter without mask": (
        "generate",
        {},
        edit_json("drafter/config.json", lambda c: c["dflash_config"].pop("mask_token_id")),
        "drafter/config.json: dflash_config has no mask_token_id",
    ),
    "drafter without taps": (
        "generate",
        {},
        edit_json("drafter/config.json", lambda c: c.update(dflash_config=None)),
        "drafter/config.json: dflash_config has no",
    ),
    "drafter's dflash_config": (
        "generate",
        {},
        edit_json("drafter/config.json", lambda c: c.update(dflash_config=[1])),
        "drafter/config.json: dflash_config is [1]",
    ),
    "drafter's taps order": (
        "generate",
        {},
        lambda: (other_drafter()(), widen_drafter(), dflash(target_layer_ids=[2, 1])()),
        "drafter.target_layer_ids is [2, 1]; ascending",
    ),
    "drafter's taps range": ("generate", {}, dflash(target_layer_ids=[3]), "drafter.target_layer_ids is [3]; 3 layers"),
    "drafter's taps type": ("generate", {}, dflash(target_layer_ids=1), "drafter/config.json; target_layer_ids is 1"),
    "drafter's block": ("generate", {}, dflash(block_size="4"), "drafter/config.json; block_size is '4'"),
    "λ of a plain head": (
        "train",
        {"train.lambda-base-decay-ratio": 0.5},
        None,
        "ratio is 0.5 by a head without",
    ),
    "a base of a plain head": ("train", {"base-objective.name": "full"}, None, "base_objective is; by a head without"),
    "a witness of a plain head": ("train", {"objective.witness": "base"}, None, "witness is 'base' by a head without"),
    "a head's setting": ("train", {"drafter.head": "emb_dims=4"}, None, "unknown field 'emb_dims' of DFlash"),
    "a projector": ("generate", {}, dflash(projector_type="dspark"), "projector_type 'dspark'"),
    "not a drafter": ("generate", {"drafter": "target"}, None, "architecture 'Qwen3ForCausalLM'; DFlashDraftModel"),
    # evaluate
    "no name": ("evaluate", {"prompts": "prompts.jsonl"}, None, "--prompts prompts.jsonl; NAME=FILE.jsonl"),
    "same name": ("evaluate", {"prompts": "a=prompts.jsonl a=turns.jsonl"}, None, "--prompts names a twice"),
    "drafter missing": ("evaluate", {"drafter": "nowhere"}, None, "nowhere does not exist"),
    "provenance": ("evaluate", {}, put("drafter/specauf.json", "{"), "drafter/specauf.json is not JSON"),
    "repeats": ("evaluate", {"repeats": 0}, None, "repeats is 0"),
    "max prompts": ("evaluate", {"max_prompts": -1}, None, "max_prompts is -1"),
    "evaluate: top_k": ("evaluate", {"top_k": -2}, None, "top_k is -2"),
    "evaluate: template argument": ("evaluate", {"template_args": "day=1"}, None, "which the chat template does not"),
    # export
    "no run": ("export", {"run": "data"}, None, "data/config.json does not exist"),
    "a model is no run": ("export", {"run": "drafter"}, None, "drafter is not a run of `specauf train`"),
    "no such step": ("export", {"step": 7}, None, "run has no checkpoint 7; one of [1, 2]"),
    "export: truncated": ("export", {}, truncate("run/checkpoints/2/state/d/*"), "checkpoints/2 cannot be read"),
    "export: incomplete": ("export", {}, remove("run/checkpoints/2/state/d"), "checkpoints/2 cannot be read"),
    "export: no settings": ("export", {}, remove("run/checkpoints/2/config"), "checkpoints/2 cannot be read"),
    "export over the run": ("export", {"out": "run"}, None, "run already holds; another --out"),
    "export over the target": ("export", {"out": "target"}, None, "target already holds; another --out"),
    "export over a file": ("export", {"out": "prompts.jsonl"}, None, "prompts.jsonl already holds; another --out"),
    "export into a file": ("export", {"out": "prompts.jsonl/new"}, None, "prompts.jsonl is no folder"),
    "export here": ("export", {"out": "."}, None, "already holds; another --out"),
    "run's config": (
        "export",
        {},
        edit_json("run/config.json", lambda c: c["train"].update(step=4)),
        "unknown field 'step' of TrainOptimisation (did you mean 'steps'?)",
    ),
    # report
    "report: missing": ("report", {"": "run nowhere"}, None, "nowhere does not exist"),
    "report: nothing in it": ("report", {"": "text"}, None, "text holds no metrics and no results"),
    "report: out is a folder": ("report", {"out": "run"}, None, "run is a folder"),
    "report: out in a file": ("report", {"out": "prompts.jsonl/new"}, None, "prompts.jsonl is no folder"),
}


def shrink_vocabulary():
    def change(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:290].copy()

    edit_tensors("target", change)()
    edit_json(TARGET_CONFIG, lambda c: c.update(vocab_size=290))()


def widen_drafter():
    def change(tensors):
        tensors["fc.weight"] = np.concatenate([tensors["fc.weight"]] * 2, axis=1)

    edit_tensors("drafter", change)()


@pytest.mark.parametrize("case", CASES)
def test_refused_without_a_trace(here, capsys, case):
    command, changes, damage, words = CASES[case]
    if damage:
        damage()
    before = contents(here)
    said = refused(capsys, arguments(command, **changes))
    for part in words.split("; "):
        assert part in said
    assert contents(here) == before


def test_unknown_command(capsys):
    said = refused(capsys, ["trian", "--out", "x"])
    assert "unknown command 'trian' (did you mean 'train'?)" in said and "specauf --help" in said


UNREAD = [
    ("prepare --input x --out y", "--tfds-split test", "tfds_split is 'test' without --tfds"),
    ("prepare --input x --out y", "--tfds-dir d", "tfds_dir is 'd' without --tfds"),
    ("prepare --corpus stdlib --out y", "--tfds-prompt-field a", "tfds_prompt_field is 'a' without --tfds"),
    ("prepare --corpus stdlib --out y", "--tfds-response-field a", "tfds_response_field is 'a' without --tfds"),
    ("prepare --corpus stdlib --out y", "--tfds-text-field a", "tfds_text_field is 'a' without --tfds"),
    ("prepare --input x --out y --tokenizer z", "--vocab-size 400", "vocab_size is 400 with --tokenizer"),
    ("prepare --input x --out y", "--corpus-bytes 9", "corpus_bytes is 9 without --corpus"),
    ("prepare --input x --out y", "--heldout-prompts 9", "heldout_prompts is 9 without --corpus"),
    ("prepare --input x --out y", "--prompt-length 9", "prompt_length is 9 without --corpus"),
    ("prepare --corpus stdlib --out y", "--max-bad-records 9", "max_bad_records is 9 with --corpus"),
    ("prepare --corpus stdlib --out y", "--allow-uniform-mask", "allow_uniform_mask is True without conversations"),
    ("prepare --tfds t --tfds-text-field f --out y", "--allow-uniform-mask", "allow_uniform_mask is True without"),
    ("train --target x --data y --out z", "--objective.gamma 3", "gamma is 3.0 under objective auf"),
    ("train --target x --data y --out z", "--base-objective.gamma 3", "gamma is 3.0 under objective auf"),
    ("train --target x --data y --out z", "--objective.griffin-top-n 2", "griffin_top_n is 2 under objective auf"),
    ("train --target x --data y --out z", "--objective.dpace-alpha 0.4", "dpace_alpha is 0.4 under objective auf"),
    ("train --target x --data y --out z", "--objective.dpace-denominator rows", "dpace_denominator is 'rows' under"),
    ("train --target x --data y --out z --objective.name decay", "--objective.witness base", "witness is 'base' under"),
    ("train --target x --data y --out z", "--base-objective.witness base", "witness is 'base' in base_objective"),
    (
        "train --target x --data y --out z",
        "--drafter.sliding-window 99",
        "sliding_window is 99 without sliding",
    ),
    ("train --target x --data y --out z", "--train.decode-files f", "decode_files is ('f',) without decode_every"),
    ("train --target x --data y --out z", "--train.decode-prompts 9", "decode_prompts is 9 without decode_every"),
    ("train --target x --data y --out z", "--train.decode-tokens 9", "decode_tokens is 9 without decode_every"),
    ("train --target x --data y --out z", "--train.decode-every 300", "decode_every 300 with checkpoint_every 200"),
    ("regenerate --data x --target y --out z", "--top-k 5", "top_k is 5 at temperature 0"),
    ("evaluate --target x --drafter y --prompts a=b --out z", "--top-p 0.5", "top_p is 0.5 at temperature 0"),
    ("generate --target x --prompts y --out z --method autoregressive", "--drafter d", "drafter is 'd' with --method"),
    ("generate --target x --prompts y --drafter z", "--batch-size 4", "batch_size is 4 without --out"),
    ("export --drafter x --out y", "--step best", "step is 'best' with --drafter"),
    ("export --run x --out y", "--target z", "target is 'z' with --layout zlab"),
    ("doctor --target x --drafter y --max-prompts 0", "--prompts z", "prompts is 'z' with --max-prompts 0"),
    ("doctor --target x --drafter y --max-prompts 0", "--max-new-tokens 9", "max_new_tokens is 9 with --max-prompts 0"),
    ("doctor --target x --drafter y --max-prompts 0", "--no-single-ids", "single_ids is False with --max-prompts 0"),
    ("doctor --target x --drafter y --max-prompts 0", "--batch-size 9", "batch_size is 9 with --max-prompts 0"),
    ("doctor --target x --drafter y --max-prompts 0", "--dtype bfloat16", "dtype is 'bfloat16' with --max-prompts 0"),
]
"""A command that would start, a setting that nothing in it reads, and what is said of it."""


@pytest.mark.parametrize(("line", "more", "words"), UNREAD, ids=[f"{line.split()[0]} {m}" for line, m, _ in UNREAD])
def test_settings_without_effect_are_refused(tmp_path, monkeypatch, capsys, line, more, words):
    monkeypatch.chdir(tmp_path)
    command, *rest = line.split()
    cli._parse(cli.COMMANDS[command][0], command, rest)
    assert words in refused(capsys, [*line.split(), *more.split()])
    assert not list(tmp_path.iterdir())


def test_dataset_cut_at_a_block(here, capsys):
    [path] = Path("data/dataset").glob("*array_record*")
    path.write_bytes(path.read_bytes()[: 1 << 16])
    assert "data/dataset is truncated or damaged" in refused(capsys, arguments("train"))


def test_batch_over_devices():
    mesh = SimpleNamespace(shape={"replica": 2, "fsdp": 2, "tensor": 1})
    check_batch(8, 2, mesh)
    with pytest.raises(SpecaufError, match="(?s)batch_size 12 in 2 part.* over 4 devices.*multiple of 8"):
        check_batch(12, 2, mesh)


# ---------------------------------------------------------------------------------------------
# A full disk


@contextmanager
def room_for(size: int):
    """Files of more bytes cannot be written, by any library, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("prepare", {}),
        ("export", {}),
        ("export", {"out": "drafter"}),
        ("report", {}),
        ("report", {"out": "prompts.jsonl"}),
    ],
)
def test_disk_full(here, capsys, command, changes):
    before = contents(here)
    with room_for(2000):
        said = refused(capsys, arguments(command, **changes), 74)
    assert "space" in said and "to do" in said
    assert contents(here) == before


def test_disk_full_at_a_checkpoint(here, capsys):
    """What was saved before is whole, and the same command goes on from it."""
    remove("run/checkpoints/2")()
    before = contents(here / "run/checkpoints/1")
    with room_for(4000):
        said = refused(capsys, arguments("train", out="run"), 74)
    assert "no checkpoint could be written" in said and "space" in said
    assert contents(here / "run/checkpoints/1") == before
    assert cli.main(arguments("train", out="run")) == 0


def test_a_disk_without_room_for_checkpoints_is_refused_at_once(here, capsys, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    said = refused(capsys, arguments("train"))
    assert "1.0 MiB free" in said and not Path("new/checkpoints").exists()


def test_disk_full_at_the_end_of_a_write(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SpecaufError, match="(?s)a.json cannot be written: No space left.*free space"):
        files.write_text(tmp_path / "a.json", "new")
    assert contents(tmp_path) == {"a.json": hashlib.sha256(b"old").hexdigest()}


def test_disk_full_within_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(SpecaufError, match="model cannot be written"), files.replace_folder(tmp_path / "model") as new:
        (new / "a").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert contents(tmp_path) == before
    with files.replace_folder(tmp_path / "model") as new:
        (new / "a").write_text("new")
    assert contents(tmp_path) == {"model": "folder", "model/a": hashlib.sha256(b"new").hexdigest()}


# ---------------------------------------------------------------------------------------------
# What shows only at work


def test_target_that_is_not_finite(here, capsys):
    remove("run/checkpoints/2")()
    edit_tensors("target", spoil)()
    before = contents(here / "run" / "checkpoints"), contents(here / "run" / "drafter")
    said = refused(capsys, arguments("train", out="run"), 3)
    assert "step 2" in said and "not finite: features" in said and "the last checkpoint, which is untouched" in said
    assert (contents(here / "run" / "checkpoints"), contents(here / "run" / "drafter")) == before


def test_diverging_pretraining(here, capsys):
    said = refused(
        capsys, arguments("pretrain", train__learning_rate=1e30, train__steps=3, train__checkpoint_every=1), 3
    )
    assert "step 2" in said and "not finite" in said and "--train.learning-rate" in said
    assert [path.name for path in Path("new/checkpoints").iterdir() if path.name.isdigit()] == ["1"]
    assert not Path("new/target").exists()


def test_damaged_part_of_a_regeneration(here, capsys):
    from specauf_jax.commands import dialogues

    truncated = here / "new.parts" / "0.json"
    truncated.parent.mkdir()
    dialogues.save(truncated, {3: dialogues.Talk([1, 2, 3], [(1, 3)])})
    whole = truncated.read_bytes()
    assert dialogues.load(truncated)[3].document.loss_mask.tolist() == [False, True, True]
    for damage in (whole[:20], b'{"3": {"tokens": [1], "more": 2}}', b"[]"):
        truncated.write_bytes(damage)
        with pytest.raises(SpecaufError, match="(?s)0.json cannot be read.*delete"):
            dialogues.load(truncated)
