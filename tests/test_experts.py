"""Mixtures of experts: what a loop over tokens computes, on meshes and packed rows too; exact when decoding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specauf_jax.config import Mesh
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.experts import mix_experts, route
from specauf_jax.models.hf_target import read_target, write_target
from specauf_jax.models.target import TargetStep, target_features, target_head, target_hidden
from specauf_jax.models.weights import load_target, save_target
from specauf_jax.parts import Experts
from specauf_jax.sharding import make_mesh

B, T, D, F, X = 2, 7, 6, 5, 8


def target_config(norm=True, chosen=2, **changes):
    experts = Experts(X, chosen, 12, norm)
    return tiny.target_config(model_type="qwen3_moe", experts=experts, **changes)


def target_params(config):
    params = tiny.target_params(config)
    params["layers"]["mlp"]["gate"]["kernel"] *= 2.0
    return params


def kernels(gate, up, down):
    return {name: {"kernel": x} for name, x in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))}


def by_loops(x, logits, config, gate, up, down):
    """Token by token, in float64."""
    x, logits, gate, up, down = (np.asarray(a, np.float64) for a in (x, logits, gate, up, down))
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        shares = np.exp(logits[place]) / np.exp(logits[place]).sum()
        best = sorted(range(X), key=lambda e: -shares[e])[: config.num_experts_per_tok]
        whole = sum(shares[e] for e in best) if config.norm_topk_prob else 1.0
        for e in best:
            inner = x[place] @ gate[e]
            out[place] += shares[e] / whole * ((inner / (1 + np.exp(-inner)) * (x[place] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("chosen", [1, 3, X])
@pytest.mark.parametrize("favoured", [False, True])
def test_experts_are_those_of_a_loop(norm, chosen, favoured):
    """Each token's own, where some experts see no token and one sees all."""
    rng = np.random.default_rng(chosen)
    x, logits = rng.standard_normal((B, T, D)), 2 * rng.standard_normal((B, T, X))
    logits[..., 3] += 20 * favoured
    matrices = [rng.standard_normal(shape) for shape in ((X, D, F), (X, D, F), (X, F, D))]
    config = Experts(X, chosen, F, norm)
    single = [jnp.asarray(a, jnp.float32) for a in (x, *matrices)]
    found = mix_experts(
        single[0], *route(jnp.asarray(logits, jnp.float32), config), kernels(*single[1:]), config=config
    )
    assert tiny.largest_difference(found, by_loops(x, logits, config, *matrices)) < 1e-5


def test_packed_rows_are_those_of_their_documents():
    config = target_config()
    params, batch = target_params(config), tiny.random_batch([(9, 15)])
    rows = (batch.tokens, batch.positions, batch.document_ids)
    packed = target_hidden(params, *rows, config=config)
    for part in (slice(0, 9), slice(9, 24)):
        alone = target_hidden(params, *(x[:, part] for x in rows), config=config)
        assert tiny.largest_difference(packed[:, part], alone) < 1e-5


def test_serving_form_gives_the_same():
    config = target_config()
    params, step = target_params(config), TargetStep(config, (0, 2))
    tokens = jnp.asarray([[3, 5, 2, 7]])
    positions = jnp.arange(4)[None]
    plain, served = (step(p, tokens, positions, step.init_cache(1, 16)) for p in (params, serving_params(params)))
    assert tiny.largest_difference(served, plain) < 1e-5


MESHES = r"""
import json, re, jax, test_experts as t, tiny
from specauf_jax.config import Mesh
from specauf_jax.models.target import target_features
from specauf_jax.sharding import batch_sharding, make_mesh, parameter_sharding

config = t.target_config()
params = t.target_params(config)
batch = tiny.random_batch([(9, 15), (24,), (20,), (3, 3)] * 2)
rows = (batch.tokens, batch.positions, batch.document_ids)
features = jax.jit(lambda p, *rows: target_features(p, *rows, config=config, layer_ids=(0, 1)))
expected = features(params, *rows)
for fsdp, tensor in ((8, 1), (2, 4), (1, 8)):
    mesh = make_mesh(Mesh(fsdp=fsdp, tensor=tensor))
    shardings = parameter_sharding(params, mesh)
    placed = jax.device_put(params, shardings), *jax.device_put(rows, batch_sharding(mesh))
    text = features.lower(*placed).compile().as_text()
    spec = shardings["layers"]["mlp"]["experts"]["up_proj"]["kernel"].spec
    print(json.dumps({"difference": tiny.largest_difference(features(*placed), expected), "spec": list(spec),
                      "experts": sorted({int(n) for n in re.findall(r"f32\[1,(\d+),16,12\]", text)})}))
"""


def test_experts_are_spread_over_tensor():
    """Every mesh computes what one device does, and no device ever holds another one's experts."""
    lines = [json.loads(line) for line in tiny.on_eight_devices(MESHES).splitlines()]
    assert len(lines) == 3
    for line, tensor in zip(lines, (1, 4, 8), strict=True):
        assert line["difference"] < 1e-5
        assert line["spec"] == [None, ["tensor", "fsdp"], None, None]
        assert line["experts"] and max(line["experts"]) == X // tensor, line


