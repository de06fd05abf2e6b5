"""Ahead-of-time reports: FLOPs against a count of every product in the traced program, bytes against plain sums; and
one program that libtpu compiles for a TPU."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from specauf_jax import cli
from specauf_jax.architecture import Drafter
from specauf_jax.commands import compile as command
from specauf_jax.config import Objective
from specauf_jax.decoding.generate import decode_round, start
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.xla_memory import measure, read_buffers, read_collectives
from specauf_jax.evaluation.xla_time import read_cycles
from specauf_jax.flops import needed_flops, pretrain_flops, round_flops, step_flops
from specauf_jax.known_targets import KNOWN_TARGETS
from specauf_jax.models import hf_target
from specauf_jax.models.delta import Tokens, delta_rule
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import TargetStep, target_features, target_head, target_shapes
from specauf_jax.parts import Experts, Hybrid
from specauf_jax.sharding import parameter_sharding, rows_at
from specauf_jax.training.loss import LossConfig, loss_sums

B, S, A = 2, 32, 4
TARGET = tiny.target_config(num_hidden_layers=5)
RECIPE = """
from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import Objective, TrainOptimisation

config = Train(target={target!r}, data="", out="", objective=Objective({objective!r}),
               drafter=Drafter(block_size=4, num_hidden_layers=2, mask_token_id=16),
               train=TrainOptimisation(batch_size=4, accumulation=2, num_anchors=4))
"""


def finds_partners(equation) -> bool:
    """The product in the TPU's form of RoPE: exact, with a square matrix."""
    exact = equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    shape = equation.invars[1].aval.shape
    return exact and len(shape) == 2 and shape[0] == shape[1]


