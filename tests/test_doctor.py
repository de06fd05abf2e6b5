"""The doctor: a drafter that was trained, then written down wrongly in every known way."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specauf_jax import architecture as a
from specauf_jax import cli
from specauf_jax import config as c
from specauf_jax.data.tokenizer import hashes, load_tokenizer, train_bpe
from specauf_jax.decoding.generate import Generation, generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.evaluation.doctor.checks import Folder, _tensor_names, read_findings, read_folder
from specauf_jax.evaluation.doctor.engines import LINES, engine_table, unserved_heads
from specauf_jax.evaluation.doctor.variants import Decoded, Gain, Variant, decode_variants, gain, layer_id_variants
from specauf_jax.models.drafter import drafter_shapes, init_drafter
from specauf_jax.models.heads import head_types
from specauf_jax.models.heads.dflash import DFlash
from specauf_jax.models.heads.dflash2 import DFlash2
from specauf_jax.models.heads.domino import Domino
from specauf_jax.models.heads.dspark import DSpark
from specauf_jax.models.hf_drafter import write_drafter
from specauf_jax.models.hf_target import write_target
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import TargetStep, init_target
from specauf_jax.models.tensors import file_names
from specauf_jax.models.weights import load_drafter, load_target, save_drafter, save_target
from specauf_jax.training.blocks import Batch
from specauf_jax.training.loss import LossConfig
from specauf_jax.training.step import init_state, make_optimizer, make_train_step

V, K, NEW, MASK = 300, 4, 28, 3
IDS = (1, 3)
TARGET = a.Target(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)
DFLASH = resolve_drafter(a.Drafter(block_size=K, num_hidden_layers=1, mask_token_id=MASK, target_layer_ids=IDS), TARGET)
DOMINO = dataclasses.replace(DFLASH, head=Domino(emb_dim=8, gru_hidden_dim=16))
TEXTS = (
    "red fox",
    "seven dogs",
    "a quick jump",
    "over the wall",
    "lazy afternoon",
    "brown hills",
    "the river",
    "is it?",
)

# ---------------------------------------------------------------------------------------------
# Drafters that have learnt the target's continuations of TEXTS by heart


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A target whose every token depends on all before it, and three drafters of it: dflash, domino, shifted."""
    root = tmp_path_factory.mktemp("world")
    train_bpe([f"{text} {i}\n" for text in TEXTS for i in range(9)], V, root / "target")
    tokenizer = load_tokenizer(root / "target")
    target = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_target(TARGET, jax.random.key(3)))
    target["lm_head"]["kernel"] = target["lm_head"]["kernel"].at[:, : MASK + 1].set(0)  # no stop, and no mask token
    save_target(target, TARGET, root / "tensors", eos_token_id=0)
    for path in (root / "tensors").iterdir():
        path.rename(root / "target" / path.name)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    step = Decoding(target_step=TargetStep(TARGET, IDS))
    own = generate(None, target, prompts, config=step, max_new_tokens=NEW, batch_size=len(prompts))
    tokenizer_sha256, template_sha256 = hashes(root / "target")
    origin = {"tokenizer_sha256": tokenizer_sha256, "template_sha256": template_sha256}
    for name, drafter in {
        "dflash": DFLASH,
        "domino": DOMINO,
        "shifted": dataclasses.replace(DFLASH, head=DFlash(shift_label=True)),
    }.items():
        params = learn_by_heart(drafter, target, own)
        config = DOMINO if name == "domino" else DFLASH
        save_drafter(params, config, root / name, provenance=origin)
    return root


def learn_by_heart(drafter: a.Drafter, target: dict, own: list[Generation]) -> dict:
    """Parameters of a drafter that was trained on these texts."""
    S = max(len(g.prompt) for g in own) + NEW
    rows = np.array([(g.prompt + g.tokens + [0] * S)[:S] for g in own], np.int32)
    at = np.broadcast_to(np.arange(S, dtype=np.int32), rows.shape)
    start, stop = (np.array(x)[:, None] for x in zip(*((len(g.prompt), len(g.prompt) + NEW) for g in own), strict=True))
    batch = Batch(
        tokens=jnp.asarray(rows),
        loss_mask=jnp.asarray((at >= start - 1) & (at < stop)),
        document_ids=jnp.asarray(at < stop, jnp.int32),
        positions=jnp.asarray(at),
    )
    settings = c.Optimisation(steps=240, learning_rate=1e-2)
    optimizer = make_optimizer(settings)
    step = make_train_step(LossConfig(drafter=drafter, objective=c.Objective("auf"), num_anchors=14), TARGET, optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, target, batch):
        return jax.lax.fori_loop(0, settings.steps, lambda _, state: step(state, target, batch)[0], state)

    return train(init_state(init_drafter(drafter, jax.random.key(0)), optimizer), target, batch).params


