"""The benchmark: what it reports, that it measures what is decoded, what it refuses; parameters in serving form."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from specauf_jax.commands.benchmark import CONVENTIONS, Method, _narrowed, benchmark, summary
from specauf_jax.commands.benchmark_settings import Benchmark
from specauf_jax.commands.benchmark_train import _architectures, benchmark_train
from specauf_jax.commands.benchmark_train_settings import BenchmarkTrain
from specauf_jax.commands.report import write_report
from specauf_jax.commands.report_settings import Report
from specauf_jax.commands.train_settings import Train
from specauf_jax.data.tokenizer import train_bpe
from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.decoding.generate import Generation, generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation import timing
from specauf_jax.evaluation.runs import read_benchmark
from specauf_jax.evaluation.timing import Timed
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.target import TargetStep, target_features
from specauf_jax.models.weights import save_drafter, save_target
from specauf_jax.recipes import read_recipe

WORDS = ["the quick brown fox", "jumps over", "the lazy dog and the quick brown fox"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("benchmark")
    target = tiny.target_config(vocab_size=300)
    save_target(tiny.target_params(target), target, root / "target")
    train_bpe(WORDS * 9, 300, root / "target")
    drafter = tiny.drafter_config(target, mask_token_id=3, target_layer_ids=(1,))
    save_drafter(tiny.drafter_params(drafter), drafter, root / "drafter")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": words}) + "\n" for words in WORDS))
    return root


def settings(world: Path, **changes) -> Benchmark:
    common = {"max_new_tokens": 6, "max_prompts": 2, "repeats": 2, "lookup_block_size": 4}
    paths = {"target": str(world / "target"), "prompts": str(world / "prompts.jsonl")}
    return Benchmark(**paths, out=str(world / "speed.json"), **(common | changes))


def test_every_method(world):
    config = settings(world, drafters=(f"mine={world / 'drafter'}",), batch_sizes=(4,), tree_nodes=(9,))
    found = benchmark(config, Console(quiet=True))
    assert json.loads(Path(config.out).read_text())["decoding"] == found["decoding"]
    assert set(found) == {"decoding", "meta"} and list(found["decoding"]) == ["4"]
    for size, methods in found["decoding"].items():
        assert list(methods) == ["autoregressive", "prompt_lookup", "mine", "mine/tree 9"]
        assert [m["tree_nodes"] for m in methods.values()] == [None, None, None, 9]
        for name, m in methods.items():
            assert m["exact"] is True and m["mismatches"] == 0 and m["compared"] == max(int(size), 2)
            assert 0 < m["tokens"] == methods["autoregressive"]["tokens"] <= 6 * m["compared"]
            assert m["block_size"] == (1 if name == "autoregressive" else 4)
            assert 1 <= m["tau"] <= m["block_size"]
            for key in ("tokens_per_s", "ms_per_token", "ms_per_round", "prefill_s", "speedup"):
                assert 0 < m[key]["p10"] <= m[key]["median"] <= m[key]["p90"]
            round_ = m["round"]
            whole = round_["draft_ms"] + round_["verify_ms"] + round_["commit_ms"]
            assert whole == pytest.approx(round_["round_ms"])
            assert (round_["draft_ms"] == 0) == (name == "autoregressive") and round_["verify_ms"] > 0
        assert methods["autoregressive"]["speedup"]["median"] == 1
        for name in ("autoregressive", "mine/tree 9"):
            assert not {"alpha", "widths"} & methods[name].keys()
        assert methods["mine/tree 9"]["tau"] >= methods["mine"]["tau"]
        for name in ("prompt_lookup", "mine"):
            m = methods[name]
            assert len(m["alpha"]) == 3 and m["widths"].keys() == {"2", "4"}
            alone_ms = methods["autoregressive"]["round"]["round_ms"]
            for width in m["widths"].values():
                assert width["speedup"] == pytest.approx(width["tokens"] / width["round_ms"] * alone_ms)
            assert m["widths"]["2"]["tokens"] == pytest.approx(1 + m["alpha"][0])
            assert m["widths"]["4"]["tokens"] == pytest.approx(m["tau"])  # what alpha was measured on
            best = m["widths"][str(m["fastest_width"])]
            assert best["speedup"] == max(width["speedup"] for width in m["widths"].values())
    named = {key.split(".")[-1] for keys in CONVENTIONS for key in keys.split(", ")}
    assert named <= {*m, *m["round"], *m["speedup"]}


def test_a_drafter_may_not_be_called_as_a_tree_is(world):
    folder = world / "drafter"
    config = settings(world, drafters=(f"a={folder}", f"a/tree 4={folder}"), batch_sizes=(1,), tree_nodes=(4,))
    with pytest.raises(SpecaufError, match="a drafter named a/tree 4"):
        benchmark(config, Console(quiet=True))


def test_fewer_tokens_are_verified_for_drafters_alone(world):
    step, config = TargetStep(tiny.target_config(), (0, 1)), settings(world, verify_slots=3)
    for drafter, size in ((None, 1), (PromptLookup(4), 4), (tiny.drafter_config(), 3)):
        method = Method(Decoding(step, drafter))
        models = SimpleNamespace(target_params=None, mesh=None)
        assert _narrowed(method, [], 1, models, config, Console(quiet=True)).decoding.block_size == size


def test_widths_by_hand(monkeypatch):
    """A round of n tokens takes 10 + n ms, but for the first one of each, which compiles."""
    drafter = tiny.drafter_config(block_size=12)
    config, seen, probed = Decoding(TargetStep(tiny.target_config(), (0, 1)), drafter), [], []

    def part(what, *params, config):
        seen.append(config.block_size)
        first = seen.count(config.block_size) == 1
        noise = {2: 0.005, 3: -0.005}.get(seen.count(config.block_size), 0.0)
        return (9.0 if first else (10 + config.block_size) / 1000 + noise), "state"

    monkeypatch.setattr(timing, "timed_part", part)
    accepted = [0.8, 0.5, None, *[0.0] * 8]
    found = timing.widths(None, None, "state", config=config, accepted=accepted)
    assert [(w.slots, w.round_ms, w.tokens) for w in found] == [
        (2, pytest.approx(12), pytest.approx(1.8)),
        (4, pytest.approx(14), pytest.approx(2.2)),
        (8, pytest.approx(18), pytest.approx(2.2)),
        (12, pytest.approx(22), pytest.approx(2.2)),
    ]
    assert found[0].tokens_per_ms == pytest.approx(0.15)
    assert seen == [n for n in (2, 4, 8, 12) for _ in range(4)]
    for whole, sizes in ((2, [2]), (3, [2, 3]), (4, [2, 4]), (9, [2, 4, 8, 9])):
        narrow = dataclasses.replace(config, verify_slots=whole)
        assert [w.slots for w in timing.widths(None, None, "s", config=narrow, accepted=accepted)] == sizes

    def probe(*params, config, batch_size, **options):
        probed.append((params[2], config.block_size, batch_size))
        return Timed([Generation([1], [], [0, 11, 1, 3])], 0.0, 0.0, 0)

    monkeypatch.setattr(timing, "timed_pass", probe)
    monkeypatch.setattr(timing, "start", lambda *params, **options: "state")
    narrow = dataclasses.replace(config, verify_slots=2)
    best, *others = timing.fastest_width(None, None, [[5], [6]], config=narrow, batch_size=3)
    assert probed == [([[5], [6], [5]], 12, 3)]  # of all slots, whatever was asked for before
    # Of 4 rounds 3, 2, 2 accepted 1, 2, 3 drafts and one all of them: 1.75 of 2, 3 of 4 and more of 8 and 12 tokens.
    assert {w.slots: w.tokens for w in (best, *others)} == pytest.approx({2: 1.75, 4: 2.75, 8: 3.75, 12: 4.75})
    assert best.slots == 12 and [w.slots for w in others] == [8, 4, 2]


def test_a_summary_by_hand():
    def passes(seconds, accepted, rounds):
        tokens = [[7] * 6, [7] * 6]
        return [Timed([Generation([1], t, a) for t, a in zip(tokens, accepted, strict=True)], 0.5, s, rounds)
                for s in seconds]  # fmt: skip

    own, alone = passes([1.0, 2.0, 4.0], [[2, 2], [1, 1, 1]], 3), passes([4.0, 6.0, 8.0], [[0] * 6] * 2, 6)
    found = summary(own, alone, size=2)
    assert found["tau"] == pytest.approx(1 + 7 / 5) and found["tokens"] == 12
    assert found["tokens_per_s"]["median"] == 6 and found["speedup"]["median"] == 3
    assert found["ms_per_token"]["median"] == pytest.approx(1000 / 3)  # a row of 6 tokens in 2 s
    assert found["ms_per_round"]["median"] == pytest.approx(2000 / 3)


def test_refusals(world):
    folder = world / "drafter"
    for arguments in (("drafter",), (f"a={folder}", f"a={folder}"), (f"autoregressive={folder}",), ("a=nowhere",)):
        with pytest.raises(SpecaufError, match="--drafters|does not exist"):
            benchmark(settings(world, drafters=arguments), Console(quiet=True))
    for read in ("drafter/config.json", "target/config.json", "prompts.jsonl"):
        before = (world / read).read_bytes()
        with pytest.raises(SpecaufError, match="would be written over"):
            benchmark(
                dataclasses.replace(settings(world, drafters=(f"a={folder}",)), out=str(world / read)),
                Console(quiet=True),
            )
        assert (world / read).read_bytes() == before
    for changes in ({"batch_sizes": (1, 1)}, {"batch_sizes": ()}, {"lookup_block_size": 1}, {"repeats": 0}):
        with pytest.raises(SpecaufError):
            settings(world, **changes)


TWO_DEVICES = """
import sys
from pathlib import Path
from rich.console import Console
from test_benchmark import benchmark, settings
from specauf_jax.errors import SpecaufError