def products(jaxpr) -> int:
    """Floating-point operations of all matrix products of a traced program; a loop's body as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "ragged_dot_general":
            rows, width = equation.invars[0].aval.shape
            total += 2 * rows * width * equation.outvars[0].aval.shape[-1]
        if equation.primitive.name == "dot_general" and not finds_partners(equation):
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            total += times * products(inner)
    return total


HEADS = {
    "dflash": tiny.drafter_config,
    "domino": tiny.domino_config,
    "dflash2": tiny.dflash2_config,
    "dspark": functools.partial(tiny.dspark_config, enable_confidence_head=False),
    "dspark, rnn": functools.partial(tiny.dspark_config, markov_head_type="rnn", enable_confidence_head=False),
    "dspark, gated": functools.partial(tiny.dspark_config, markov_head_type="gated", enable_confidence_head=False),
}
heads = pytest.mark.parametrize("head", HEADS)


@heads
def test_flops_equal_those_of_every_product_in_the_forward_pass(head):
    target = TARGET
    drafter = HEADS[head](target, num_hidden_layers=3, target_layer_ids=(1, 3))
    params, batch = tiny.target_params(target), tiny.random_batch([[S]] * B, length=S)
    found = step_flops(drafter, target, rows=B, sequence_length=S, num_anchors=A)

    def features(params, batch):
        return target_features(params, batch.tokens, batch.positions, batch.document_ids, config=target,
                               layer_ids=drafter.target_layer_ids)  # fmt: skip

    width = target.num_attention_heads * target.head_dim
    # The program's one tile is as large as the row: half of it is masked, and each token's own slot stands beside it.
    unseen = B * 4 * (2 * S * S + 4 * S) * width
    assert products(jax.make_jaxpr(features)(params, batch).jaxpr) == found["target"] + unseen

    base = Objective("full") if head in ("domino", "dflash2") else None
    loss = LossConfig(drafter=drafter, objective=Objective("full"), base_objective=base, slot_chunk=9999)
    anchors, keep = jnp.zeros((B, A), jnp.int32), jnp.ones((B, A), bool)
    batch = batch.replace(features=features(params, batch))
    program = jax.make_jaxpr(lambda p: loss_sums(p, target_head(params), batch, anchors, keep, config=loss)[0])
    D, K, M = target.hidden_size, drafter.block_size, 3
    keys = 3 * M * 2 * B * S * 2 * D * drafter.num_key_value_heads * drafter.head_dim
    forward = (found["context"] - keys) / 2 + keys / 3 + found["blocks"] / 3 + found["lm_head"] / 2
    forward += M * 4 * B * A * K * (S + K) * drafter.num_attention_heads * drafter.head_dim
    forward += found.get("correction", 0) / 3
    assert products(program(tiny.drafter_params(drafter)).jaxpr) == forward
    assert ("correction" in found) == (head != "dflash")


@pytest.mark.parametrize("nodes", [None, 6])
@heads
def test_flops_equal_those_of_every_product_in_a_round(head, nodes, monkeypatch):
    # Of the drafter's attention a program holds a form for CPUs and another: one is enough to count.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **_: default(*arrays))
    drafter = HEADS[head](TARGET, target_layer_ids=(1, 3))
    K, context = drafter.block_size, 21
    W = K if nodes is None else nodes + 1
    arguments = (tiny.drafter_params(drafter), tiny.target_params(TARGET))
    decoding = Decoding(TargetStep(TARGET, drafter.target_layer_ids), drafter, tree_nodes=nodes)
    state = start(*arguments, [[1] * 16] * B, config=decoding, max_new_tokens=context - 16 + 1)
    room = state.target_cache.k.shape[3]
    program = jax.make_jaxpr(lambda state: decode_round(*arguments, state, config=decoding))(state)
    found = round_flops(drafter, TARGET, rows=B, context=context, nodes=nodes)
    # The program looks at the whole cache: the target's includes its own block, but not a tree; the drafter's does not.
    unseen = B * W * 4 * TARGET.num_attention_heads * TARGET.head_dim * TARGET.num_hidden_layers
    unseen *= room - (context + K / 2 if nodes is None else context)
    unseen += B * K * 4 * drafter.num_attention_heads * drafter.head_dim * drafter.num_hidden_layers * (room - context)
    assert products(program.jaxpr) == sum(found.values()) + unseen
    assert ("correction" in found) == (head != "dflash")


def test_flops_of_experts_are_those_of_their_products():
    """`ragged_dot` multiplies every choice of a token once by each of three matrices."""
    target = tiny.target_config(model_type="qwen3_moe", experts=Experts(6, 2, 12, True))
    drafter, batch = tiny.drafter_config(target), tiny.random_batch([[S]] * B, length=S)
    found = step_flops(drafter, target, rows=B, sequence_length=S, num_anchors=A)

    def features(params, batch):
        return target_features(params, batch.tokens, batch.positions, batch.document_ids, config=target,
                               layer_ids=drafter.target_layer_ids)  # fmt: skip

    program = jax.make_jaxpr(features)(tiny.target_params(target), batch).jaxpr
    unseen = B * 2 * (2 * S * S + 4 * S) * target.num_attention_heads * target.head_dim
    assert products(program) == found["target"] + found["experts"] + unseen
    needed = needed_flops(found, 1.0)
    assert needed["target"] == found["target"] + found["experts"]
    assert sum(needed.values()) == sum(found.values())
    alone = {"target": found["target"] + found["experts"]}
    training = pretrain_flops(dataclasses.replace(target, num_hidden_layers=2), rows=B, sequence_length=S)
    assert training["target"] == 3 * alone["target"]


def test_weights_of_a_published_mixture():
    """Qwen3-30B-A3B by its model card: 30.5 billion parameters, 29.9 without embeddings."""
    target = KNOWN_TARGETS["Qwen3-30B-A3B"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(target_shapes(target)))
    assert round(count / 1e9, 1) == 30.5
    assert round((count - 2 * target.vocab_size * target.hidden_size) / 1e9, 1) == 29.9


def test_flops_of_linear_attention():
    """Every product of a hybrid's features but for the delta rule, whose chunks do more than one state needs."""
    hybrid = Hybrid(2, 2, 4, 6, 5, 3, 0.5)
    target = tiny.target_config(model_type="qwen3_5", num_hidden_layers=4, hybrid=hybrid)
    drafter, batch = tiny.drafter_config(target, target_layer_ids=(0, 2)), tiny.random_batch([[S]] * B, length=S)
    found = step_flops(drafter, target, rows=B, sequence_length=S, num_anchors=A)

    def features(params, batch):
        return target_features(params, batch.tokens, batch.positions, batch.document_ids, config=target,
                               layer_ids=drafter.target_layer_ids)  # fmt: skip

    def rule(q, tokens, state):
        return delta_rule(q, tokens, state, jnp.zeros((B, S), jnp.int32))

    keys, values = jnp.zeros((B, S, 4, 6)), jnp.zeros((B, S, 4, 5))
    tokens = Tokens(k=keys, v=values, g=values[..., 0], beta=values[..., 0])
    chunks = products(jax.make_jaxpr(rule)(keys, tokens, jnp.zeros((B, 4, 6, 5))).jaxpr)
    program = jax.make_jaxpr(features)(tiny.target_params(target), batch).jaxpr
    unseen = B * (2 * S * S + 4 * S) * target.num_attention_heads * target.head_dim  # of the one layer with attention
    linear = 2  # of the three that run; their convolutions are no products
    needed = linear * B * S * (6 * 4 * 6 * 5 + 2 * 3 * hybrid.channels)
    assert products(program) == found["target"] + unseen + linear * chunks - needed