class Doctor:
    """Runs the command on a changed copy of a drafter."""

    def __init__(self, world: Path, folder: Path, capsys):
        self.world, self.folder, self.capsys = world, folder, capsys
        self.drafter = folder / "drafter"

    def copy(self, name: str):
        shutil.copytree(self.world / name, self.drafter)

    def edit(self, **changes):
        """Top-level keys of config.json; those of dflash_config as `dflash__key`; `...` removes one."""
        path = self.drafter / "config.json"
        values = json.loads(path.read_text())
        for name, value in changes.items():
            place = values["dflash_config"] if name.startswith("dflash__") else values
            key = name.removeprefix("dflash__")
            if value is ...:
                place.pop(key, None)
            else:
                place[key] = value
        path.write_text(json.dumps(values))

    def edit_tensors(self, change):
        path = self.drafter / "model.safetensors"
        save_file(change(load_file(path)), path)

    def __call__(self, *options: str) -> tuple[int, dict]:
        """Exit code and the JSON that was written."""
        out = self.folder / "out.json"
        folders = ["--target", str(self.world / "target"), "--drafter", str(self.drafter)]
        decoding = ["--prompts", str(self.world / "prompts.jsonl"), "--max-new-tokens", str(NEW), "--batch-size", "8"]
        if "--max-prompts" in options:
            decoding = []
        code = cli.main(["doctor", *folders, *decoding, "--out", str(out), *options])
        self.said = self.capsys.readouterr()
        return code, json.loads(out.read_text()) if code in (0, 1) else {}


@pytest.fixture
def doctor(world, tmp_path, capsys) -> Doctor:
    return Doctor(world, tmp_path, capsys)


def levels(result: dict, topic: str) -> list[str]:
    return [finding["level"] for finding in result["findings"] if finding["topic"] == topic]


def errors(result: dict) -> list[dict]:
    return [finding for finding in result["findings"] if finding["level"] == "error"]


def serves(result: dict) -> dict[str, str]:
    return {engine["name"]: engine["serves"] for engine in result["engines"]}


VERSIONS = {
    "SGLang": ("not known", "not known"),
    "vLLM": ("0.32.0", "2026-11-26"),
    "tpu-inference": ("0.32.0", "2026-11-26"),
    "sglang-jax": ("cddbf6f1 of 2026-08-21", "2026-11-26"),
    "speculators": ("0.9.0", "2026-11-24"),
    "SpecForge": ("0.2.0", "2026-11-24"),
    "z-lab": ("dflash 0.1.0", "2026-11-26"),
    "AutoModel": ("not known", "not known"),
}

# ---------------------------------------------------------------------------------------------
# Measured


@pytest.mark.parametrize("name", ["dflash", "domino"])
@pytest.mark.long
def test_a_sound_drafter(doctor, name):
    doctor.copy(name)
    code, result = doctor()
    assert code == 0 and errors(result) == []
    assert set(result) == {"findings", "measured", "engines", "summary", "meta"}
    assert result["summary"]["errors"] == 0 and result["summary"]["tau"] > 3
    given, *others = result["measured"]
    assert given["reading"] == "as written" and given["target_layer_ids"] == list(IDS) and given["gain"] == 0
    assert len([m for m in others if m["kind"] == "ids"]) == 6 and all(m["gain"] < -0.25 for m in others)
    assert levels(result, "layer ids") == ["note"] and levels(result, "labels") == []
    domino = name == "domino"
    assert serves(result) == {
        "SGLang": "yes",
        "vLLM": "no" if domino else "yes",
        "tpu-inference": "no",  # heads of 8
        "sglang-jax": "differently" if domino else "yes",
        "speculators": "no" if domino else "converted",
        "SpecForge": "converted" if domino else "yes",
        "z-lab": "differently" if domino else "yes",
        "AutoModel": "no",
    }
    assert {engine["name"]: (engine["version"], engine["date"]) for engine in result["engines"]} == VERSIONS
    if domino:
        [how] = [engine["why"] for engine in result["engines"] if engine["name"] == "z-lab"]
        plain = next(m["tau"] for m in others if m["kind"] == "plain")
        assert how == [f"ignores Domino's head: plain DFlash (tau {plain:.2f} instead of {given['tau']:.2f})"]
    engines = "SGLang" if domino else "SGLang, vLLM, sglang-jax"
    closing = f"tau {given['tau']:.2f}; as it is for {engines}"
    assert doctor.said.out.rstrip().endswith(closing) and not doctor.said.err


def test_a_dflash2_drafter(doctor):
    """Read, not decoded: random weights."""
    drafter = resolve_drafter(
        a.Drafter(block_size=K, num_hidden_layers=2, mask_token_id=MASK, target_layer_ids=IDS), TARGET
    )
    drafter = dataclasses.replace(drafter, head=DFlash2(conv_group_size=4, selector_rank=8, selector_top_k=4))
    save_drafter(init_drafter(drafter, jax.random.key(0)), drafter, doctor.drafter)
    code, result = doctor("--max-prompts", "0")
    expected = {"vLLM": "yes", "z-lab": "yes", "sglang-jax": "no", "tpu-inference": "no", "speculators": "converted"}
    assert serves(result).items() >= expected.items()
    assert code == 0 and levels(result, "tensors") == []
    wide = DFlash2(conv_group_size=96, conv_kernel_size=20, selector_top_k=5000)  # fits no drafter of the default sizes
    assert "layers.1.mlp_conv.base_kernel" in _tensor_names(wide, 2)


