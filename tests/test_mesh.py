"""Callers who place their arrays on a mesh and enter no context: right, spread, and compiled for a TPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

from specauf_jax.config import Mesh, Objective, Optimisation
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.xla_memory import computations_of
from specauf_jax.models.layers import GatedMLP, init_kv_cache
from specauf_jax.models.target import Head, target_features, target_head, target_shapes, target_step
from specauf_jax.sharding import batch_sharding, make_mesh, mesh_of, parameter_sharding, placed, replicated
from specauf_jax.training.loss import LossConfig, loss_fn
from specauf_jax.training.step import init_state, make_train_step, place_pretrain_step
from specauf_jax.training.tpu_options import tpu_options

ROWS = [[20, 4], [24], [11, 12], [24]] * 2  # 8 rows
S = 24
TPU_TARGET = tiny.target_config(
    hidden_size=512, intermediate_size=2048, num_attention_heads=4, num_key_value_heads=2, head_dim=128
)


def a_caller(mesh):
    """What a user writes: features, loss with gradients, a train step; each jitted over arrays on the mesh.

    Returns:
      Name → (jitted function, its arguments).
    """
    target, drafter = tiny.target_config(), tiny.drafter_config()
    config = LossConfig(drafter=drafter, objective=Objective("auf"), num_anchors=6, slot_chunk=7)
    params = [tiny.target_params(target), tiny.drafter_params(drafter)]
    target_params, drafter_params = (jax.device_put(p, parameter_sharding(p, mesh)) for p in params)
    batch = jax.device_put(tiny.random_batch(ROWS, S), batch_sharding(mesh))
    optimizer = optax.sgd(1.0)
    tokens = batch.tokens, batch.positions, batch.document_ids

    def features(params, *tokens):
        return target_features(params, *tokens, config=target, layer_ids=drafter.target_layer_ids)

    def loss(params, head, batch, rng):
        return jax.value_and_grad(loss_fn, has_aux=True)(params, head, batch, rng, config=config)

    with_features = batch.replace(features=jax.jit(features)(target_params, *tokens))
    rng = jax.device_put(jax.random.key(0), replicated(mesh))
    state = jax.device_put(init_state(drafter_params, optimizer), replicated(mesh))
    return {
        "features": (jax.jit(features), (target_params, *tokens)),
        "loss": (jax.jit(loss), (drafter_params, target_head(target_params), with_features, rng)),
        "step": (jax.jit(make_train_step(config, target, optimizer)), (state, target_params, batch)),
    }


def print_differences():
    """Of a process with 8 devices."""
    expected = {
        name: run(*arguments) for name, (run, arguments) in a_caller(make_mesh(Mesh(), jax.devices()[:1])).items()
    }
    for name, (run, arguments) in a_caller(make_mesh(Mesh(replica=8, fsdp=1))).items():
        program = run.lower(*arguments).compile()
        difference = tiny.largest_difference(jax.device_get(program(*arguments)), jax.device_get(expected[name]))
        print(json.dumps({"name": name, "difference": difference, "gathers": program.as_text().count("all-gather")}))


def test_a_callers_own_jit_over_spread_arrays_is_right_and_gathers_no_rows():
    found = [
        json.loads(line)
        for line in tiny.on_eight_devices("import test_mesh; test_mesh.print_differences()").splitlines()
    ]
    assert [row["name"] for row in found] == ["features", "loss", "step"]
    for row in found:
        assert row["difference"] < 1e-5 and row["gathers"] == 0, row


def print_pretraining():
    """Of a process with 8 devices, of which 4 train a target on 8 rows."""
    mesh = make_mesh(Mesh(replica=4, fsdp=1), jax.devices()[:4])
    placed_step = place_pretrain_step(tiny.target_config(), Optimisation(batch_size=8), mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed_step.rows), tiny.random_batch(ROWS)
    )
    text = placed_step.step.lower(placed_step.state, batch).compile().as_text()
    D = tiny.target_config().hidden_size
    print(json.dumps({rows: f"f32[{rows},{S},{D}]" in text for rows in (2, 8)} | {"gathers": text.count("all-gather")}))


def test_pretraining_spreads_its_rows():
    found = json.loads(tiny.on_eight_devices("import test_mesh; test_mesh.print_pretraining()"))
    assert found == {"2": True, "8": False, "gathers": 0}


def print_kernels():
    """The loss and its gradient, as a caller jits them, compiled for four v5e chips: how many attention kernels."""
    from jax.experimental import topologies

    mesh = make_mesh(Mesh(), topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
    target = tiny.target_config(
        num_attention_heads=2, num_key_value_heads=1, head_dim=128, hidden_size=256, vocab_size=512
    )
    drafter = tiny.drafter_config(target, num_hidden_layers=1, block_size=8)
    config = LossConfig(drafter=drafter, objective=Objective("auf"), num_anchors=64, dtype="bfloat16")
    rows, B, length = batch_sharding(mesh), 4, 256

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((B, length, *shape), dtype, sharding=rows)

    batch = tiny.Batch(tokens=array(jnp.int32), loss_mask=array(bool), document_ids=array(jnp.int32),
                       positions=array(jnp.int32), features=array(jnp.bfloat16, 2 * target.hidden_size))  # fmt: skip
    params = tiny.drafter_shapes(drafter)
    params = placed(params, parameter_sharding(params, mesh))
    head = Head(embedding=jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=replicated(mesh)),
                lm_head=jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=replicated(mesh)))  # fmt: skip
    rng = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params, head, batch, rng):
        return jax.value_and_grad(loss_fn, has_aux=True)(params, head, batch, rng, config=config)

    text = jax.jit(loss).lower(params, head, batch, rng).compile().as_text()
    print([kind for kind in ("forward", "backward") if f"%block_attention_{kind}" in text])


def with_libtpu(function: str) -> list[str]:
    """The lines that a function here prints in a process that compiles for TPUs."""
    pytest.importorskip("libtpu")
    environment = os.environ | {"XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    line = [sys.executable, "-c", f"import test_mesh; test_mesh.{function}()"]
    done = subprocess.run(line, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_callers_own_jit_compiles_for_tpus():
    assert with_libtpu("print_kernels")[-1] == "['forward', 'backward']"


def print_options():
    """What a step's compiler says without, and with, an option that it does not know, and whether a step's parameters
    are gathered beside other work; and the options themselves."""
    from jax.experimental import topologies

    from specauf_jax.training import tpu_options

    meshes = {name: make_mesh(Mesh(), topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
              for name in ("v6e:2x2", "tpu7x:2x2x1")}  # fmt: skip
    for name in ("xla_tpu_overlap_compute_collective_tc", "xla_no_such_option"):
        tpu_options._OPTIONS[name] = "true"
        step = place_pretrain_step(TPU_TARGET, Optimisation(batch_size=4), meshes["v6e:2x2"])
        rows = tiny.random_batch([[S]] * 4)
        batch = jax.tree.map(lambda x, step=step: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=step.rows), rows)
        try:
            print("async-collective-start" in step.step.lower(step.state, batch).compile().as_text())
        except jax.errors.JaxRuntimeError as error:
            print(re.search("xla_no_such_option", str(error))[0])
    print(*(tpu_options.tpu_options(mesh)["xla_tpu_scoped_vmem_limit_kib"] for mesh in meshes.values()))
    os.environ["LIBTPU_INIT_ARGS"] = "--noxla_enable_async_all_gather --xla_tpu_scoped_vmem_limit_kib=16384"
    print(tpu_options._OPTIONS.keys() - tpu_options.tpu_options(meshes["v6e:2x2"]).keys() == {
        "xla_enable_async_all_gather", "xla_tpu_scoped_vmem_limit_kib"})  # fmt: skip
    print(tpu_options.tpu_options(make_mesh(Mesh(), jax.devices("cpu")[:1])))


def test_a_steps_compiler_gets_its_options():
    assert with_libtpu("print_options")[-5:] == ["True", "xla_no_such_option", "65536 49152", "True", "None"]


def print_products():
    """Where few tokens meet a target: matrices that are copied, and whether RoPE is a product. Where many meet an MLP
    with a step's options: the most products that one operation holds."""
    from jax.experimental import topologies

    mesh = make_mesh(Mesh(), topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[:1])

    def shapes(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)

    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), target_shapes(TPU_TARGET))
    cache = jax.eval_shape(lambda: init_kv_cache(TPU_TARGET, 4, 2048, jnp.bfloat16))
    block = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    step = jax.jit(target_step(TPU_TARGET, (0,)))
    text = step.lower(*shapes((params, block, block, cache))).compile().as_text()
    assert re.search(r"= bf16\[1,512,256\]\S* dynamic-slice\(", text)  # of a layer's keys; so they would be written
    print(len(re.findall(r"= bf16\[1,512,\d+\]\S* copy\(", text)), "...e,ef->...f/dot_general" in text)

    graph, mlp = nnx.split(nnx.eval_shape(lambda: GatedMLP(TPU_TARGET, 2048, rngs=nnx.Rngs(0))))
    mlp = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), mlp)
    run = jax.jit(lambda mlp, x: x + nnx.merge(graph, mlp)(x), compiler_options=tpu_options(mesh))
    rows = jax.ShapeDtypeStruct((2, 3072, 512), jnp.bfloat16)
    operations, _ = computations_of(run.lower(*shapes((mlp, rows))).compile().as_text())

    def products(name):
        lines = operations.get(name, [])
        own = sum(" convolution(" in line or " dot(" in line for line in lines)
        return own + sum(products(called[1]) for line in lines if (called := re.search(r"calls=%([\w.-]+)", line)))

    print(max(products(name) for name in operations if name.startswith("fused")))


