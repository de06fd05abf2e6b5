"""Targets with linear attention (Qwen3.5): the rule of a loop, documents apart, rejected drafts without a trace."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from specauf_jax.config import Mesh, Objective, Optimisation, Sampling
from specauf_jax.data.tokenizer import stop_token_ids
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.doctor.checks import read_folder
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.delta import CHUNK, Tokens, delta_rule, settle
from specauf_jax.models.hf_target import read_target, text_config, write_target
from specauf_jax.models.target import HybridStep, TargetStep, target_features, target_head, target_hidden, target_step
from specauf_jax.models.weights import load_target, save_drafter, save_target, target_tensors
from specauf_jax.parts import Hybrid
from specauf_jax.sharding import make_mesh
from specauf_jax.training.loss import LossConfig, loss_fn
from specauf_jax.training.step import make_optimizer

V = 17


def hybrid(period=2, **changes):
    return Hybrid(**{"full_attention_interval": period, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "linear_key_head_dim": 6, "linear_value_head_dim": 5, "linear_conv_kernel_dim": 3,
                     "partial_rotary_factor": 0.5, **changes})  # fmt: skip


def target_config(period=2, layers=4, **changes):
    return tiny.target_config(model_type="qwen3_5", num_hidden_layers=layers, hybrid=hybrid(period), **changes)


def target_params(config, seed=0):
    """Random, with states that fade slowly, so that what lies far back matters."""
    params = tiny.target_params(config, seed)
    net = params["layers"]["linear"]["linear_attn"]
    net["A_log"] = net["A_log"] - 2.0
    return params


CONFIG = target_config()
PARAMS = target_params(CONFIG)
STEP = target_step(CONFIG, (0, 2))
hidden = jax.jit(functools.partial(target_hidden, config=CONFIG))
read, settled = jax.jit(STEP), jax.jit(STEP.settle)


def by_loop(q, k, v, g, beta, state, start, document):
    """Token by token, in float64: out, and the last state."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q, k, v, g, beta))
    state, out = np.array(state, np.float64), np.zeros(v.shape)
    for b, t, h in np.ndindex(*beta.shape):
        if start[b, t] != (start[b, t - 1] if t else document[b]):
            state[b, h] = 0
        state[b, h] *= np.exp(g[b, t, h])
        state[b, h] += beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h] - state[b, h].T @ k[b, t, h])
        out[b, t, h] = state[b, h].T @ q[b, t, h]
    return out, state


