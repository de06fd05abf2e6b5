"""Drafters from folders: fine-tuned, exported in other layouts, and their conventions checked on the way."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from specauf_jax import cli
from specauf_jax.models.weights import load_drafter

TRAIN = "train --target pre/target --data data --train.batch-size 2 --train.num-anchors 4 --train.steps"
SHAPE = "--drafter.block-size 4 --drafter.num-hidden-layers 1"
DOMINO = "--drafter.projector-type domino --drafter.head emb_dim=6 gru_hidden_dim=5"


def specauf(line: str) -> None:
    assert cli.main(line.split()) == 0, line


def facts(folder) -> dict:
    return json.loads((Path(folder) / "specauf.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target, a plain drafter and a Domino drafter, each of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("world"))
        Path("text").mkdir()
        lines = [f"{i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(60)]
        Path("text/one.txt").write_text("".join(lines))
        Path("prompts.jsonl").write_text('{"prompt": "the quick"}\n{"prompt": "brown fox"}\n')
        specauf("prepare --input text --out data --vocab-size 300 --sequence-length 64")
        sizes = "--target.hidden-size 16 --target.intermediate-size 24 --target.num-hidden-layers 3 --target.head-dim 8"
        specauf(f"pretrain --data data --out pre {sizes} --train.steps 3 --train.batch-size 2")
        specauf(f"{TRAIN} 3 --out plain {SHAPE} --objective.name decay")
        variant = "--base-objective.name auf --objective.name auf --objective.witness base"
        specauf(f"{TRAIN} 3 --out domino {SHAPE} {DOMINO} {variant}")
        yield


@pytest.mark.parametrize("kind", ["plain", "domino"])
@pytest.mark.long
def test_training_starts_from_the_folders_weights(world, kind):
    specauf(f"{TRAIN} 0 --out {kind}_same --init-from {kind}/drafter")
    for name in ("config.json", "model.safetensors"):
        assert Path(f"{kind}_same/drafter/{name}").read_bytes() == Path(f"{kind}/drafter/{name}").read_bytes()
    specauf(f"{TRAIN} 2 --out {kind}_tuned --init-from {kind}/drafter --objective.name full")
    before, after = (load_file(f"{run}/drafter/model.safetensors") for run in (kind, f"{kind}_tuned"))
    assert all(np.abs(before[name] - after[name]).max() > 0 for name in before)
    assert max(np.abs(before[name] - after[name]).max() for name in before) < 0.01  # two small steps from there
    assert facts(f"{kind}_tuned/drafter")["init_from"] == f"{kind}/drafter"


def test_a_plain_drafter_with_shifted_labels(world, capsys):
    specauf(f"{TRAIN} 2 --out shifted {SHAPE} --drafter.head shift_label=true")
    assert (
        "warning: tpu-inference cannot run a drafter of any heads for a target whose head_dim is 8"
        in capsys.readouterr().out
    )
    specauf("export --drafter shifted/drafter --out shifted_again")
    specauf(f"{TRAIN} 2 --out shifted_tuned --init-from shifted/drafter")
    for folder in ("shifted/drafter", "shifted_again", "shifted_tuned/drafter"):
        assert load_drafter(folder)[1].head.shift_label
        assert "every slot is trained" in facts(folder)["labels"]
    command = f"{TRAIN} 2 --out refused --init-from shifted/drafter --drafter.head shift_label=false"
    assert cli.main(command.split()) == 2
    assert "asks for shift_label False, but shifted/drafter was trained with True" in capsys.readouterr().err


def test_dspark_trains_goes_on_and_is_served(world, capsys):
    """Its confidence head, a base branch only where asked for, and what `evaluate` says of the confidence."""
    head = "--drafter.projector-type dspark --drafter.head markov_rank=6 markov_head_type=gated"
    specauf(f"{TRAIN} 2 --out dspark {SHAPE} {head} --objective.loss ce=0.1,tv=0.9")
    logged = [json.loads(line) for line in Path("dspark/metrics.jsonl").read_text().splitlines()]
    measured = [row for row in logged if "loss" in row]
    assert measured and all(row["loss"] > row["final_loss"] and 0 < row["confidence_error"] < 1 for row in measured)
    assert not {"lambda_base", "base_loss"} & measured[0].keys() and "base_objective" not in facts("dspark/drafter")
    base = "--objective.name auf --objective.witness base --base-objective.name auf"
    assert cli.main(f"{TRAIN} 2 --out refused {SHAPE} {head} {base}".split()) == 2
    assert "where it has no effect" in capsys.readouterr().err
    specauf(f"{TRAIN} 2 --out both --init-from dspark/drafter {base} --train.lambda-base-decay-ratio 1")
    last = [json.loads(line) for line in Path("both/metrics.jsonl").read_text().splitlines()][-1]
    assert {"lambda_base", "base_loss"} <= last.keys() and facts("both/drafter")["base_objective"]["name"] == "auf"
    models = "--target pre/target --drafter both/drafter --prompts a=prompts.jsonl --max-new-tokens 6 --batch-size 2"
    specauf(f"evaluate {models} --out results.json --repeats 1")
    assert "drafts that stand" in capsys.readouterr().out
    shares = json.loads(Path("results.json").read_text())["overall"]["calibration"]
    assert shares.keys() == {"predicted", "observed"} and len(shares["predicted"]) == 3
    specauf(f"evaluate {models} --out tree.json --repeats 1 --tree-nodes 5 --tree-temperature 0.5")
    found = json.loads(Path("tree.json").read_text())
    assert (found["meta"]["tree_nodes"], found["meta"]["tree_temperature"]) == (5, 0.5)
    assert found["overall"]["exact"] and found["overall"]["calibration"] is None
    specauf("export --drafter both/drafter --out theirs --layout speculators --target pre/target")
    specauf("export --drafter theirs --out ours")
    assert Path("ours/model.safetensors").read_bytes() == Path("both/drafter/model.safetensors").read_bytes()


def test_a_trained_body_gets_a_head(world, capsys):
    """DFlash2 starts as the DFlash drafter in the folder, whose convention it keeps; its branches both train."""
    specauf(f"{TRAIN} 1 --out body {SHAPE}")
    head = "--drafter.projector-type dflash2 --drafter.head conv_group_size=4 selector_rank=6 selector_top_k=4"
    specauf(f"{TRAIN} 0 --out start --init-from body/drafter {head}")
    body, drafter = load_drafter("start/drafter")
    plain, before = load_drafter("body/drafter")
    assert drafter == dataclasses.replace(before, head=drafter.head) and drafter.head.selector_top_k == 4
    for name, layers in plain["layers"].items():
        assert tiny.same_bits(body["layers"][name], layers), name
    assert tiny.same_bits(body["fc"], plain["fc"])
    specauf(f"{TRAIN} 2 --out grown --init-from body/drafter {head} --base-objective.name auf")
    last = [json.loads(line) for line in Path("grown/metrics.jsonl").read_text().splitlines()][-1]
    assert (
        "base_loss" in last and "lambda_base" not in last and facts("grown/drafter")["base_objective"]["name"] == "auf"
    )
    specauf("export --drafter grown/drafter --out theirs --layout speculators --target pre/target")
    specauf("export --drafter theirs --out ours")
    assert Path("ours/model.safetensors").read_bytes() == Path("grown/drafter/model.safetensors").read_bytes()
    for more, said in (
        ("shift_label=true", "asks for shift_label True"),
        ("--train.lambda-base-decay-ratio 0.5", "whose branches both train to the end"),
        ("--objective.loss kl", "final branch of DFlash2"),
    ):
        assert cli.main(f"{TRAIN} 2 --out refused --init-from body/drafter {head} {more}".split()) == 2
        assert said in capsys.readouterr().err
    assert cli.main(f"{TRAIN} 2 --out refused --init-from grown/drafter --drafter.projector-type domino".split()) == 2


def test_texts_may_be_as_long_as_yarn_stretches_a_target(world, capsys):
    shutil.copytree("pre/target", "yarn")
    config = json.loads(Path("yarn/config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config |= {"max_position_embeddings": 16, "rope_scaling": rope,
               "rope_parameters": rope | {"rope_theta": config["rope_theta"]}}  # fmt: skip
    Path("yarn/config.json").write_text(json.dumps(config))
    specauf(f"{TRAIN} 1 --out yarned {SHAPE}".replace("pre/target", "yarn"))  # rows of 64
    room = "generate --target yarn --drafter yarned/drafter --prompts prompts.jsonl --out room --max-new-tokens"
    specauf(f"{room} 50")
    assert cli.main(f"{room} 62".split()) == 2 and "at most the target's 64 positions" in capsys.readouterr().err


def test_an_unknown_key_is_told_once(world, capsys):
    for folder, name in (("plain/drafter", "odd_drafter"), ("pre/target", "odd_target")):
        shutil.copytree(folder, name)
        config = json.loads(Path(f"{name}/config.json").read_text()) | {f"{name}_scale": 3}
        Path(f"{name}/config.json").write_text(json.dumps(config))
    line = "generate --target odd_target --drafter odd_drafter --prompts prompts.jsonl --out odd --max-new-tokens 4"
    for _ in range(2):  # of one process
        specauf(line)
        told = capsys.readouterr().err
        assert told.count("odd_target_scale") == told.count("odd_drafter_scale") == 1
        assert told.count("specauf: warning: ") == 2


def test_what_a_drafter_says_of_its_origin(world):
    plain, domino = facts("plain/drafter"), facts("domino/drafter")
    manifest = json.loads(Path("data/manifest.json").read_text())
    for found in (plain, domino):
        assert found["steps"] == 3 and found["target"] == "pre/target" and found["init_from"] is None
        assert found["tokenizer_sha256"] == manifest["tokenizer_sha256"]
        assert found["template_sha256"] == manifest["template_sha256"]
    assert plain["objective"]["name"] == "decay" and "base_objective" not in plain
    assert domino["base_objective"]["name"] == "auf" and domino["objective"]["witness"] == "base"
    assert "slot 0 is not trained" in plain["labels"] and "every slot is trained" in domino["labels"]


@pytest.mark.parametrize(
    ("kind", "asked", "said"),
    [
        ("plain", "--drafter.block-size 8", "asks for block_size 8, but plain/drafter was trained with 4"),
        ("plain", f"{DOMINO} shift_label=true", "asks for shift_label True, but plain/drafter was trained with False"),
        (
            "domino",
            "--drafter.projector-type dspark",
            "asks for projector_type 'dspark', but domino/drafter was trained",
        ),
        (
            "domino",
            "--drafter.head shift_label=false",
            "asks for shift_label False, but domino/drafter was trained with True",
        ),
        ("domino", "--drafter.mask-token-id 7", "asks for mask_token_id 7"),
        ("plain", "--drafter.target-layer-ids 0", "asks for target_layer_ids (0,)"),
        ("plain", "--drafter.rope-theta 5", "asks for rope_theta 5.0"),
    ],
)
def test_other_conventions_are_refused(world, capsys, kind, asked, said):
    if "no-shift-label" in asked:
        asked = "--drafter.shift-label False"
    assert cli.main(f"{TRAIN} 2 --out refused --init-from {kind}/drafter {asked}".split()) == 2
    assert said in capsys.readouterr().err
    assert not Path("refused").exists()


def test_what_is_repeated_is_accepted(world):
    specauf(f"{TRAIN} 0 --out repeated --init-from domino/drafter {SHAPE} {DOMINO} shift_label=true")


def test_another_mask_token_is_asked_about(world, capsys):
    config = json.loads(Path("plain/drafter/config.json").read_text())
    config["dflash_config"]["mask_token_id"] = 5
    Path("masked").mkdir()
    Path("masked/config.json").write_text(json.dumps(config))
    Path("masked/model.safetensors").write_bytes(Path("plain/drafter/model.safetensors").read_bytes())
    assert cli.main(f"{TRAIN} 0 --out asked --init-from masked".split()) == 2
    assert "masked was trained with mask token 5" in capsys.readouterr().err
    specauf(f"{TRAIN} 0 --out asked --init-from masked --drafter.mask-token-id 5")


def test_exports(world, capsys):
    specauf("export --run domino --out served")
    specauf("export --drafter served --out forge --layout specforge")
    specauf("export --drafter forge --out back")
    for name in ("config.json", "model.safetensors", "specauf.json"):
        assert Path("back", name).read_bytes() == Path("served", name).read_bytes()
    assert json.loads(Path("forge/config.json").read_text())["architectures"] == ["DominoDraftModel"]
    assert facts("forge") == facts("domino/drafter")
    specauf("export --run plain --out half --dtype bfloat16")
    params, _ = load_drafter("half", "bfloat16")
    exact, _ = load_drafter("plain/drafter", "bfloat16")
    np.testing.assert_array_equal(params["fc"]["kernel"], exact["fc"]["kernel"])
    specauf("export --run plain --out other --layout speculators")
    verifier = json.loads(Path("other/config.json").read_text())["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "pre/target", "architectures": ["Qwen3ForCausalLM"]}
    assert cli.main(["export", "--drafter", "plain/drafter", "--out", "never", "--layout", "speculators"]) == 2
    assert "pass --target" in capsys.readouterr().err
    assert cli.main(["export", "--out", "never"]) == 2
    assert "neither --run nor --drafter" in capsys.readouterr().err


def test_domino_decodes_exactly(world):
    specauf(
        "evaluate --target pre/target --drafter domino/drafter --prompts a=prompts.jsonl --out results.json "
        "--max-new-tokens 8 --batch-size 2 --repeats 1"
    )
    results = json.loads(Path("results.json").read_text())
    assert results["overall"]["exact"] is True and results["meta"]["drafter"]["base_objective"]["name"] == "auf"