@pytest.mark.parametrize(
    ("head", "changes", "expected"),
    [
        ({}, {}, {"vLLM": "yes", "sglang-jax": "yes", "SpecForge": "differently", "speculators": "converted"}),
        ({"markov_head_type": "gated"}, {}, {"vLLM": "no", "sglang-jax": "no", "SpecForge": "differently"}),
        ({"shift_label": False}, {}, {"vLLM": "yes", "sglang-jax": "differently", "SpecForge": "converted"}),
        (
            {"enable_confidence_head": False},
            {"dflash__markov_head_type": "fir"},
            {"vLLM": "yes", "z-lab": "differently"},
        ),
    ],
)
def test_a_dspark_drafter(doctor, head, changes, expected):
    """Read, not decoded: random weights."""
    drafter = resolve_drafter(
        a.Drafter(block_size=K, num_hidden_layers=2, mask_token_id=MASK, target_layer_ids=IDS), TARGET
    )
    drafter = dataclasses.replace(drafter, head=DSpark(markov_rank=8, **head))
    save_drafter(init_drafter(drafter, jax.random.key(0)), drafter, doctor.drafter)
    doctor.edit(**changes)
    code, result = doctor("--max-prompts", "0")
    assert serves(result).items() >= expected.items()
    assert levels(result, "tensors") == []
    assert bool(errors(result)) == bool(changes) == bool(code)


@pytest.mark.parametrize(
    ("name", "ids"), [("dflash", (2, 4)), ("dflash", (0, 2)), ("dflash", (1, 2)), ("domino", (2, 3))]
)
def test_layer_ids_off_by_one(doctor, name, ids):
    doctor.copy(name)
    doctor.edit(dflash__target_layer_ids=list(ids))
    code, result = doctor()
    assert code == 1
    [finding] = errors(result)
    assert finding["topic"] == "layer ids" and f"write {list(IDS)} in" in finding["remedy"]
    moved = "layer id" if 1 in ids or 3 in ids else "all layer ids"
    assert f"target_layer_ids {list(ids)} decode at tau" in finding["found"] and f", {moved}" in finding["found"]


def test_layer_ids_that_the_target_does_not_have(doctor):
    doctor.copy("dflash")
    doctor.edit(dflash__target_layer_ids=[1, 6])
    code, result = doctor("--no-single-ids")
    assert code == 1
    assert [finding["found"] for finding in errors(result)] == ["target_layer_ids is [1, 6]"]
    assert "speculators" in errors(result)[0]["expected"]
    given, *_ = result["measured"]
    assert given["target_layer_ids"] == [0, 5] and given["gain"] is None and result["summary"]["tau"] is None


def test_labels_of_the_other_convention(doctor):
    doctor.copy("domino")
    doctor.edit(dflash__shift_label=False)
    code, result = doctor("--no-single-ids")
    [finding] = errors(result)
    assert code == 1 and finding["topic"] == "labels" and finding["remedy"] == "write shift_label true"


def test_a_plain_drafter_trained_with_shifted_labels(doctor):
    doctor.copy("shifted")
    code, result = doctor("--no-single-ids")
    [finding] = errors(result)
    assert code == 1 and finding["topic"] == "labels" and finding["remedy"] == "write shift_label true"
    tau = next(m["tau"] for m in result["measured"] if m["kind"] == "labels")
    assert tau > 3
    doctor.edit(dflash__shift_label=True)
    code, result = doctor("--no-single-ids")
    assert code == 0 and errors(result) == [] and result["summary"]["tau"] == tau
    unshifted = next(m["tau"] for m in result["measured"] if m["kind"] == "labels")
    said = f"is not known to read shifted labels of a plain drafter (tau {unshifted:.2f} instead of {tau:.2f})"
    for engine in result["engines"]:
        assert engine["serves"] != "yes" and (said in engine["why"] or engine["serves"] in ("no", "converted"))
    assert doctor.said.out.rstrip().endswith("as it is for no engine")


def test_wrong_mask_token(doctor):
    doctor.copy("dflash")
    doctor.edit(dflash__mask_token_id=100)
    code, result = doctor("--no-single-ids")
    assert code == 1
    assert levels(result, "mask token") == [
        "warning",
        "error",
        "error",
    ]  # not the tokenizer's, a word, and decodes worse
    assert "the tokenizer's own at" in errors(result)[-1]["found"]


def test_mask_token_in_the_texts(doctor):
    doctor.copy("dflash")
    prompts = doctor.folder / "masked.jsonl"
    prompts.write_text(json.dumps({"turns": ["red <|mask|>"]}) + "\n")
    code, result = doctor("--no-single-ids", "--prompts", str(prompts))
    assert code == 1
    assert [f["found"] for f in errors(result)] == ["mask_token_id 3 occurs in 1 of the texts"]


@pytest.mark.parametrize("changes", [{"rope_theta": ..., "rope_parameters": ..., "rope_scaling": ...},
                                     {"rope_theta": 1e6}])  # fmt: skip
def test_rope_that_cannot_be_read_is_measured_with_the_targets(doctor, changes):
    doctor.copy("dflash")
    doctor.edit(**changes)
    code, result = doctor("--no-single-ids")
    assert code == 1 and levels(result, "RoPE") == ["error"] and len(errors(result)) == 1
    assert result["summary"]["tau"] > 3
    assert "decoded with the target's RoPE, theta 10000" in [f["found"] for f in result["findings"]]