def test_weights_of_a_published_hybrid():
    target = KNOWN_TARGETS["Qwen3.5-9B"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(target_shapes(target)))
    assert round(count / 1e9, 1) == 9.0


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

    def run(*more, target="Tiny", topology="v5e:1x1", objective="auf"):
        recipe, out = tmp_path / "recipe.py", tmp_path / "out.json"
        recipe.write_text(RECIPE.format(target=target, objective=objective))
        code = cli.main(["compile", "--config", str(recipe), "--topology", topology, "--sequence-length", str(S),
                         "--decode-batch-size", "3", "--decode-length", "20", "--out", str(out), *more])  # fmt: skip
        return code, json.loads(out.read_text()) if out.exists() else None

    return run


def test_a_recipe_that_fits(run, capsys):
    code, report = run()
    assert code == 0 and report["fits"] and "train step fits:" in (said := capsys.readouterr().out)
    assert "decode round fits:" in said
    train, decode = report["train"], report["decode"]
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(target_shapes(TARGET)))
    drafter = tiny.drafter_config(TARGET, target_layer_ids=None)
    weights = sum(x.size for x in jax.tree.leaves(tiny.drafter_params(drafter)))
    batch = 4 * S * (3 * 4 + 1)
    counters, unused = 3 * 4, TARGET.hidden_size * 4  # the final norm, which no feature needs, is not passed
    assert train["argument_bytes"] == 4 * (parameters + 3 * weights) + batch + counters - unused  # two moments
    assert train["peak_bytes"] > train["temporary_bytes"] > 0 and report["hbm_bytes"] == int(15.75 * 2**30)
    assert train["output_bytes"] < 1000  # metrics: the state takes its own place
    rows, room = 3, 32  # 20 + 3, in whole tiles
    caches = 2 * rows * room * TARGET.num_key_value_heads * TARGET.head_dim * (TARGET.num_hidden_layers + 2)
    state = rows * (4 * 23 + 4 + 4 + 1 + 8 + 3 * 4)  # tokens, length, limit, done, key, how
    assert decode["argument_bytes"] == 4 * (parameters + weights + caches) + state
    assert decode["output_bytes"] < 1000  # what the round did
    assert report["peak_bytes"] == max(train["peak_bytes"], decode["peak_bytes"])
    parts = step_flops(drafter, TARGET, rows=4, sequence_length=S, num_anchors=4)
    assert train["flops"] == sum(parts.values())
    assert train["seconds"]["at_40_percent"] == train["seconds"]["at_100_percent"] / 0.4 > 0
    assert decode["flops"] == sum(round_flops(drafter, TARGET, rows=3, context=20).values())
    for program in (train, decode):
        sizes = [buffer["bytes"] for buffer in program["largest"]]
        assert sizes == sorted(sizes)[::-1] and sizes[0] > 0 and program["collectives"] == {}  # one device