def test_on_tpus_a_product_neither_copies_its_matrix_nor_hides_in_another():
    assert with_libtpu("print_products")[-2:] == ["0 True", "1"]


def print_refusals():
    """Of a process with 8 devices: what is said of meshes that `make_mesh` does not make."""
    kinds = jax.sharding.AxisType
    for axes, kind in ((("data", "fsdp", "tensor"), kinds.Auto), (("replica", "fsdp", "tensor"), kinds.Explicit)):
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), axes, axis_types=(kind,) * 3)
        x = jax.device_put(jnp.zeros((8, 4)), jax.NamedSharding(mesh, jax.P(axes[0])))
        try:
            jax.jit(mesh_of)(x)
        except SpecaufError as error:
            print(error)


def test_another_mesh_is_refused_with_what_to_pass():
    said = tiny.on_eight_devices("import test_mesh; test_mesh.print_refusals()").split("arrays on a mesh of ")[1:]
    assert len(said) == 2 and "('data', 'fsdp', 'tensor')" in said[0] and "Explicit" in said[1]
    assert all("specauf_jax.make_mesh" in text for text in said)


def test_one_device_has_no_mesh():
    assert mesh_of(jnp.zeros(3)) is None
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    assert mesh_of(jax.device_put(jnp.zeros(3), replicated(mesh))) is None


def test_a_profile_names_the_parts_of_a_step():
    run, arguments = a_caller(make_mesh(Mesh(), jax.devices()[:1]))["step"]
    text = run.lower(*arguments).as_text(debug_info=True)
    for scope in ("target", "context", "blocks", "attention", "lm_head", "objective", "optimiser"):
        assert re.search(rf'[/("]{scope}[/)"]', text), scope