def test_rope_of_another_base(doctor):
    doctor.copy("dflash")
    doctor.edit(rope_theta=50.0, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    code, result = doctor("--no-single-ids")
    [finding] = errors(result)
    assert code == 1 and finding["topic"] == "RoPE"
    assert finding["found"].startswith("the drafter's RoPE is theta 50: tau ")


def test_block_sizes_that_disagree(doctor):
    doctor.copy("dflash")
    doctor.edit(block_size=8)
    code, result = doctor("--no-single-ids")
    [finding] = errors(result)
    assert code == 1 and finding["topic"] == "block size"
    assert finding["found"] == "block_size is 4 in dflash_config and 8 at the top level"
    assert result["summary"]["tau"] > 3


def test_embedding_in_the_file(doctor):
    doctor.copy("dflash")
    doctor.edit_tensors(lambda x: x | {"embed_tokens.weight": np.zeros((V, 32), np.float32)})
    code, result = doctor()
    [finding] = errors(result)
    assert code == 1 and finding["topic"] == "tensors" and "embed_tokens.weight" in finding["found"]
    assert result["measured"] == [] and levels(result, "decoding") == ["note"]
    assert serves(result)["tpu-inference"] == "no" and serves(result)["SGLang"] == "differently"


def test_random_weights(doctor):
    save_drafter(init_drafter(DFLASH, jax.random.key(9)), DFLASH, doctor.drafter)
    code, result = doctor("--no-single-ids")
    assert code == 0 and errors(result) == [] and levels(result, "acceptance") == ["warning"]
    assert levels(result, "layer ids") == []


def test_built_in_prompts(doctor):
    doctor.copy("dflash")
    folders = ["--target", str(doctor.world / "target"), "--drafter", str(doctor.drafter)]
    assert cli.main(["doctor", *folders, "--max-new-tokens", "4", "--no-single-ids"]) == 0
    assert "of 16 prompts" in doctor.capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Read


ROPE = {"rope_type": "default", "rope_theta": 1e4}
WINDOW = {"layer_types": ["sliding_attention"], "use_sliding_window": True, "sliding_window": 16}
FAULTS = {
    "ids missing": ("dflash", {"dflash__target_layer_ids": ...}, "layer ids", "error"),
    "ids at the top": ("dflash", {"dflash__target_layer_ids": ..., "target_layer_ids": [1, 3]}, "layer ids", "warning"),
    "mask at the top": ("dflash", {"dflash__mask_token_id": ..., "mask_token_id": MASK}, "mask token", "warning"),
    "two masks": ("dflash", {"mask_token_id": 5}, "decoding", "error"),
    "ids descending": ("dflash", {"dflash__target_layer_ids": [3, 1]}, "layer ids", "error"),
    "ids twice": ("dflash", {"dflash__target_layer_ids": [1, 1]}, "layer ids", "error"),
    "ids too high": ("dflash", {"dflash__target_layer_ids": [1, 6]}, "layer ids", "error"),
    "ids negative": ("dflash", {"dflash__target_layer_ids": [-1, 3]}, "layer ids", "error"),
    "ids of the last": ("dflash", {"dflash__target_layer_ids": [1, 5]}, "layer ids", "warning"),
    "ids too many": ("dflash", {"dflash__target_layer_ids": [0, 1, 3]}, "layer ids", "error"),
    "ids one above the usual": ("dflash", {"dflash__target_layer_ids": [2, 4]}, "layer ids", "note"),
    "mask missing": ("dflash", {"dflash__mask_token_id": ...}, "mask token", "error"),
    "mask null": ("dflash", {"dflash__mask_token_id": None}, "mask token", "error"),
    "mask 0": ("dflash", {"dflash__mask_token_id": 0}, "mask token", "error error error warning"),  # eos and pad too
    "mask outside": ("dflash", {"dflash__mask_token_id": V}, "mask token", "error"),
    "mask a word": ("dflash", {"dflash__mask_token_id": 40}, "mask token", "warning error"),
    "mask of the template": ("dflash", {"dflash__mask_token_id": 1}, "mask token", "warning error"),
    "mask is pad": ("dflash", {"pad_token_id": MASK}, "mask token", "error"),
    "no theta": ("dflash", {"rope_theta": ..., "rope_parameters": ...}, "RoPE", "error"),
    "two thetas": ("dflash", {"rope_theta": 5e5}, "RoPE", "error"),
    "theta in one place": ("dflash", {"rope_theta": ...}, "RoPE", "warning"),
    "no parameters": ("dflash", {"rope_parameters": ...}, "RoPE", "warning"),
    "other theta": ("dflash", {"rope_theta": 5e5, "rope_parameters": ROPE | {"rope_theta": 5e5}}, "RoPE", "error"),
    "old scaling only": ("dflash", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE",
                         "warning error"),
    "two scalings": ("dflash", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0},
                                "rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE", "error"),
    "no block size": ("dflash", {"block_size": ..., "dflash__block_size": ...}, "block size", "error"),
    "block size inside": ("dflash", {"block_size": ...}, "block size", "warning"),
    "block size outside": ("dflash", {"dflash__block_size": ...}, "block size", "note"),
    "block of one": ("dflash", {"block_size": 1, "dflash__block_size": 1}, "block size", "error error"),
    "vocabulary": ("dflash", {"vocab_size": 256}, "sizes", "error"),
    "width": ("dflash", {"hidden_size": 64}, "sizes", "error"),
    "heads": ("dflash", {"num_attention_heads": 8}, "sizes", "note"),
    "no depth": ("dflash", {"num_target_layers": ...}, "sizes", "warning"),
    "depth of taps": ("dflash", {"num_target_layers": 2}, "sizes", "error"),
    "tied": ("dflash", {"tie_word_embeddings": True}, "architecture", "warning"),
    "shifted": ("dflash", {"dflash__shift_label": True}, "head", ""),
    "shifted, in other words": ("dflash", {"sample_from_anchor": True}, "head", ""),
    "two conventions": ("domino", {"dflash__sample_from_anchor": False}, "decoding", "error"),
    "shift missing": ("domino", {"dflash__shift_label": ...}, "head", "error"),
    "shift no flag": ("domino", {"dflash__shift_label": 1}, "head", "error"),
    "no prefix length": ("domino", {"dflash__pure_draft_prefix_len": ...}, "head", "error"),
    "no GRU width": ("domino", {"dflash__gru_hidden_dim": ...}, "head", "error"),
    "no emb_dim outside": ("domino", {"emb_dim": ...}, "head", "note"),
    "no projector": ("domino", {"dflash__projector_type": ...}, "tensors", "error"),
    "settings of another head": ("domino", {"dflash__projector_type": ...}, "head", "error"),
    "known by the architecture": ("domino", {"architectures": ["DominoDraftModel"], "dflash__projector_type": ...},
                                  "head", "warning"),
    "older name of the projector": ("domino", {"dflash__projector_type": "causal_v5"}, "architecture", "warning"),
    "unknown outside": ("dflash", {"foo_scale": 3}, "keys", "warning"),
    "unknown, but off": ("dflash", {"foo_scale": None, "use_foo": False}, "keys", ""),
    "unknown inside": ("dflash", {"dflash__foo_scale": 3}, "decoding", "error"),
    "slots see less": ("dflash", {"dflash__causal": True}, "decoding", "error"),
    "other projector": ("domino", {"dflash__projector_type": "eagle"}, "architecture", "error"),
    "architecture": ("dflash", {"architectures": ["Qwen3ForCausalLM"]}, "architecture", "error"),
    "model type": ("dflash", {"model_type": "llama"}, "architecture", "warning"),
    "no code": ("dflash", {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}, "architecture", "warning"),
    "window unused": ("dflash", {"layer_types": ["sliding_attention"]}, "sliding windows", "error warning"),
    "window": ("dflash", WINDOW, "sliding windows", "warning"),
    "window of none": ("dflash", {"use_sliding_window": True, "sliding_window": 16}, "sliding windows", "warning"),
    "window not listed": ("dflash", {"layer_types": ..., "use_sliding_window": True, "sliding_window": 16},
                          "sliding windows", "warning warning"),
    "layers not listed": ("dflash", {"layer_types": ["full_attention"] * 2}, "sliding windows", "error"),
    "biases": ("dflash", {"attention_bias": True}, "decoding", "error"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_reading_shows(doctor, fault):
    name, changes, topic, expected = FAULTS[fault]
    doctor.copy(name)
    doctor.edit(**changes)
    code, result = doctor("--max-prompts", "0")
    assert levels(result, topic) == expected.split()
    assert code == ("error" in expected) and (code == 1) == bool(errors(result))
    assert result["measured"] == [] and "acceptance not measured" in doctor.said.out
    for finding in result["findings"]:
        assert all(finding[key] for key in ("found", "expected", "remedy")) and finding["found"] in doctor.said.out


@pytest.mark.parametrize(("name", "changes", "engine", "expected", "why"), [
    ("dflash", {"block_size": ...}, "tpu-inference", "no", "without block_size at the top level takes 8"),
    ("dflash", {"dflash__mask_token_id": ...}, "tpu-inference", "no", "takes token 0"),
    ("dflash", {"dflash__mask_token_id": ...}, "sglang-jax", "no", "needs mask_token_id"),
    ("dflash", {"dflash__mask_token_id": ...}, "SGLang", "no", "needs mask_token_id"),
    ("dflash", {"dflash__mask_token_id": ..., "mask_token_id": MASK}, "SGLang", "yes", ""),
    ("dflash", {"dflash__target_layer_ids": ..., "target_layer_ids": [1, 3]}, "sglang-jax", "no",
     "needs dflash_config.target_layer_ids"),
    ("dflash", {"dflash__target_layer_ids": ..., "target_layer_ids": [1, 3]}, "SGLang", "yes", ""),
    ("dflash", {"query_zero_predicts_next": True}, "SGLang", "differently", "not known to read shifted labels"),
    ("dflash", {"rope_parameters": ...}, "vLLM", "no", "needs rope_parameters"),
    ("dflash", {"rope_theta": ...}, "sglang-jax", "no", "needs rope_theta at the top level"),
    ("dflash", {"rope_parameters": ...}, "sglang-jax", "no", "and in rope_parameters"),
    ("dflash", {"dflash__target_layer_ids": ...}, "sglang-jax", "no", "needs dflash_config.target_layer_ids"),
    ("dflash", {"dflash__target_layer_ids": ...}, "tpu-inference", "no", "needs dflash_config.target_layer_ids"),
    ("dflash", {"dflash__target_layer_ids": [1, 2, 3]}, "SGLang", "no", "shape of fc.weight"),
    ("dflash", {"dflash__target_layer_ids": [1, 5]}, "speculators", "differently", "drops layer id 5"),
    ("dflash", {"dflash__target_layer_ids": [1, 5]}, "sglang-jax", "no", "never taps layer 5"),
    ("dflash", {"block_size": 8}, "SGLang", "yes", "takes block_size 4 of dflash_config"),
    ("dflash", {"architectures": ["Qwen3ForCausalLM"]}, "vLLM", "no", "needs architecture DFlashDraftModel"),
    ("dflash", WINDOW, "sglang-jax", "differently", "ignores layer_types"),
    ("dflash", WINDOW, "SpecForge", "differently", "decodes without"),
    ("dflash", WINDOW, "z-lab", "yes", "reads windows as this project does"),
    ("dflash", WINDOW, "vLLM", "yes", "reads windows as this project does; adds 1 to target_layer_ids itself"),
    ("domino", {}, "z-lab", "differently", "plain DFlash"),
    ("domino", {}, "sglang-jax", "differently", "one slot late"),
    ("domino", {"architectures": ["DominoDraftModel"]}, "SGLang", "no", "serves architecture DFlashDraftModel"),
    ("domino", {"architectures": ["DominoDraftModel"]}, "SpecForge", "yes", ""),
    ("domino", {}, "SpecForge", "converted", "under DominoDraftModel: specauf export --layout specforge"),
    ("domino", {"dflash__gru_hidden_dim": ...}, "SGLang", "no", "needs gru_hidden_dim of the head"),
    ("domino", {"dflash__projector_type": ...}, "tpu-inference", "no", "unknown and missing tensors: 4"),
])  # fmt: skip
def test_engines(doctor, name, changes, engine, expected, why):
    doctor.copy(name)
    doctor.edit(**changes)
    _, result = doctor("--max-prompts", "0")
    [found] = [e for e in result["engines"] if e["name"] == engine]
    assert found["serves"] == expected and why in "; ".join(found["why"])


LLAMA_31 = a.RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
MOE = {"model_type": "qwen3_moe", "experts": a.Experts(4, 2, 64, True)}
WINDOWS = {"layer_types": ("sliding_attention",), "sliding_window": 16}
QWEN3 = {"rope_theta": 1e6, "hidden_size": 2048, "num_attention_heads": 16, "head_dim": 128}  # 1.7B's
TPU, JAX = "tpu-inference", "sglang-jax"


@pytest.mark.parametrize(("engine", "changes", "target_changes", "serves", "why"), [
    (TPU, {}, {}, "yes", """--hf-overrides '{"rope_scaling": null}' makes it exact"""),
    (TPU, {"head_dim": 64}, {}, "no", "cannot run head_dim 64 with hidden_size / num_attention_heads 128: train with "),
    (TPU, {"head_dim": 32}, {}, "no", "a drafter of any heads for a target whose head_dim is 32"),
    (TPU, {"head_dim": 256}, {}, "no", "head_dim 256 with hidden_size / num_attention_heads 128"),
    (TPU, {"hidden_size": 1024}, {}, "no", "head_dim 128 with hidden_size / num_attention_heads 64"),  # Qwen3-0.6B
    (TPU, {"hidden_size": 1024, "num_attention_heads": 8}, {}, "yes", ""),
    (TPU, {"hidden_size": 2560, "num_attention_heads": 32}, {}, "yes", ""),  # Qwen3-4B: 80, padded to 128
    (TPU, {"rope_theta": 5e5}, {}, "differently", "takes theta 1e6 and Llama 3 scaling (with transformers 5): "
     """--hf-overrides '{"rope_theta": 500000}' corrects theta, not the scaling"""),
    (TPU, {}, {"rope_theta": 5e5}, "differently", "corrects theta"),
    (TPU, {"rope_theta": 5e5, "rope_scaling": LLAMA_31}, {}, "differently",
     """takes theta 1e6 and Llama 3 scaling (with transformers 5): --hf-overrides '{"rope_theta": 500000}' makes"""),
    (TPU, {"rope_scaling": dataclasses.replace(LLAMA_31, factor=32.0)}, {}, "differently", "not the scaling"),
    (TPU, {"rope_scaling": a.RopeScaling("yarn", 4.0, 8192)}, {}, "no", "has no YaRN"),
    (TPU, {}, {"model_type": "qwen2"}, "no", "taps dense Qwen3 and Llama targets only"),
    (TPU, {}, {"model_type": "llama"}, "yes", ""),
    (TPU, {}, MOE, "no", "taps dense Qwen3 and Llama targets only"),
    (TPU, WINDOWS, {}, "differently", "ignores layer_types"),
    (JAX, {}, {}, "yes", ""),
    (JAX, {"head_dim": 64}, {}, "yes", ""),
    (JAX, {"rope_theta": 5e5}, {}, "yes", ""),
    (JAX, {"rope_scaling": LLAMA_31}, {}, "differently", "ignores RoPE scaling"),
    (JAX, {}, {"tie_word_embeddings": True}, "no", "fails on a target whose LM head is its embedding"),
    (JAX, {}, {"model_type": "qwen2"}, "no", "taps dense Qwen3 and Llama targets only"),
    (JAX, {}, MOE, "no", "taps dense Qwen3 and Llama targets only"),
    (JAX, {"target_layer_ids": (1, 5)}, {}, "no", "never taps layer 5"),
    (JAX, WINDOWS, {}, "differently", "ignores layer_types"),
])  # fmt: skip
def test_tpu_engines(tmp_path, engine, changes, target_changes, serves, why):
    """A folder of real heads, by its config.json alone; the drafter follows its target but for `target_changes`."""
    shared = {name: x for name, x in (QWEN3 | changes).items() if hasattr(TARGET, name) and name not in WINDOWS}
    target = dataclasses.replace(TARGET, **shared | target_changes)
    drafter = dataclasses.replace(DFLASH, **QWEN3 | changes)
    leaves = jax.tree_util.tree_leaves_with_path(drafter_shapes(DFLASH))
    tensors = {name: () for path, leaf in leaves for name in file_names(path, leaf.shape)}
    config, target_config = write_drafter(drafter), write_target(target)
    folder = Folder(tmp_path, tmp_path, config, target_config, target, None, {}, tensors, unreadable=None)
    [row] = [row for row in engine_table(folder, {}) if row.name == engine]
    assert row.serves == serves and why in "; ".join(row.why)


def unserved(shape: tuple[int, int, int, int], target_size: int | None = None) -> str:
    """Of a drafter with hidden_size, heads, key/value heads and head_dim `shape`; its target has the same head_dim."""
    D, H, G, E = shape
    drafter = dataclasses.replace(DFLASH, hidden_size=D, num_attention_heads=H, num_key_value_heads=G, head_dim=E)
    return unserved_heads(drafter, dataclasses.replace(TARGET, head_dim=target_size or E))


@pytest.mark.parametrize(("shape", "flags", "served"), [
    ((1024, 16, 8, 128), "--drafter.num-attention-heads 8 --drafter.num-key-value-heads 8",  # Qwen3-0.6B
     (1024, 8, 8, 128)),
    ((2048, 32, 8, 64), "--drafter.num-attention-heads 16 --drafter.num-key-value-heads 8 --drafter.head-dim 128",
     (2048, 16, 8, 128)),  # Llama-3.2-1B
    ((1280, 20, 4, 64), "--drafter.num-attention-heads 10 --drafter.num-key-value-heads 2 --drafter.head-dim 128",
     (1280, 10, 2, 128)),
    ((576, 9, 3, 64), "--drafter.num-attention-heads 6 --drafter.num-key-value-heads 3 --drafter.head-dim 128",
     (576, 6, 3, 128)),  # SmolLM2-135M
    ((960, 15, 5, 64), "--drafter.num-attention-heads 8 --drafter.num-key-value-heads 4 --drafter.head-dim 128",
     (960, 8, 4, 128)),  # SmolLM2-360M
    ((64, 1, 1, 64), "--drafter.num-attention-heads 2 --drafter.num-key-value-heads 1 --drafter.head-dim 128",
     (64, 2, 1, 128)),
])  # fmt: skip
def test_heads_that_tpu_inference_runs(shape, flags, served):
    assert unserved(shape).endswith(f": train with {flags}")
    assert unserved(served, target_size=shape[-1]) == ""


@pytest.mark.parametrize("size", [8, 32, 80, 96])
def test_targets_whose_drafters_tpu_inference_never_runs(size):
    found = "a drafter of any heads for a target whose head_dim is"
    assert unserved((1024, 8, 8, 128), target_size=size) == f"{found} {size}"


def test_heads_name_known_engines():
    assert {name for head in head_types().values() for name in head.engines} <= {line.source.engine for line in LINES}


def test_a_window_is_measured_as_the_engines_read_it(doctor):
    doctor.copy("dflash")
    doctor.edit(**WINDOW)
    code, result = doctor("--no-single-ids")
    taus = {m["kind"]: m["tau"] for m in result["measured"]}
    assert code == 0 and taus["windows"] > 3 > taus["given"]
    [how] = [e["why"] for e in result["engines"] if e["name"] == "sglang-jax"]
    said = f"ignores layer_types: full attention (tau {taus['windows']:.2f} instead of {taus['given']:.2f})"
    assert said in how


def rename(old: str, new: str):
    return lambda tensors: {new + x.removeprefix(old) if x.startswith(old) else x: t for x, t in tensors.items()}


@pytest.mark.parametrize(("name", "change", "level", "found", "engine", "serves", "why"), [
    ("dflash", lambda x: x | {"lm_head.weight": np.zeros((V, 32), np.float32)}, "error", "lm_head.weight in the",
     "SGLang", "differently", "drops 1 tensors"),
    ("dflash", lambda x: {f"model.{n}": t for n, t in x.items()}, "error", "model.fc.weight and 13 more",
     "sglang-jax", "differently", "only warns of the 14 that it does not find"),
    ("dflash", lambda x: x | {"t2d": np.zeros(V, bool)}, "error", "unknown: t2d",
     "sglang-jax", "yes", "ignores tensors that it does not know"),
    ("dflash", lambda x: {n: t for n, t in x.items() if n != "norm.weight"}, "error", "missing: norm.weight",
     "sglang-jax", "differently", "only warns of missing tensors: 1"),
    ("domino", lambda x: rename("embed", "logit_head.embed")(rename("prefix", "logit_head.prefix")(x)), "warning",
     "logit_head.embed_proj.0.weight and 3 more: an early Domino file", "SpecForge", "differently", "early file"),
])  # fmt: skip
def test_tensors(doctor, name, change, level, found, engine, serves, why):
    doctor.copy(name)
    doctor.edit_tensors(change)
    code, result = doctor("--max-prompts", "0")
    assert code == (level == "error")
    [finding] = [f for f in result["findings"] if f["topic"] == "tensors"]
    assert finding["level"] == level and finding["found"].startswith(found)
    [row] = [row for row in result["engines"] if row["name"] == engine]
    assert row["serves"] == serves and why in "; ".join(row["why"])


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"junk")])
def test_weights_that_cannot_be_read(doctor, damage):
    doctor.copy("dflash")
    damage(doctor.drafter / "model.safetensors")
    code, result = doctor()
    assert code == 1 and levels(result, "tensors") == ["error"]
    assert set(serves(result).values()) == {"no"}