@pytest.fixture
def measured(monkeypatch):
    """No compilation: these peaks in its place, for the train step and the decode round."""
    rest = dict.fromkeys(("argument_bytes", "temporary_bytes", "output_bytes", "code_bytes"), 1)
    sent = {"count": 0, "bytes": 0, "beside_bytes": 0}
    found = {
        name: rest | {"peak_bytes": 10, "collectives": {name: sent}, "largest": []} for name in ("train", "decode")
    }
    monkeypatch.setattr(command, "_train_step", lambda *_: ("train", ()))
    monkeypatch.setattr(command, "_decode_round", lambda *_: ("decode", ()))
    monkeypatch.setattr(command, "measure", lambda program, arguments, code: (dict(found[program]), PROGRAM))
    monkeypatch.setattr(command, "_show_program", lambda *_: None)
    return found


def test_settings_take_the_place_of_the_recipe_s(run, measured, capsys):
    code, report = run("--batch-size", "6", "--accumulation", "3", "--mesh.tensor", "1", "--mesh.fsdp", "-1")
    settings = report["meta"]["recipe"]
    assert code == 0 and report["rows"] == {"train": 6, "decode": 3} and settings["train"]["accumulation"] == 3
    assert settings["mesh"] == {"replica": 1, "fsdp": -1, "tensor": 1}
    for more, said in (("--mesh.tensor", "tensor=2 on 1 devices"), ("--slices", "replica=2")):
        code, _ = run(more, "2")
        assert code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "decode"])
def test_one_program_too_large_is_enough(run, measured, monkeypatch, capsys, name):
    monkeypatch.setitem(command._DEVICES, "v5e", dataclasses.replace(command._DEVICES["v5e"], memory=10))
    assert run()[0] == 0
    measured[name]["peak_bytes"] = 11
    code, report = run()
    assert code == 1 and not report["fits"] and report["peak_bytes"] == 11
    assert [report[other]["fits"] for other in ("train", "decode")] == [name != "train", name != "decode"]
    assert report["train"]["collectives"].keys() == {"train"}
    said = capsys.readouterr().out
    assert ("train step does not fit" in said) == ('remat="layers"' in said) == (name == "train")
    assert ("decode round does not fit" in said) == ("--decode-batch-size" in said) == (name == "decode")


def test_a_tpu7x_chip_is_two_devices(run, measured):
    _, report = run(topology="tpu7x:1x1x1")
    assert report["devices_per_chip"] == 2 and report["hbm_bytes"] == int(94.75 * 2**30)


def test_a_compiler_that_gives_up_for_want_of_room(monkeypatch):
    def step(x, unused, keys):
        return jnp.sort(x @ x.T, axis=1) @ x, jax.vmap(jax.random.bits)(keys)

    real = jax.stages.Lowered.compile

    def give_up(lowered, compiler_options):
        real(lowered, compiler_options)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: temporaries (106.55G) exceeds available HBM (15.75G).")

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place)
    keys = jax.ShapeDtypeStruct((5,), jax.random.key(0).dtype, sharding=place)
    lowered = jax.jit(step).lower(x, x, keys)
    fitting, _ = measure(lowered, (x, x, keys), code=True)
    monkeypatch.setattr(jax.stages.Lowered, "compile", give_up)
    found, _ = measure(lowered, (x, x, keys), code=True)
    assert found["temporary_bytes"] >= 64 * 64 * 4 and found["largest"] == fitting["largest"] != []
    assert found["argument_bytes"] == 2 * 64 * 32 * 4 + 5 * 8 and found["code_bytes"] is found["output_bytes"] is None
    assert found["peak_bytes"] == found["argument_bytes"] + found["temporary_bytes"]


