"""The command line: help at once, recipes, settings from files, and every command after the other."""

import dataclasses
import hashlib
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specauf_jax import cli, config
from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import Objective, TrainOptimisation
from specauf_jax.errors import SpecaufError
from specauf_jax.recipes import from_dict

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.py"))

# ---------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"usage: specauf {command}" in said and "--config RECIPE.py" in said
    names = {field.name for field in dataclasses.fields(cli.COMMANDS[command][0])}
    if "sampling" in names:  # its flags have no prefix
        names = names - {"sampling"} | {"temperature", "top_k", "top_p"}
    for name in names:
        assert name.replace("_", "-") in said.lower().replace("_", "-")


def test_overview(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)
    assert cli.main([]) == 2


def test_help_of_everything_without_jax():
    code = """
import sys
from specauf_jax import cli
for command in cli.COMMANDS:
    try:
        cli.main([command, "--help"])
    except SystemExit:
        pass
assert not {"jax", "tensorflow_datasets", "transformers", "matplotlib"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_as_a_module_and_at_once():
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "specauf_jax", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--train.num-anchors" in done.stdout
    assert time.perf_counter() - begin < 2


# ---------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    values = runpy.run_path(str(recipe))
    [command] = [name for name, (settings, *_) in cli.COMMANDS.items() if type(values["config"]) is settings]
    assert f"specauf {command} --config configs/{recipe.name}" in values["__doc__"]
    parsed = cli._parse(cli.COMMANDS[command][0], command, ["--config", str(recipe)])
    assert parsed == values["config"]


@pytest.mark.parametrize("joined", [False, True])
def test_arguments_override_a_recipe(joined):
    path = str(ROOT / "configs" / "tiny_cpu.py")
    recipe = [f"--config={path}"] if joined else ["--config", path]
    parsed = cli._parse(Train, "train", ["--train.steps", "7", *recipe, "--objective.name", "griffin"])
    assert parsed.objective == Objective(name="griffin")
    recipe = runpy.run_path(path)["config"]
    assert parsed.train == dataclasses.replace(recipe.train, steps=7) and parsed.drafter == recipe.drafter


def test_settings_round_trip():
    settings = Train(
        target="a",
        data="b",
        out="c",
        drafter=Drafter(block_size=8, target_layer_ids=(1, 3), mask_token_id=None),
        objective=Objective("decay", gamma=2.5),
        train=TrainOptimisation(decode_every=100, decode_files=("x.jsonl", "y.jsonl"), learning_rate=1.0),
        mesh=config.Mesh(tensor=2),
    )
    assert from_dict(Train, json.loads(json.dumps(dataclasses.asdict(settings))), "file") == settings
    assert hash(settings) == hash(from_dict(Train, dataclasses.asdict(settings), "file"))


@pytest.mark.parametrize("command", ["generate", "evaluate", "regenerate", "synthesize"])
def test_sampling_has_the_same_flags_everywhere(tmp_path, command):
    settings, _ = cli.COMMANDS[command]
    names = [field.name for field in dataclasses.fields(settings) if field.default is dataclasses.MISSING]
    required = dict.fromkeys(names, "x")
    others = {"generate": {"drafter": "x"}, "evaluate": {"prompts": ("x",)}, "synthesize": {"conversations": 3}}
    required |= others.get(command, {})
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"""
from specauf_jax.commands.{command}_settings import {settings.__name__}
from specauf_jax.config import Sampling