DECODING = """
import json, jax, test_experts as t, tiny
from specauf_jax.config import Mesh
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.target import target_step
from specauf_jax.sharding import make_mesh, parameter_sharding

config = t.target_config()
params, drafter = t.target_params(config), tiny.drafter_config(config, target_layer_ids=(0, 2))
draft, step = tiny.drafter_params(drafter, seed=5), target_step(config, (0, 2))
prompts = [[1, 2, 3], [4, 1], [2, 2, 5, 1, 3], [3, 3]]
alone = generate(None, params, prompts, config=Decoding(step), max_new_tokens=16, batch_size=4)
mesh = make_mesh(Mesh(fsdp=2, tensor=4))
place = lambda tree: jax.device_put(tree, parameter_sharding(tree, mesh))
for nodes in (None, 6):
    decoding = Decoding(step, drafter, tree_nodes=nodes)
    found = generate(place(draft), place(params), prompts, config=decoding, max_new_tokens=16, batch_size=4, mesh=mesh)
    print(json.dumps([g.tokens for g in found] == [g.tokens for g in alone]))
"""


def test_decoding_on_a_mesh_is_exact():
    assert tiny.on_eight_devices(DECODING).split() == ["true", "true"]


def test_files_hold_every_expert(tmp_path):
    config = target_config()
    params = target_params(config)
    save_target(params, config, tmp_path / "target")
    read, found = load_target(tmp_path / "target")
    assert found == config and tiny.same_bits(read, params)
    mesh = make_mesh(Mesh())
    spread, _ = load_target(tmp_path / "target", mesh=mesh)
    assert tiny.same_bits(spread, params)


def test_large_experts_are_read_in_pieces(tmp_path, monkeypatch):
    config = target_config()
    params = target_params(config)
    save_target(params, config, tmp_path / "target")
    seen = []
    monkeypatch.setattr("specauf_jax.models.tensors.PIECE_BYTES", 256)
    read, _ = load_target(tmp_path / "target", progress=lambda done, total: seen.append((done, total)))
    assert tiny.same_bits(read, params)
    assert len(seen) > 100 and seen[-1][0] == seen[-1][1] == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("nodes", [None, 6])
def test_decoding_is_exact(nodes):
    """By a random drafter, some of whose drafts are right."""
    config = target_config()
    params, drafter = target_params(config), tiny.drafter_config(config, target_layer_ids=(0, 2))
    draft = tiny.drafter_params(drafter, seed=5)
    step, prompts = TargetStep(config, (0, 2)), [[1, 2, 3], [4, 1], [2, 2, 5, 1, 3]]
    settings = {"max_new_tokens": 40, "batch_size": 2}
    alone = generate(None, params, prompts, config=Decoding(target_step=step), **settings)
    found = generate(
        draft, params, prompts, config=Decoding(target_step=step, drafter=drafter, tree_nodes=nodes), **settings
    )
    assert [g.tokens for g in found] == [g.tokens for g in alone]
    assert sum(sum(g.accepted) for g in found) > 0


BAD = {
    "dense layers among them": ({"mlp_only_layers": [1]}, "mlp_only_layers"),
    "every second layer": ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
    "two numbers of experts": ({"num_local_experts": 4}, "num_experts and num_local_experts differ"),
    "more chosen than there are": ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of num_experts 8"),
    "no number": ({"num_experts": "many"}, "num_experts is 'many'"),
    "a quantised file": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_computed_otherwise_is_refused(name):
    values = write_target(target_config())
    assert read_target(values, "config.json") == target_config()
    changes, message = BAD[name]
    with pytest.raises(SpecaufError, match=message):
        read_target(values | changes, "config.json")


def test_no_size_is_guessed():
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
        values = write_target(target_config())
        del values[name]
        with pytest.raises(SpecaufError, match=f"has no {name}"):
            read_target(values, "config.json")


def test_either_name_of_their_number_serves():
    values = write_target(target_config())
    assert read_target(values | {"num_local_experts": None}, "config.json") == target_config()
    assert read_target(values | {"num_experts": None, "num_local_experts": X}, "config.json") == target_config()


def test_experts_belong_to_one_kind():
    with pytest.raises(SpecaufError, match="experts of qwen3_moe or"):
        tiny.target_config(model_type="qwen3_moe")
    with pytest.raises(SpecaufError, match="experts of qwen3_moe or"):
        tiny.target_config(experts=Experts(4, 2, 8, True))


def test_heads_take_the_targets_own(tmp_path):
    """Drafters see embedding and LM head as of any target; features come from layers with experts."""
    config = target_config(tie_word_embeddings=True)
    params, batch = target_params(config), tiny.random_batch([(24,)])
    features = target_features(params, batch.tokens, batch.positions, batch.document_ids, config=config, layer_ids=(1,))
    assert features.shape == (1, 24, 16) and bool(jnp.isfinite(features).all())
    assert target_head(params).lm_head.shape == (16, 17)