def test_another_error_of_the_compiler_is_not_hidden(monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        measure(jax.jit(jnp.sin).lower(1.0), (), code=True)


def test_collectives_are_counted_as_often_as_their_loops_run():
    text = """
%cond (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%fused (p: bf16[1,4]) -> bf16[8,4] {
  ROOT %all-gather.1 = bf16[8,4]{1,0} all-gather(bf16[1,4]{1,0} %p), metadata={op_name="a"}
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.1 = bf16[8,4]{1,0} fusion(bf16[1,4]{1,0} %p), kind=kCustom, calls=%fused
}

%begun (p: bf16[1,4]) -> (bf16[1,4], bf16[2,4]) {
  %all-gather.2 = bf16[2,4]{1,0} all-gather(bf16[1,4]{1,0} %p), channel_id=7, dimensions={0}
}

%carried.on (p: bf16[1,4]) -> (bf16[1,4], bf16[2,4]) {
  %all-gather.3 = bf16[2,4]{1,0} all-gather(bf16[1,4]{1,0} %p), channel_id=7, dimensions={0}
}

%outer.2 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %async-collective-start = (bf16[1,4]) fusion(bf16[1,4]{1,0} %p), kind=kCustom, calls=%begun
  %fusion.2 = (bf16[1,4]) fusion(bf16[1,4]{1,0} %p), kind=kCustom, calls=%carried.on
  %while.1 = (s32[], f32[4]) while((s32[], f32[4]) %q), condition=%cond, body=%inner, backend_config={}
  %ags = (f32[2,2]{1,0}, f32[4,2]{1,0}) all-gather-start(f32[2,2]{1,0} %p), metadata={op_name="b"}
}

%cond.2 (p: (s32[], f32[4])) -> pred[] {
  %token = s32[] constant(151936)
  %limit = s32[] constant(2)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT, metadata={op_name="c"}
}

%cond.3 (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(36)
  %lt = pred[] compare(%i, %limit), direction=LT
  ROOT %and = pred[] and(%lt, %going)
}

%body.3 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %given = f32[6] collective-permute(f32[6] %p), channel_id=7
}

%all-reduce-scatter.1 (p: f32[16,2]) -> f32[2,2] {
  %all-reduce.1 = f32[16,2]{1,0} all-reduce(%p), channel_id=7, to_apply=%add
  ROOT %cut = f32[2,2]{1,0} dynamic-slice(%all-reduce.1, %i, %i), dynamic_slice_sizes={2,2}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.2 = (s32[], f32[4]) while((s32[], f32[4]) %q), condition=%cond.2, body=%outer.2
  %while.3 = (s32[], f32[4]) while(%q), condition=%cond.3, body=%body.3
  %wide = f32[16]{0:T(128)} broadcast(%p), dimensions={}
  %cut.1 = f32[2]{0} reduce-scatter(%wide), channel_id=7, dimensions={0}, to_apply=%add
  %cut.2 = f32[2,2]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %sent.1 = (f32[5], f32[5], u32[], u32[]) collective-permute-start(%p), channel_id=7
  %sent.2 = (f32[5], f32[5], u32[], u32[]) collective-permute-start(%p), channel_id=7
  %both = (f8e4m3fn[4]{0}, pred[3]{0}) all-reduce(%p, %p), channel_id=7, to_apply=%add
  ROOT %all-reduce.7 = f32[4]{0} all-reduce(f32[4]{0} %p), to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}
"""
    assert read_collectives(text) == {
        "all-gather": {"count": 2 * 36 + 4, "bytes": 2 * 36 * 64 + 2 * 32 + 2 * 16, "beside_bytes": 2 * 32 + 2 * 16},
        "all-reduce": {"count": 2, "bytes": 16 + 4 + 3, "beside_bytes": 0},
        "reduce-scatter": {"count": 2, "bytes": 64 + 128, "beside_bytes": 0},
        "collective-permute": {"count": 3, "bytes": 2 * 20 + 24, "beside_bytes": 2 * 20},
    }


def test_buffers_are_those_of_the_main_memory_s_temporaries():
    assignment = """BufferAssignment:
allocation 0: size 4000, page 0, parameter 3, shape |f32[1000]| at ShapeIndex {}:
 value: <1 param.3 @0> (size=4000,offset=0): f32[1000]{0}
allocation 1: size 900, page 0, preallocated-temp:
 value: <2 copy.1{0} @0> (size=400,offset=0): f32[10,10]{1,0:T(8,128)}
 value: <3 fusion.2 @0> (size=400,offset=0): f32[10,10]{1,0:T(8,128)}
 value: <4 dot.3 @0> (size=500,offset=400): f32[5,25]{1,0}
allocation 2: size 8000, color 1, page 0, preallocated-temp:
 value: <5 fusion.9 @1> (size=8000,offset=0): f32[2000]{0:S(1)}
"""
    program = '  %fusion.2 = f32[10,10]{1,0} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/mul"}'
    total, largest = read_buffers(assignment, program)
    assert total == 900
    assert largest == [
        {"bytes": 500, "shape": "f32[5,25]", "name": "dot.3", "source": ""},
        {"bytes": 400, "shape": "f32[10,10]", "name": "fusion.2", "source": "jit(step)/mul"},
    ]


@pytest.mark.parametrize(("change", "said"), [({"target": "Qwen9"}, "'Qwen9'"), ({"topology": "h200"}, "'h200'")])
def test_refused(run, capsys, change, said):
    code, report = run(**change)
    assert code == 2 and report is None and said in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Meshes larger than this machine


def abstract_mesh(replica: int, fsdp: int, tensor: int) -> AbstractMesh:
    axes = ("replica", "fsdp", "tensor")
    return AbstractMesh((replica, fsdp, tensor), axes, axis_types=(AxisType.Auto,) * 3)


def published_shapes(name: str, projector_type: str):
    target = KNOWN_TARGETS[name]
    drafter = resolve_drafter(Drafter(mask_token_id=0, projector_type=projector_type), target)
    return target_shapes(target), drafter_shapes(drafter)


@pytest.mark.parametrize(
    ("projector_type", "axes"),
    [("dflash", (1, 512, 1)), ("dflash", (1, 32, 16)), ("domino", (2, 16, 16)), ("domino", (2, 256, 1))],
)
@pytest.mark.parametrize("name", KNOWN_TARGETS)
def test_published_models_spread_over_512_devices(name, projector_type, axes):
    shapes, mesh = published_shapes(name, projector_type), abstract_mesh(*axes)
    if name == "gpt-oss-20b" and axes[1] > 64:  # of width 2,880, which is 64 times an odd number
        with pytest.raises(SpecaufError, match=f"fsdp={axes[1]}"):
            parameter_sharding(shapes, mesh)
        return
    leaves = jax.tree.leaves(shapes)
    shardings = jax.tree.leaves(parameter_sharding(shapes, mesh))
    held = [math.prod(s.shard_shape(x.shape)) for s, x in zip(shardings, leaves, strict=True)]
    for count, x in zip(held, leaves, strict=True):
        assert x.size <= 2**20 or count * axes[1] <= x.size
    assert sum(held) < 1.2 * sum(x.size for x in leaves) / (axes[1] * axes[2])  # fc is spread over fsdp alone


def test_a_size_that_no_dimension_takes_is_refused_with_those_that_would():
    with pytest.raises(SpecaufError, match=r"(?s)256 × 151936 over fsdp=512.*divides one of them: .*, 128, 256\n"):
        parameter_sharding(published_shapes("Qwen3-8B", "domino"), abstract_mesh(1, 512, 1))


def test_heads_that_a_tensor_axis_does_not_divide_stay_together():
    cache = jax.ShapeDtypeStruct((36, 32, 8, 64, 128), jnp.bfloat16)
    for tensor, shape in ((16, (36, 16, 8, 64, 128)), (8, (36, 16, 1, 64, 128))):
        mesh = abstract_mesh(1, 2, tensor)
        assert NamedSharding(mesh, rows_at(cache.shape, 1, mesh)).shard_shape(cache.shape) == shape


SERVED = """
import jax, tiny
from specauf_jax.config import Mesh
from specauf_jax.decoding.generate import decode_round, start
from specauf_jax.decoding.rows import abstract_state
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.target import TargetStep
from specauf_jax.sharding import make_mesh, parameter_sharding

target, mesh = tiny.target_config(), make_mesh(Mesh(replica=2, fsdp=2, tensor=2))
drafter = tiny.drafter_config(target)
params = tiny.drafter_params(drafter), tiny.target_params(target)
params = jax.device_put(params, parameter_sharding(params, mesh))
config = Decoding(target_step=TargetStep(target, drafter.target_layer_ids), drafter=drafter)
state = start(*params, [[1] * 16] * 8, config=config, max_new_tokens=5, mesh=mesh)
said = abstract_state(config=config, batch_size=8, room=64, dtype="float32", mesh=mesh)
for _ in range(2):
    same = jax.tree.map(
        lambda x, y: x.shape == y.shape and x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim),
        state, said)
    assert jax.tree.all(same), same
    state, _ = decode_round(*params, state, config=config)
assert decode_round._cache_size() == 1
print("same")
"""


def python(*arguments, flags: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env=environment(flags), capture_output=True, text=True)


def environment(flags: str) -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)}