config = {settings.__name__}(**{required!r}, sampling=Sampling(0.5, top_k=3))
""")
    parsed = cli._parse(settings, command, ["--config", str(recipe), "--top-k", "4", "--top-p", "0.9", "--seed", "5"])
    assert parsed == settings(**required, sampling=config.Sampling(0.5, 4, 0.9), seed=5)
    assert from_dict(settings, json.loads(json.dumps(dataclasses.asdict(parsed))), "file") == parsed


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"trian": {}}, r"config.json: unknown field 'trian' of Train \(did you mean 'train'\?\)"),
        ({"train": {"step": 3}}, r"config.json: train: unknown field 'step' of TrainOptimisation .*'steps'"),
        ({"out": 3}, "config.json: out is 3"),
        ({"drafter": {"block_size": "4"}}, "config.json: drafter: block_size is '4'"),
        ({"drafter": {"block_size": True}}, "block_size is True"),
        ({"drafter": {"block_size": 4.0}}, "block_size is 4.0"),
        ({"objective": {"name": "griffon"}}, "griffon"),
        ({"train": {"decode_files": "x.jsonl"}}, "decode_files is 'x.jsonl'"),
        ({"train": []}, r"train is \[\]"),
    ],
)
def test_settings_that_do_not_fit(change, found):
    with pytest.raises(SpecaufError, match=found):
        from_dict(Train, {"target": "a", "data": "b", "out": "c"} | change, "config.json")


# ---------------------------------------------------------------------------------------------
# All commands, one after another


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.long
def test_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def specauf(line: str) -> str:
        assert cli.main(line.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    Path("text").mkdir()
    for name in ("one", "two", "three"):
        text = [f"{name} {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(20)]
        Path(f"text/{name}.txt").write_text("".join(text))
    # Lengths that are all padded to the same one: most of the time goes into compiling shapes.
    talk = [{"turns": ["HOW MANY DOGS?!?", "!"]}, {"prompt": "the quick"}]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))

    specauf("prepare --input text --out data --vocab-size 300 --sequence-length 64")

    sizes = "--target.hidden-size 16 --target.intermediate-size 24 --target.num-hidden-layers 3 --target.head-dim 8"
    specauf(f"pretrain --data data --out pre {sizes} --train.steps 3 --train.batch-size 2")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in Path("pre/target").iterdir()}
    assert [row["step"] for row in lines("pre/metrics.jsonl")] == [1, 3]

    # A slash at the end, as the shell completes folders.
    decode = "--max-new-tokens 16 --batch-size 4"
    specauf(f"regenerate --data data --target pre/target --out own/ --prompt-length 8 {decode}")
    own = json.loads(Path("own/manifest.json").read_text())
    assert own["prompts"] == {} and 0 < own["supervised_share"] < 1 and own["sequence_length"] == 64
    assert sorted(path.name for path in Path("own").iterdir()) == ["dataset", "manifest.json", "tokenizer"]
    assert not Path("own.parts").exists()

    train = (
        "train --target pre/target --data own --out run "
        "--drafter.block-size 4 --drafter.num-hidden-layers 1 --drafter.target-layer-ids 2 "
        "--train.steps 4 --train.batch-size 2 --train.accumulation 2 --train.num-anchors 4 --train.checkpoint-every 2 "
        "--train.decode-every 2 --train.decode-files prompts.jsonl --train.decode-tokens 8 --train.log-every 2"
    )
    specauf(train)
    logged = lines("run/metrics.jsonl")
    assert [row["step"] for row in logged if "decode_tau" in row] == [2, 4]
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 4]
    before = digest("run/drafter/model.safetensors"), Path("run/metrics.jsonl").read_bytes()
    assert "resuming run at step 4 of 4" in specauf(train)
    assert (digest("run/drafter/model.safetensors"), Path("run/metrics.jsonl").read_bytes()) == before

    specauf("export --run run --out drafter")
    for name in ("model.safetensors", "config.json", "specauf.json"):
        assert digest(f"drafter/{name}") == digest(f"run/drafter/{name}")
    specauf("export --run run --out earlier --step 2")
    assert json.loads(Path("earlier/specauf.json").read_text())["steps"] == 2
    assert digest("earlier/model.safetensors") != digest("drafter/model.safetensors")

    models = "--target pre/target --drafter drafter --max-new-tokens 6 --batch-size 2"
    assert ", exact" in specauf(f"generate {models} --prompts prompts.jsonl --out speculative.jsonl --check")
    alone = models.replace(" --drafter drafter", "")
    specauf(f"generate {alone} --prompts prompts.jsonl --out plain.jsonl --method autoregressive")
    speculative, plain = lines("speculative.jsonl"), lines("plain.jsonl")
    assert [row["tokens"] for row in speculative] == [row["tokens"] for row in plain]
    tree = f"generate {models} --prompts prompts.jsonl --out tree.jsonl --check --tree-nodes 6"
    assert ", exact" in specauf(tree)
    assert [row["tokens"] for row in lines("tree.jsonl")] == [row["tokens"] for row in plain]
    keys = {"prompt_tokens", "tokens", "text", "rounds", "accepted"}
    for row in speculative:
        assert set(row) - {"turns"} == keys and row["rounds"] == len(row["accepted"])
    assert set(speculative[0]) - keys == {"turns"} and "turns" not in speculative[1]
    first, second = speculative[0]["turns"]
    assert speculative[0]["tokens"] == first["tokens"] + second["tokens"]
    assert second["prompt_tokens"][: len(first["prompt_tokens"])] == first["prompt_tokens"]
    assert all(row["accepted"] == [0] * len(row["tokens"]) for row in plain)

    Path("one.jsonl").write_text(json.dumps(talk[1]) + "\n")
    streamed = specauf(f"generate {models.removesuffix(' --batch-size 2')} --prompts one.jsonl")
    assert "1 prompts, " in streamed and "the quick" in streamed

    said = specauf(f"evaluate {models} --prompts a=prompts.jsonl b=prompts.jsonl --out results.json --repeats 1")
    results = json.loads(Path("results.json").read_text())
    assert "exact" in said and set(results) == {"overall", "sets", "meta"} and set(results["sets"]) == {"a", "b"}
    for part in (results["overall"], *results["sets"].values()):
        assert set(part) == {
            *("tau_micro", "tau_macro", "tau_outside_loops", "alpha", "calibration", "rounds", "tokens", "prompts"),
            *(
                "exact",
                "compared",
                "mismatches",
                "ties",
                "largest_tie_gap",
                "tokens_per_s",
                "ms_per_token",
                "prefill_s",
                "speedup",
            ),
            *("autoregressive_tokens_per_s", "autoregressive_ms_per_token", "autoregressive_prefill_s"),
        }
        assert part["exact"] is True and part["mismatches"] == 0 and len(part["alpha"]) == 3
    assert results["sets"]["a"]["compared"] == 3 and results["overall"]["compared"] == 6
    rounds = [a for row in speculative for a in row["accepted"]]
    assert results["sets"]["a"]["tau_micro"] == pytest.approx(1 + sum(rounds) / len(rounds))
    assert results["meta"]["objective"] == "auf" and results["meta"]["block_size"] == 4

    specauf("report mine=run,results.json --out page.html")
    page = Path("page.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert "mine" in page
    assert not [path.name for path in tmp_path.rglob(".*")]

    drafters = "--drafters mine=drafter --prompts prompts.jsonl --out speed.json"
    said = specauf(f"benchmark --target pre/target {drafters} --batch-sizes 1 --repeats 1 --max-new-tokens 6")
    assert json.loads(Path("speed.json").read_text())["decoding"]["1"].keys() == {
        *("autoregressive", "prompt_lookup", "mine")
    }
    assert "autoregressive" in said and "…" not in said  # nothing of a table is cut off in a log