def test_tokenizer_of_training(doctor):
    doctor.copy("dflash")
    path = doctor.drafter / "specauf.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"template_sha256": "0" * 64}))
    code, result = doctor("--max-prompts", "0")
    assert code == 0 and levels(result, "chat template") == ["warning"]
    path.unlink()
    assert levels(doctor("--max-prompts", "0")[1], "chat template") == ["note"]


@pytest.mark.parametrize(("damage", "said"), [
    (lambda folder: shutil.rmtree(folder), "does not exist"),
    (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    (lambda folder: (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}'), "z-lab's layout"),
    (lambda folder: (folder / "config.json").write_text('{"speculators_model_type": "dflash"}'), "of speculators"),
])  # fmt: skip
def test_no_drafter_to_check(doctor, damage, said):
    doctor.copy("dflash")
    damage(doctor.drafter)
    assert doctor()[0] == 2 and said in doctor.said.err


def test_prompts_that_do_not_fit(doctor):
    doctor.copy("dflash")
    assert doctor("--max-new-tokens", "40000")[0] == 2 and "32768 positions" in doctor.said.err


JUNK = [None, -1, 0, 10**30, 0.5, float("nan"), True, "", "x", [], [None], [[1]], {}, {"a": 1}]


@pytest.mark.parametrize("name", ["dflash", "domino"])
def test_junk_is_a_finding_not_a_crash(doctor, name):
    doctor.copy(name)
    original = (doctor.drafter / "config.json").read_text()
    folder = read_folder(doctor.drafter, doctor.world / "target")
    keys = [*json.loads(original), *(f"dflash__{key}" for key in json.loads(original)["dflash_config"])]
    keys.remove("architectures")
    for key in keys:
        for junk in JUNK:
            (doctor.drafter / "config.json").write_text(original)
            doctor.edit(**{key: junk})
            changed = dataclasses.replace(folder, config=json.loads((doctor.drafter / "config.json").read_text()))
            read_findings(changed), engine_table(changed, {})


# ---------------------------------------------------------------------------------------------
# How variants are compared


def measured(accepted) -> Decoded:
    generations = [Generation(prompt=[1], tokens=[], accepted=list(history)) for history in accepted]
    return Decoded(Variant("given", "", DFLASH), generations)


def test_gain_by_hand():
    given = measured([[1, 1], [1, 1], [1, 1], [1, 1]])  # tau 2 everywhere
    other = measured([[3], [3], [1, 1], [1, 1]])  # 16 tokens in 6 rounds: tau 8/3
    # Leaving out a prompt of the first two: 12 / 5 = 2.4, of the others: 12 / 4 = 3.
    error = math.sqrt(3 / 4 * 4 * 0.15**2)
    assert gain(other, given) == Gain(pytest.approx(1 / 3), pytest.approx(error))
    assert gain(given, given) == Gain(0, 0)


def test_gain_of_few_prompts_counts_rounds():
    given, other = measured([[0, 2, 0, 2]]), measured([[1, 3, 1, 3]])
    found = gain(other, given)
    assert found.share == pytest.approx(0.5)
    assert found.error == pytest.approx(1.5 * math.sqrt(1 / 4 / 2**2 + 1 / 4 / 3**2))


@pytest.mark.parametrize(("share", "error", "exceeds"), [(0.2, 0.05, True), (0.2, 0.11, False), (0.09, 0.0, False)])
def test_exceeds(share, error, exceeds):
    assert Gain(share, error).exceeds(0.1, 2) is exceeds


def test_variants_of_layer_ids():
    def ids(*written: int, single_ids=True):
        drafter = dataclasses.replace(DFLASH, target_layer_ids=written)
        return [variant.layer_ids for variant in layer_id_variants(drafter, 6, single_ids=single_ids)]

    assert ids(1, 2, 5) == [
        *((1, 2, 5), (0, 1, 4)),  # one higher, the last does not exist
        *((0, 2, 5), (1, 3, 5), (1, 2, 4)),
    ]
    assert ids(3) == [(3,), (4,), (2,)]
    assert ids(0, 6, single_ids=False) == []


def test_layer_ids_decoded_together_are_those_decoded_alone(doctor):
    target_params, _ = load_target(doctor.world / "target")
    params, drafter = load_drafter(doctor.world / "dflash")
    tokenizer = load_tokenizer(doctor.world / "target")
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:2]]  # known to the drafter
    variants = layer_id_variants(drafter, TARGET.num_hidden_layers, single_ids=False)[:2]
    for d in decode_variants(variants, params, target_params, TARGET, prompts, max_new_tokens=12):
        config = Decoding(TargetStep(TARGET, d.variant.layer_ids), d.variant.drafter)
        assert d.generations == generate(params, target_params, prompts, config=config, max_new_tokens=12, batch_size=2)