def test_the_state_that_is_compiled_is_the_state_that_is_served():
    done = python("-c", SERVED, flags=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8")
    assert done.stdout.strip() == "same", done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------
# libtpu itself

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs")


@needs_libtpu
@pytest.mark.long
def test_a_recipe_made_too_large_for_a_tpu(tmp_path):
    target, recipe, out = tmp_path / "target", tmp_path / "recipe.py", tmp_path / "out.json"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(hf_target.write_target(TARGET)))
    recipe.write_text(RECIPE.format(target=str(target), objective="auf"))
    sizes = ("--batch-size", "65536", "--sequence-length", "2048", "--decode-batch-size", "8", "--decode-length", "64")
    # libtpu ends at a flag that it does not know, such as those of the other tests.
    done = python("-m", "specauf_jax", "compile", "--config", recipe, "--topology", "v5e:2x2", *sizes, "--out", out)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "train step does not fit" in done.stdout and "decode round fits" in done.stdout
    report = json.loads(out.read_text())
    train, decode = report["train"], report["decode"]
    assert not report["fits"] and report["peak_bytes"] == train["peak_bytes"] > report["hbm_bytes"]
    assert report["devices"] == 4 and report["mesh"]["fsdp"] == 4
    assert train["largest"][0]["bytes"] >= 2**30 and train["largest"][0]["source"].startswith("jit(step)")
    assert train["collectives"]["all-gather"]["bytes"] > 0
    assert decode["fits"] and 0 < decode["code_bytes"] < decode["peak_bytes"]
    least, most = decode["time"]["total"]
    assert train["time"] is None and 0 < least <= most and "verify/target" in decode["time"]["compiler"]


