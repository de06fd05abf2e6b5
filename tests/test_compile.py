"""Ahead-of-time reports: FLOPs against a count of every product in the traced program, bytes against plain sums."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from specauf_jax import cli
from specauf_jax.architecture import KNOWN_TARGETS, Drafter, resolve_drafter
from specauf_jax.commands import compile as command
from specauf_jax.config import Objective
from specauf_jax.models.target import target_features, target_head, target_shapes
from specauf_jax.training.flops import step_flops
from specauf_jax.training.loss import LossConfig, loss_sums

B, S, A = 2, 32, 4
TARGET = tiny.target_config(num_hidden_layers=5)
RECIPE = """
from specauf_jax.architecture import Drafter
from specauf_jax.config import Train, TrainOptimisation

config = Train(target={target!r}, data="", out="", drafter=Drafter(block_size=4, num_hidden_layers=2, mask_token_id=16),
               train=TrainOptimisation(batch_size=4, accumulation=2, num_anchors=4))
"""


def products(jaxpr) -> int:
    """Floating-point operations of all matrix products of a traced program; a loop's body as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            total += times * products(inner)
    return total


@pytest.mark.parametrize("domino", [False, True])
def test_flops_equal_those_of_every_product_in_the_forward_pass(domino):
    target = TARGET
    make = tiny.domino_config if domino else tiny.drafter_config
    drafter = make(target, num_hidden_layers=3, target_layer_ids=(1, 3))
    params, batch = tiny.target_params(target), tiny.random_batch([[S]] * B, length=S)
    found = step_flops(drafter, target, rows=B, sequence_length=S, num_anchors=A)

    def features(params, batch):
        return target_features(params, batch.tokens, batch.positions, batch.document_ids, config=target,
                               layer_ids=drafter.target_layer_ids)  # fmt: skip

    width = target.num_attention_heads * target.head_dim
    unseen = B * 4 * 2 * S * S * width  # half of the square of four layers, which the program computes and masks
    assert products(jax.make_jaxpr(features)(params, batch).jaxpr) == found["target"] + unseen

    loss = LossConfig(drafter=drafter, objective=Objective("full"), base_objective=Objective("full"), anchor_chunk=99)
    anchors, keep = jnp.zeros((B, A), jnp.int32), jnp.ones((B, A), bool)
    batch = batch.replace(features=features(params, batch))
    program = jax.make_jaxpr(lambda p: loss_sums(p, target_head(params), batch, anchors, keep, config=loss)[0])
    D, K, M = target.hidden_size, drafter.block_size, 3
    keys = 3 * M * 2 * B * S * 2 * D * drafter.num_key_value_heads * drafter.head_dim
    forward = (found["context"] - keys) / 2 + keys / 3 + found["blocks"] / 3 + found["lm_head"] / 2
    forward += M * 4 * B * A * K * (S + K) * drafter.num_attention_heads * drafter.head_dim
    forward += found.get("correction", 0) / 3
    assert products(program(tiny.drafter_params(drafter)).jaxpr) == forward
    assert ("correction" in found) == domino


def test_flops_of_a_published_target():
    """A row of Qwen3-8B's training, in the field's round numbers: 43, 47 and 20 TFLOP."""
    target = KNOWN_TARGETS["Qwen3-8B"]
    drafter = resolve_drafter(Drafter(mask_token_id=0), target)
    found = step_flops(drafter, target, rows=1, sequence_length=3072, num_anchors=512)
    rounded = [round(found[name] / 1e12) for name in ("target", "blocks", "lm_head")]
    assert rounded == [43, 47, 19]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`specauf compile` with this machine's device in the place of a TPU's; returns exit code and report."""
    monkeypatch.setattr(command, "_devices", lambda config: jax.devices()[:1])
    monkeypatch.setattr(command, "KNOWN_TARGETS", {"Tiny": TARGET})

    def run(target="Tiny", topology="v5e:1x1"):
        recipe, out = tmp_path / "recipe.py", tmp_path / "out.json"
        recipe.write_text(RECIPE.format(target=target))
        code = cli.main(["compile", "--config", str(recipe), "--topology", topology, "--sequence-length", str(S),
                         "--out", str(out)])  # fmt: skip
        return code, json.loads(out.read_text()) if out.exists() else None

    return run


def test_a_step_that_fits(run, capsys):
    code, report = run()
    assert code == 0 and report["fits"] and "fits:" in capsys.readouterr().out
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(target_shapes(TARGET)))
    drafter = tiny.drafter_config(TARGET, target_layer_ids=None)
    state = sum(x.size for x in jax.tree.leaves(tiny.drafter_params(drafter))) * 3  # parameters and two moments
    batch = 4 * S * (3 * 4 + 1)
    counters, unused = 3 * 4, TARGET.hidden_size * 4  # the final norm, which no feature needs, is not passed
    assert report["argument_bytes"] == 4 * (parameters + state) + batch + counters - unused
    assert report["peak_bytes"] > report["temporary_bytes"] > 0 and report["hbm_bytes"] == int(15.75 * 2**30)
    assert report["flops_per_step"] == sum(
        step_flops(drafter, TARGET, rows=4, sequence_length=S, num_anchors=4).values()
    )
    assert report["step_seconds"]["at_40_percent"] == report["step_seconds"]["at_100_percent"] / 0.4 > 0
    assert report["largest"] and report["collectives"] == {}  # one device


def test_a_step_that_does_not_fit(run, monkeypatch, capsys):
    monkeypatch.setitem(command._CHIPS, "v5e", (1000, 1e12))
    code, report = run()
    assert code == 1 and not report["fits"] and report["peak_bytes"] > 1000
    assert "does not fit" in (said := capsys.readouterr().out) and 'remat="layers"' in said


def test_a_compiler_that_gives_up_for_want_of_room(run, monkeypatch):
    def give_up(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (106.55G) "
            "exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", give_up)
    code, report = run()
    assert code == 1 and not report["fits"]
    assert report["peak_bytes"] == report["argument_bytes"] + int(106.55 * 2**30)


def test_collectives_and_buffers_are_read_from_the_program():
    text = """
  %all-gather.1 = bf16[8,4]{1,0} all-gather(bf16[1,4]{1,0} %p), metadata={op_name="a"}
  %ags = (f32[2,2]{1,0}, f32[4,2]{1,0}) all-gather-start(f32[2,2]{1,0} %p), metadata={op_name="b"}
  ROOT %fusion.2 = f32[10,10]{1,0} fusion(f32[] %x), kind=kLoop, metadata={op_name="jit(step)/mul"}
  %bitcast.1 = f32[1000]{0} bitcast(f32[10,100]{1,0} %y)
"""
    collectives, largest = command._read(text)
    assert collectives == {"all-gather": {"count": 2, "bytes": 64 + 32}}
    assert largest == [{"bytes": 400, "shape": "f32[10,10]", "source": "jit(step)/mul"}]


@pytest.mark.parametrize(("change", "said"), [({"target": "Qwen9"}, "'Qwen9'"), ({"topology": "h200"}, "'h200'")])
def test_refused(run, capsys, change, said):
    code, report = run(**change)
    assert code == 2 and report is None and said in capsys.readouterr().err