def drawn(T, seed=0, B=2, H=3, Dk=4, Dv=5):
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((B, T, H, Dk)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, g, beta = rng.standard_normal((B, T, H, Dv)), -rng.exponential(0.3, (B, T, H)), rng.random((B, T, H))
    return q, k, v, g, beta, rng.standard_normal((B, H, Dk, Dv))


def asked(q, k, v, g, beta, state, start):
    single = [jnp.asarray(x, jnp.float32) for x in (q, k, v, g, beta, state)]
    k, v, g, beta = single[1:5]
    return delta_rule(single[0], Tokens(k=k, v=v, g=g, beta=beta), single[5], jnp.asarray(start, jnp.int32))


@pytest.mark.parametrize("T", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_the_delta_rule_is_that_of_a_loop(T):
    """After a state of the same document."""
    inputs, start = drawn(T), np.zeros((2, T), int)
    found = asked(*inputs, start)
    assert tiny.largest_difference(found, by_loop(*inputs, start, [0, 0])) < 1e-5


def test_documents_begin_with_an_empty_state():
    """Inside a chunk, at its edge, and one that fills several."""
    T, inputs = 3 * CHUNK, drawn(3 * CHUNK)
    start = np.zeros((2, T), int)
    for row, edges in enumerate(((5, 6, CHUNK, CHUNK + 9), (2 * CHUNK + 1, 3 * CHUNK - 1))):
        for edge in edges:
            start[row, edge:] = edge
    found = asked(*inputs, start)
    assert tiny.largest_difference(found, by_loop(*inputs, start, [0, 0])) < 1e-5


def test_settled_tokens_are_those_that_stand():
    """As many as each row says, none and all among them; the rest might be anything."""
    T, W, C = 6, 3, 7
    _, k, v, g, beta, state = drawn(T, B=4)
    rng, count = np.random.default_rng(1), np.array([0, 1, 4, T])
    inputs = rng.standard_normal((4, W - 1 + T, C))
    single = {name: jnp.asarray(x, jnp.float32) for name, x in {"k": k, "v": v, "g": g, "beta": beta}.items()}
    tail = jnp.asarray(inputs[:, : W - 1])
    found, tail = settle(jnp.asarray(state, jnp.float32), tail, Tokens(**single), jnp.asarray(inputs), count)
    for row, n in enumerate(count):
        rows = [x[row : row + 1, :n] for x in (k, k, v, g, beta)]
        _, expected = by_loop(*rows, state[row : row + 1], np.zeros((1, n), int), [0])
        assert tiny.largest_difference(found[row], expected[0]) < 1e-5
        np.testing.assert_allclose(tail[row], inputs[row, n : n + W - 1], rtol=1e-6)


def test_packed_rows_are_those_of_their_documents():
    batch = tiny.random_batch([(1, 9, 14)])
    rows = (batch.tokens, batch.positions, batch.document_ids)
    packed = target_hidden(PARAMS, *rows, config=CONFIG)
    for part in (slice(0, 1), slice(1, 10), slice(10, 24)):
        alone = target_hidden(PARAMS, *(x[:, part] for x in rows), config=CONFIG)
        assert tiny.largest_difference(packed[:, part], alone) < 2e-5


@pytest.mark.parametrize(("period", "layers"), [(2, 4), (4, 8), (3, 6)])
def test_taps_are_the_same_wherever_layers_end(period, layers):
    """The layers up to the highest tap may end within a period."""
    config = target_config(period, layers)
    params, batch = target_params(config), tiny.random_batch([(24,)])
    rows = (batch.tokens, batch.positions, batch.document_ids)
    ids = tuple(range(layers))
    every = target_features(params, *rows, config=config, layer_ids=ids).reshape(24, layers, -1)
    assert len({float(x) for x in jnp.abs(every).sum(axis=(0, 2))}) == layers
    for last in ids:
        found = target_features(params, *rows, config=config, layer_ids=(last,))
        assert tiny.largest_difference(found[0], every[:, last]) < 1e-5


@pytest.mark.parametrize("K", [1, 3, 8])
def test_blocks_read_what_rows_are(K):
    """Logits and taps of blocks of K, settled whole, are those of the row at one time."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, V, (2, 24)), jnp.int32)
    positions, ones = jnp.broadcast_to(jnp.arange(24), (2, 24)), jnp.ones_like(tokens)
    expected = target_head(PARAMS).logits(hidden(PARAMS, tokens, positions, ones))
    taps = target_features(PARAMS, tokens, positions, ones, config=CONFIG, layer_ids=(0, 2))
    cache = STEP.init_cache(2, 24)
    for i in range(0, 24, K):
        part = slice(i, i + K)
        logits, seen, cache = read(PARAMS, tokens[:, part], positions[:, part], cache)
        assert tiny.largest_difference((logits, seen), (expected[:, part], taps[:, part])) < 5e-5
        cache = settled(cache, jnp.full(2, K))


def test_rejected_tokens_leave_no_trace():
    """Rows that keep 0, 1 and 3 tokens of a block of 5 go on as rows that never saw the rest."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, V, (3, 16)), jnp.int32)
    begin, kept = jnp.full(3, 6), jnp.asarray([0, 1, 3])

    def block(tokens, begin, cache):
        return read(PARAMS, tokens, begin[:, None] + jnp.arange(tokens.shape[1]), cache)

    cache = settled(block(tokens[:, :6], begin - 6, STEP.init_cache(3, 32))[2], begin)
    cache = settled(block(tokens[:, 6:11], begin, cache)[2], kept)
    logits, taps, _ = block(tokens[:, 11:], begin + kept, cache)
    for row, n in enumerate(kept.tolist()):
        text = jnp.concatenate([tokens[row, : 6 + n], tokens[row, 11:]])[None]
        single, seen, _ = read(PARAMS, text, jnp.arange(len(text[0]))[None], STEP.init_cache(1, 32))
        assert tiny.largest_difference((logits[row], taps[row]), (single[0, 6 + n :], seen[0, 6 + n :])) < 5e-5


def drafted(seed=5):
    drafter = tiny.drafter_config(CONFIG, target_layer_ids=(0, 2))
    return drafter, tiny.drafter_params(drafter, seed=seed)


PROMPTS = [[1, 2, 3], [4, 1], [2, 2, 5, 1, 3], [3], [1, 2, 3, 4, 1, 1, 2], *(
    np.random.default_rng(n).integers(1, 6, n).tolist() for n in (33, 70, 41)
)]  # fmt: skip


def alone(prompts, **settings):
    return generate(None, PARAMS, prompts, config=Decoding(STEP), batch_size=len(prompts), **settings)


def test_the_target_alone_writes_what_whole_passes_would():
    prompts = [PROMPTS[0], PROMPTS[5]]
    for found in alone(prompts, max_new_tokens=12):
        text = list(found.prompt)
        for _ in range(12):
            tokens = jnp.pad(jnp.asarray([text]), ((0, 0), (0, 64 - len(text))))
            states = hidden(PARAMS, tokens, jnp.arange(64)[None], jnp.ones_like(tokens))
            text.append(int(target_head(PARAMS).logits(states)[0, len(text) - 1].argmax()))
        assert found.tokens == text[len(found.prompt) :]


@pytest.mark.parametrize("settings", [{}, {"verify_slots": 2}, {"stop_tokens": (3,)}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_is_exact(settings, batch):
    """Prompts of several chunks too, rows that are refilled, and drafts of which some are right."""
    drafter, draft = drafted()
    config = Decoding(target_step=STEP, drafter=drafter, **settings)
    stops = {"stop_tokens": settings.get("stop_tokens", ())}
    expected = generate(None, PARAMS, PROMPTS, config=Decoding(STEP, **stops),
                        max_new_tokens=24, batch_size=4)  # fmt: skip
    found = generate(draft, PARAMS, PROMPTS, config=config, max_new_tokens=24, batch_size=batch)
    assert [g.tokens for g in found] == [g.tokens for g in expected]
    assert sum(sum(g.accepted) for g in found) > 10


def test_prompts_with_a_common_start_are_exact():
    drafter, draft = drafted()
    start = np.random.default_rng(9).integers(1, 6, 40).tolist()
    prompts = [start + more for more in ([1], [2, 2], [3, 1, 4], start)]
    config = Decoding(target_step=STEP, drafter=drafter)
    found = generate(draft, PARAMS, prompts, config=config, max_new_tokens=24, batch_size=2)
    one_by_one = [alone([prompt], max_new_tokens=24)[0].tokens for prompt in prompts]
    assert [g.tokens for g in found] == one_by_one


def test_sampled_rows_do_not_depend_on_their_neighbours():
    drafter, draft = drafted()
    config = Decoding(target_step=STEP, drafter=drafter)
    settings = {"config": config, "max_new_tokens": 12, "sampling": Sampling(1.0), "seed": 3}
    together = generate(draft, PARAMS, PROMPTS[:4], batch_size=4, **settings)
    for i, found in enumerate(together):
        [single] = generate(draft, PARAMS, [PROMPTS[i]], batch_size=1, indices=[i], **settings)
        assert single.tokens == found.tokens


def test_trees_are_refused():
    drafter, _ = drafted()
    with pytest.raises(SpecaufError, match="a target step that reads chains alone"):
        Decoding(target_step=STEP, drafter=drafter, tree_nodes=4)


def test_each_target_has_its_step():
    assert type(target_step(CONFIG, (0,))) is HybridStep
    assert type(target_step(tiny.target_config(), (0,))) is TargetStep
    with pytest.raises(SpecaufError, match="call target_step"):
        TargetStep(CONFIG, (0,))


def test_periods_stay_together_on_cpus():
    assert serving_params(PARAMS) is PARAMS


MESHES = """
import json, jax, test_hybrid as t, tiny
from specauf_jax.config import Mesh
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.target import target_features, target_step
from specauf_jax.sharding import batch_sharding, make_mesh, parameter_sharding

batch = tiny.random_batch([(9, 15), (24,), (20,), (3, 3)] * 2)
rows = (batch.tokens, batch.positions, batch.document_ids)
features = jax.jit(lambda p, *rows: target_features(p, *rows, config=t.CONFIG, layer_ids=(0, 2)))
expected = features(t.PARAMS, *rows)
drafter, draft = t.drafted()
config = Decoding(target_step=target_step(t.CONFIG, (0, 2)), drafter=drafter)
prompts = t.PROMPTS[:6]
texts = [g.tokens for g in t.alone(prompts, max_new_tokens=10)]
for fsdp, tensor in ((8, 1), (2, 4)):
    mesh = make_mesh(Mesh(fsdp=fsdp, tensor=tensor))
    place = lambda tree: jax.device_put(tree, parameter_sharding(tree, mesh))
    params = place(t.PARAMS)
    found = features(params, *jax.device_put(rows, batch_sharding(mesh)))
    written = generate(place(draft), params, prompts, config=config, max_new_tokens=10, batch_size=8, mesh=mesh)
    print(json.dumps({"difference": tiny.largest_difference(found, expected),
                      "same": [g.tokens for g in written] == texts}))
"""


def test_meshes_compute_the_same():
    lines = [json.loads(line) for line in tiny.on_eight_devices(MESHES).splitlines()]
    assert len(lines) == 2 and all(line["difference"] < 2e-5 and line["same"] for line in lines), lines


def test_files_hold_every_layer(tmp_path):
    config = target_config(4, 8)
    params = target_params(config)
    save_target(params, config, tmp_path / "target")
    read, found = load_target(tmp_path / "target")
    assert found == config and tiny.same_bits(read, params)
    assert tiny.same_bits(load_target(tmp_path / "target", mesh=make_mesh(Mesh()))[0], params)
    tensors = load_file(tmp_path / "target/model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == target_tensors(config)
    for i in range(8):
        kind = "self_attn.q_proj" if i % 4 == 3 else "linear_attn.in_proj_qkv"
        stack = params["layers"]["full" if i % 4 == 3 else "linear"]
        own = stack[kind.split(".")[0]][kind.split(".")[1]]["kernel"]
        own = own[i // 4] if i % 4 == 3 else own[i // 4, i % 4]
        np.testing.assert_array_equal(tensors[f"model.layers.{i}.{kind}.weight"], own.T)


def test_a_model_that_sees_is_read_by_its_text(tmp_path):
    """config.json's text_config, tensors behind another prefix; those of images and of its own drafter stay unread."""
    save_target(PARAMS, CONFIG, tmp_path / "target")
    tensors = load_file(tmp_path / "target/model.safetensors")
    renamed = {name.replace("model.", "model.language_model."): x for name, x in tensors.items()}
    beside = {"model.visual.patch_embed.proj.weight": np.ones(3), "mtp.fc.weight": np.ones(2)}
    save_file(
        renamed | {name: x.astype(np.float32) for name, x in beside.items()}, tmp_path / "target/model.safetensors"
    )
    text = json.loads((tmp_path / "target/config.json").read_text())
    del text["architectures"]
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text,
             "vision_config": {"depth": 1}, "tie_word_embeddings": False, "image_token_id": 3}  # fmt: skip
    (tmp_path / "target/config.json").write_text(json.dumps(whole))
    read, found = load_target(tmp_path / "target")
    assert found == CONFIG and tiny.same_bits(read, PARAMS)
    with pytest.raises(SpecaufError, match="1 unknown, first model.other"):
        save_file(renamed | {"model.other": np.ones(2, np.float32)}, tmp_path / "target/model.safetensors")
        load_target(tmp_path / "target")


BAD = {
    "an irregular order": ({"layer_types": ["full_attention", "linear_attention"] * 2}, "layer_types"),
    "too few types": ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
    "no full attention": ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
    "two intervals": ({"full_attention_interval": 4}, "full_attention_interval is 4"),
    "layers that do not divide": ({"layer_types": None, "full_attention_interval": 3}, "4 layers"),
    "no gate": ({"attn_output_gate": False}, "attn_output_gate"),
    "a list of shares": ({"partial_rotary_factor": [0.5]}, "partial_rotary_factor is"),
    "an odd share in rope_parameters": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": {}}},
                                        "partial_rotary_factor is"),
    "no share": ({"rope_parameters": {"rope_theta": 1e4}, "partial_rotary_factor": None}, "partial_rotary_factor is"),
    "two shares": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    "an odd share": ({"rope_parameters": {"rope_theta": 1e4}, "partial_rotary_factor": 0.4}, "RoPE turns 3 numbers"),
    "heads that do not divide": ({"linear_num_value_heads": 3}, "3 linear value heads over 2"),
    "another scaling": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
                        "dynamic"),
    "a quantised file": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "another model_type": ({"model_type": "qwen3_5"}, "model_type 'qwen3_5'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_computed_otherwise_is_refused(name):
    values = write_target(CONFIG)
    assert read_target(values, "config.json") == CONFIG
    changes, message = BAD[name]
    with pytest.raises(SpecaufError, match=message):
        read_target(values | changes, "config.json")


def test_no_size_is_guessed():
    values = write_target(CONFIG)
    for field in dataclasses.fields(Hybrid):
        if field.name.startswith("linear"):
            with pytest.raises(SpecaufError, match=f"has no {field.name}"):
                read_target({name: x for name, x in values.items() if name != field.name}, "config.json")


def test_a_drafter_trains_on_its_features():
    drafter, draft = drafted()
    batch = tiny.random_batch([(24,), (10, 14)])
    rows = (batch.tokens, batch.positions, batch.document_ids)
    batch = batch.replace(features=target_features(PARAMS, *rows, config=CONFIG, layer_ids=(0, 2)))
    config = LossConfig(drafter=drafter, objective=Objective("auf"), num_anchors=8)
    gradient = jax.jit(jax.value_and_grad(functools.partial(loss_fn, config=config), has_aux=True))
    losses = []
    for _ in range(8):
        (loss, _), slopes = gradient(draft, target_head(PARAMS), batch, jax.random.key(0))
        draft = jax.tree.map(lambda p, g: p - 0.1 * g, draft, slopes)
        losses.append(float(loss))
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]


def test_rates_are_not_decayed():
    """Nor convolutions; Muon leaves both to AdamW."""
    for optimizer in ("adamw", "muon"):
        rule = make_optimizer(Optimisation(steps=4, learning_rate=0.1, weight_decay=0.5, optimizer=optimizer))
        updates, _ = rule.update(jax.tree.map(jnp.zeros_like, PARAMS), rule.init(PARAMS), PARAMS)
        net = updates["layers"]["linear"]["linear_attn"]
        still = [net["A_log"], net["dt_bias"], net["conv1d"]["kernel"], net["norm"]["scale"]]
        assert all(float(jnp.abs(x).max()) == 0 for x in still)
        assert float(jnp.abs(net["out_proj"]["kernel"]).max()) > 0


def test_stop_tokens_of_a_text_config(tmp_path):
    class NoStops:
        eos_token_id = None

        def get_vocab(self):
            return {}

    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5], "text_config": {"eos_token_id": 3}}))
    assert stop_token_ids(NoStops(), tmp_path) == (3, 5)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": "x"}}))
    with pytest.raises(SpecaufError, match="eos_token_id is 'x'"):
        stop_token_ids(NoStops(), tmp_path)


@pytest.mark.parametrize("beside", [None, [1], {"hidden_size": 1}], ids=str)
def test_a_text_config_counts_only_where_others_see(beside):
    values = write_target(CONFIG)
    assert text_config(values | {"text_config": beside}) == values | {"text_config": beside}
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": values}
    assert text_config(whole) == values | {"architectures": whole["architectures"]}
    with pytest.raises(SpecaufError, match="text_config is of model_type 'llama'"):
        read_target(whole | {"model_type": "qwen3_5", "text_config": values | {"model_type": "llama"}}, "config.json")


def test_the_doctor_takes_its_rope(tmp_path):
    """Of a drafter's file that says none, from a target whose file says more than a drafter has."""
    drafter, draft = drafted()
    save_target(PARAMS, CONFIG, tmp_path / "target")
    save_drafter(draft, drafter, tmp_path / "drafter")
    path = tmp_path / "drafter/config.json"
    values = {name: x for name, x in json.loads(path.read_text()).items() if not name.startswith("rope")}
    path.write_text(json.dumps(values))
    folder = read_folder(tmp_path / "drafter", tmp_path / "target")
    assert folder.drafter == drafter