def command_line(pid: str) -> bytes:
    """Empty of a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@needs_libtpu
@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists a process's children")
def test_compilers_end_with_a_command_that_is_killed(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(target="Qwen3-4B", objective="auf"))
    arguments = ["-m", "specauf_jax", "compile", "--no-code", "--topology", "v5e:2x2", "--batch-size", "8", "--config"]
    process = subprocess.Popen(
        [sys.executable, *arguments, recipe, "--out", tmp_path / "out.json"], env=environment("")
    )
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def compilers():
        return [pid for pid in listed.read_text().split() if b"spawn_main" in command_line(pid)]

    try:
        wait_for(lambda: len(compilers()) == 2)
        children = compilers()
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not any(map(command_line, children)))


def hlo(name: str, *lines: str, entry: str = "") -> str:
    return "\n".join([f"{entry}%{name} (p: f32[]) -> f32[] {{", *(f"  {line}" for line in lines), "}"])


def spent(name: str, cycles: int, source: str = "") -> str:
    source = f', metadata={{op_name="jit(step)/{source}"}}' if source else ""
    return f'%{name} = f32[] fusion(%p), calls=%fused{source}, backend_config={{"estimated_cycles":"{cycles}"}}'


def loop(name: str, source: str) -> str:
    called = f"condition=%{name}.c, body=%{name}.b"
    return f'%{name}.w = (s32[]) while(%t), {called}, metadata={{op_name="jit(step)/{source}"}}'


PROGRAM = "\n".join(
    [
        hlo("fused", spent("inner", 10**9, "target/no")),
        hlo("known.c", "%n = s32[]{:T(128)} constant(36)", "ROOT %lt = pred[] compare(%i, %n), direction=LT"),
        hlo("known.b", spent("a", 10, "transpose(jvp(blocks))/while/body/add"), spent("copy", 1),
            loop("data", "x/lm_head/while")),
        hlo("data.c", "ROOT %lt = pred[] compare(%i, %j), direction=LT"),
        hlo("data.b", spent("b", 100, "lm_head/while/body/dot"),
            '%k = f32[] custom-call(%p), custom_call_target="tpu_custom_call", '
            'metadata={op_name="jit(step)/blocks/attention/pallas_call"}'),
        hlo("other.b", spent("d", 3)),
        hlo("cheap", spent("e", 20, "verify/argmax")),
        hlo("dear", spent("f", 7000, "verify/sort"), spent("g", 5)),
        hlo("main", spent("h", 1000, "target/dot"), spent("i", 2**63 - 1, "target/copy"), loop("known", "blocks/while"),
            '%c = f32[] conditional(%p), branch_computations={%cheap, %dear}, metadata={op_name="jit(step)/verify/if"}',
            "%f2 = f32[] fusion(%p), kind=kLoop, calls=%fused", entry="ENTRY "),
    ]
)  # fmt: skip


def test_cycles_of_a_program_by_hand():
    """A loop of 36 turns, one in it whose turns the data know, two branches, a kernel; nothing from inside fusions."""
    cycles = read_cycles(PROGRAM, {"lm_head": (2, 5)})
    least, most, kernels = map(cycles.by_scope, (cycles.least, cycles.most, cycles.kernels))
    assert least == {"target": 1000, "blocks": 36 * 11, "lm_head": 36 * 2 * 100, "verify": 20}
    assert most == {"target": 1000, "blocks": 36 * 11, "lm_head": 36 * 5 * 100, "verify": 7005}
    assert kernels == {"blocks/attention": 36 * 5}
    assert cycles.most.most_common(2) == [
        (("b", "lm_head", "f32[]", "jit(step)/lm_head/while/body/dot"), 36 * 5 * 100),
        (("f", "verify", "f32[]", "jit(step)/verify/sort"), 7000),
    ]
    assert ("copy", "blocks", "f32[]", "") in cycles.most  # what has no source, in the loop's scope
    assert cycles.by_scope(read_cycles(PROGRAM, {}).least)["lm_head"] == 36 * 100


def test_the_time_of_a_program_by_hand(run, measured, monkeypatch):
    """Cycles, bytes and operations as they are in PROGRAM and here, over the rates of the chip."""
    sent = {"all-gather": {"count": 3, "bytes": 600 * 10**6, "beside_bytes": 400 * 10**6},
            "all-reduce": {"count": 1, "bytes": 10**6, "beside_bytes": 0},
            "send": {"count": 1, "bytes": 10**12, "beside_bytes": 0}}  # fmt: skip
    monkeypatch.setitem(measured["train"], "collectives", sent)
    _, report = run()
    program = report["train"]
    time, parts = program["time"], program["flops_by_part"]
    turns = 1, 3  # of the LM head: one chunk holds the first slots of all blocks, three all slots
    attention = [parts["attention"] / 197e12, parts["attention"] / 197e12 / 0.4]
    assert time["kernels"] == {"attention": pytest.approx(attention)}
    assert time["collectives"] == pytest.approx([202e6 / 200e9, 602e6 / 200e9])
    for i in (0, 1):
        compiled = sum(pair[i] for pair in time["compiler"].values())
        assert time["total"][i] == pytest.approx(compiled + attention[i] + time["collectives"][i])
    assert time["compiler"]["lm_head"] == pytest.approx([36 * count * 100 / 1.5e9 for count in turns])
    assert time["costliest"][0]["scope"] == "lm_head" and len(time["costliest"]) == 6
    whole, needed = program["flops"], program["flops"] - parts["lm_head"] * 2 / 3
    wanted = whole / 197e12 / time["total"][1], needed / 197e12 / time["total"][0]
    assert time["utilisation"] == pytest.approx(wanted)
    measured["train"]["argument_bytes"] = 10**12  # takes longer than all operations
    time = run("--operations", "3")[1]["train"]["time"]
    assert time["total"] == pytest.approx([1e12 / 819e9 + seconds for seconds in time["collectives"]])
    assert len(time["costliest"]) == 6


def test_an_objective_that_needs_all_slots_has_one_time(run, measured):
    """Its LM head is a loop of known turns, which spares nothing."""
    program = run(objective="decay")[1]["train"]
    time = program["time"]
    assert time["compiler"]["lm_head"] == pytest.approx([36 * 100 / 1.5e9] * 2)
    assert time["utilisation"] == pytest.approx([program["flops"] / 197e12 / time["total"][i] for i in (1, 0)])


def test_more_operations_than_are_told_are_refused(run, measured, capsys):
    assert run("--operations", "21")[0] == 2 and "at most 20" in capsys.readouterr().err


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