world = Path(sys.argv[1])
drafters = (f"mine={world / 'drafter'}",)
try:
    benchmark(settings(world, batch_sizes=(2, 3)), Console(quiet=True))
except SpecaufError as error:
    assert "batch_size 3" in str(error), error
    found = benchmark(settings(world, batch_sizes=(2,), drafters=drafters), Console(quiet=True))
    print(found["meta"]["mesh"]["fsdp"], *(m["exact"] for m in found["decoding"]["2"].values()))
"""


@pytest.mark.long
def test_two_devices_share_the_rows(world):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)}
    environment["PYTHONPATH"] += f"{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", TWO_DEVICES, str(world)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "True", "True", "True"], done.stderr[-3000:]


def test_the_report_plots_speed_against_batch_size(tmp_path):
    def speed(value):
        return {"tokens_per_s": {"median": value}, "speedup": {"median": value / 100}}

    sizes = {size: {"autoregressive": speed(100), "mine": speed(100 + 10 * int(size))} for size in ("1", "16", "4")}
    (tmp_path / "speed.json").write_text(json.dumps({"decoding": sizes}))
    assert read_benchmark(str(tmp_path / "speed.json"))["mine"][4] == {"tokens_per_s": 140.0, "speedup": 1.4}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    config = Report(runs=(str(tmp_path / "run"),), out=str(tmp_path / "a.html"), benchmark=str(tmp_path / "speed.json"))
    page = Path(write_report(config, Console(quiet=True))).read_text()
    assert "Speed against batch size" in page and page.count(">mine</span>") == 2
    assert 'id="benchmark-speedup-' in page
    (tmp_path / "speed.json").write_text(json.dumps({"decoding": {"1": {"mine": {}}}}))
    with pytest.raises(SpecaufError, match="tokens_per_s"):
        write_report(config, Console(quiet=True))


# Parameters in serving form -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2"])
def test_serving_form_computes_the_same(model_type, tied):
    config = tiny.target_config(model_type=model_type, tie_word_embeddings=tied)
    params = tiny.target_params(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), tokens.shape)
    step = TargetStep(config, (0, 1))
    expected, found = (step(p, tokens, positions, step.init_cache(2, 12)) for p in (params, serving_params(params)))
    assert tiny.largest_difference(found, expected) < 1e-5
    features = (target_features(p, tokens, positions, jnp.ones_like(tokens), config=config, layer_ids=(0, 1))
                for p in (params, serving_params(params)))  # fmt: skip
    assert tiny.largest_difference(*features) < 1e-5


@pytest.mark.parametrize("drafter", [tiny.drafter_config(), tiny.domino_config()], ids=["dflash", "domino"])
def test_serving_form_decodes_the_same(drafter):
    params = tiny.drafter_params(drafter), tiny.target_params()
    config = Decoding(TargetStep(tiny.target_config(), drafter.target_layer_ids), drafter)
    asked = [[1, 2, 3], [4, 3], [2, 2, 2, 2]]
    one, other = (generate(*p, asked, config=config, max_new_tokens=12, batch_size=3)
                  for p in (params, tuple(map(serving_params, params))))  # fmt: skip
    assert one == other
    assert len({a for g in one for a in g.accepted}) > 1
    whole = serving_params(params[0])
    assert len(whole["layers"]) == 2 and whole["fc"]["kernel"].shape == params[0]["fc"]["kernel"].shape[::-1]
    sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (whole, params[0])]
    assert sizes[0] == sizes[1]


RECIPE = """
from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(target={target!r}, data={data!r}, out="", drafter=Drafter(block_size=4, mask_token_id=3),
               train=TrainOptimisation(batch_size=4, accumulation=2, num_anchors=8, dtype="bfloat16"))
