"""Speed beside specforge (PyTorch) on this machine: same weights, same prompts, same shapes, in turn.

    bash launch/interop.sh -x -q   # once: makes .venv-interop
    .venv-interop/bin/python launch/measure/compare_peers.py --target DIR --drafter DIR \\
        --prompts FILE.jsonl --out FILE.json

1. Generation: its `spec_generate` and ours on the same folders; batch 1, temperature 0, float32, wall time with the
   prompt's pass, once to warm up, then the median over the repeats. The texts must be equal.
2. The training loss, forward and backward, from given features at given shapes: its OnlineDFlashModel with decay, our
   `loss_fn` with decay and with auf.

Each side has the number of threads that it takes by default, which is printed. Needs no accelerator.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "interop"))

import jax
import jax.numpy as jnp
import numpy as np

import specauf_jax as sa
from specauf_jax.data.tokenizer import load_tokenizer
from specauf_jax.evaluation.prompts import encode_first_turn, read_prompts
from specauf_jax.evaluation.timing import timed_pass
from specauf_jax.models.cpu import serving_params


def seconds(*methods, repeats: int) -> list[list[float]]:
    """Wall times of every method, in turn, after a first time that does not count."""
    taken: list[list[float]] = [[] for _ in methods]
    for repeat in range(repeats + 1):
        for times, method in zip(taken, methods, strict=True):
            begin = time.perf_counter()
            method()
            times += [time.perf_counter() - begin] if repeat else []
    return taken


def compare_generation(arguments) -> dict:
    """New tokens a second of both, and whether the texts are the same."""
    import peers
    import torch

    tokenizer = load_tokenizer(arguments.target)
    prompts = [encode_first_turn(tokenizer, p) for p in read_prompts(arguments.prompts)][: arguments.max_prompts]
    target_params, target = sa.load_target(arguments.target)
    drafter_params, drafter = sa.load_drafter(arguments.drafter)
    params = serving_params(drafter_params), serving_params(target_params)
    stops = tokenizer.stops
    decoding = sa.Decoding(sa.TargetStep(target, drafter.target_layer_ids), drafter, stop_tokens=stops)
    theirs, model = peers.read_drafter(Path(arguments.drafter)), peers.read_target(arguments.target)
    texts: dict[str, list] = {}

    def ours():
        timed = timed_pass(*params, prompts, config=decoding, max_new_tokens=arguments.max_new_tokens, batch_size=1)
        texts["ours"] = [g.tokens for g in timed.generations]

    def specforge():
        found = (theirs.spec_generate(model, torch.tensor([p]), arguments.max_new_tokens, list(stops), 0.0)
                 for p in prompts)  # fmt: skip
        texts["specforge"] = [f[0, len(p) :].tolist() for f, p in zip(found, prompts, strict=True)]

    ours_s, theirs_s = seconds(ours, specforge, repeats=arguments.repeats)
    counts = {name: sum(map(len, found)) for name, found in texts.items()}
    rates = {"ours": counts["ours"] / statistics.median(ours_s)}
    rates["specforge"] = counts["specforge"] / statistics.median(theirs_s)
    same = sum(a == b for a, b in zip(texts["ours"], texts["specforge"], strict=True))
    return {"tokens_per_s": rates, "ratio": rates["ours"] / rates["specforge"], "same": same, "prompts": len(prompts)}


def compare_training(arguments) -> dict:
    """Seconds of one loss and its gradient, of random models at the given shapes."""
    import peers
    import torch

    B, S, A, K, V, D = (getattr(arguments, name) for name in "BSAKVD")
    heads = {"num_attention_heads": D // 32, "num_key_value_heads": D // 64, "head_dim": 32}
    target = sa.Target(vocab_size=V, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=arguments.layers + 4,
                       tie_word_embeddings=False, **heads)  # fmt: skip
    drafter = sa.resolve_drafter(
        sa.Drafter(block_size=K, num_hidden_layers=arguments.layers, mask_token_id=V - 1), target
    )
    target_params, params = sa.init_target(target, jax.random.key(0)), sa.init_drafter(drafter, jax.random.key(1))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V - 1, (B, S)).astype(np.int32)
    features = rng.standard_normal((B, S, len(drafter.target_layer_ids) * D)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        sa.save_target(target_params, target, Path(folder) / "target")
        sa.save_drafter(params, drafter, Path(folder) / "drafter")
        model, theirs = peers.read_target(Path(folder) / "target"), peers.read_drafter(Path(folder) / "drafter")
    anchors = np.sort(np.stack([rng.choice(S - K, A, replace=False) for _ in range(B)]))
    online = peers.training(theirs.train(), model, anchors, anchors >= 0, loss_decay_gamma=K / 2)
    inputs = torch.as_tensor(tokens).long(), torch.as_tensor(features), torch.ones(B, S)

    def specforge():
        online.zero_grad()
        online(*inputs)[0].backward()

    ones = jnp.ones((B, S), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    batch = sa.Batch(tokens=jnp.asarray(tokens), loss_mask=ones > 0, document_ids=ones, positions=positions,
                     features=jnp.asarray(features))  # fmt: skip
    head = sa.target_head(target_params)

    def ours(objective):
        objective = sa.Objective(objective, gamma=K / 2 if objective == "decay" else None)
        config = sa.LossConfig(drafter=drafter, objective=objective, num_anchors=A)
        step = jax.jit(jax.value_and_grad(functools.partial(sa.loss_fn, config=config), has_aux=True))
        return lambda: jax.block_until_ready(step(params, head, batch, jax.random.key(2)))

    names = ("specforge", "decay", "auf")
    times = seconds(specforge, ours("decay"), ours("auf"), repeats=arguments.repeats)
    medians = {name: statistics.median(t) for name, t in zip(names, times, strict=True)}
    ratios = {name: medians["specforge"] / medians[name] for name in names[1:]}
    return {"step_s": medians, "ratio": ratios, "shapes": {name: getattr(arguments, name) for name in "BSAKVD"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--drafter", help="plain DFlash; without it only the training loss is compared")
    parser.add_argument("--prompts")
    parser.add_argument("--out", required=True)
    parser.add_argument("--max-prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2, help="of the drafter whose loss is compared")
    for name, size in {"B": 2, "S": 256, "A": 32, "K": 16, "V": 8192, "D": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    arguments = parser.parse_args()
    import torch

    found = {"threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()}}
    found |= {"versions": {"torch": torch.__version__, "jax": jax.__version__}}
    if arguments.drafter:
        found["generation"] = compare_generation(arguments)
        print(json.dumps(found["generation"]))
    found["training"] = compare_training(arguments)
    print(json.dumps(found["training"]))
    print(json.dumps(found["threads"]))
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