"""


@pytest.mark.long
def test_training(world, tmp_path):
    """Random rows, all of them supervised; of the drafter's slots auf needs fewer than decay, and says so."""
    recipe, S = tmp_path / "recipe.py", 32
    recipe.write_text(RECIPE.format(target=str(world / "target"), data=""))
    config = BenchmarkTrain(config=str(recipe), drafter=str(world / "drafter"), out=str(tmp_path / "out.json"),
                            repeats=2, sequence_length=S)  # fmt: skip
    found = benchmark_train(config, Console(quiet=True))
    assert json.loads((tmp_path / "out.json").read_text())["training"] == found["training"]
    auf, decay = found["training"]["auf"], found["training"]["decay"]
    for m in (auf, decay):
        seconds = m["step_s"]["median"]
        assert m["rows_per_s"] == 4 / seconds and m["tokens_per_s"] == m["useful_tokens_per_s"] == 4 * S / seconds
        assert m["parts_s"]["drafter"] > 0 and m["parts_s"]["lm_head"] > 0 and m["peak_bytes"] > 0 and m["mfu"] is None
        assert m["parts_s"]["rest"] == seconds - m["parts_s"]["target"] - m["parts_s"]["drafter"]
    assert 0 < auf["active_ratio"] < decay["active_ratio"] == 1 and auf["flops"] < decay["flops"]
    meta = found["meta"]
    assert meta["recipe"]["init_from"] == str(world / "drafter") and meta["dtype"] == "bfloat16"


def test_training_of_a_body_that_gets_a_head(world, tmp_path):
    """The drafter that `specauf train` would train."""
    recipe = tmp_path / "recipe.py"
    text = RECIPE.format(target=str(world / "target"), data="").replace(
        "Drafter(", 'Drafter(projector_type="dspark", ', 1
    )
    recipe.write_text(text)
    config = dataclasses.replace(read_recipe(Train, str(recipe)), init_from=str(world / "drafter"))
    _, drafter = _architectures(config)
    assert drafter.head.projector_type == "dspark"


def test_training_refusals(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(target="", data=str(tmp_path)))
    (tmp_path / "manifest.json").write_text("{}")
    config = BenchmarkTrain(config=str(recipe), out=str(tmp_path / "out.json"), sequence_length=32)
    with pytest.raises(SpecaufError, match="sequence_length is 32 with the rows of"):
        benchmark_train(config, Console(quiet=True))
    for objectives in ((), ("auf", "auf")):
        with pytest.raises(SpecaufError, match="objectives"):
            BenchmarkTrain(config="", out="", objectives=objectives)
