"""Is greedy speculative output the target's own, token for token? Over many prompts, drafters, batch sizes and stops.

    python launch/measure/exactness.py --target runs/quickstart/target --drafter runs/quickstart/drafter_auf \\
        --data runs/quickstart/text --prompts 1000

Prompts are pieces of mixed length from a prepared dataset. Each is continued autoregressively, and speculatively with
the given drafter and with a random one, by chains and by trees of drafts, in batches of 1 and 16, with the tokenizer's
end-of-sequence and with a frequent token as an early one. Exits with 1 if any token differs.
"""

import argparse
import dataclasses
import sys

import jax
import numpy as np
from rich.console import Console

from specauf_jax.commands.loading import load_models
from specauf_jax.config import Mesh
from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.packing import unpack
from specauf_jax.decoding.generate import generate
from specauf_jax.environment import float32_precision
from specauf_jax.evaluation.exactness import compare, said
from specauf_jax.evaluation.measure import tau_micro
from specauf_jax.models.drafter import init_drafter
from specauf_jax.sharding import make_mesh


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--data", required=True, help="prepared dataset to cut prompts from")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tree-nodes", type=int, default=16, help="of the trees; 0 for chains alone")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with float32_precision("float32"):
        return measure(arguments)


def measure(arguments: argparse.Namespace) -> int:
    mesh = make_mesh(Mesh(), jax.devices()[:1])  # one device: a batch of one row cannot be spread
    models = load_models(arguments.target, arguments.drafter, "float32", mesh, Console())
    random = init_drafter(models.decoding.drafter, jax.random.key(arguments.seed))
    prompts = cut_prompts(arguments)
    lengths = [len(prompt) for prompt in prompts]
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens", flush=True)

    def run(params, decoding, batch_size):
        return generate(params, models.target_params, prompts, config=decoding, batch_size=batch_size,
                        max_new_tokens=arguments.max_new_tokens, mesh=mesh)  # fmt: skip

    free = run(None, models.autoregressive, 16)
    frequent = int(np.bincount([token for g in free for token in g.tokens]).argmax())
    wrong = 0
    for label, stops in (("own", models.autoregressive.stop_tokens), ("early", (frequent,))):
        alone = dataclasses.replace(models.autoregressive, stop_tokens=stops)
        together = dataclasses.replace(models.decoding, stop_tokens=stops)
        for batch_size in (1, 16):
            expected = run(None, alone, batch_size)
            early = sum(len(g.tokens) < arguments.max_new_tokens for g in expected)
            kinds = {"chain": together, "tree": dataclasses.replace(together, tree_nodes=arguments.tree_nodes or None)}
            for kind, decoding in list(kinds.items())[: 2 if arguments.tree_nodes else 1]:
                for name, params in (("trained", models.drafter_params), ("random", random)):
                    found = run(params, decoding, batch_size)
                    judged = compare(found, expected, models.target_params, decoding, batch_size, mesh)
                    wrong += judged.mismatches
                    tau = tau_micro([g.accepted for g in found])
                    print(f"{label} stop, batch {batch_size:2}, {kind} of a {name} drafter: tau {tau:.3f}, {early} "
                          f"stopped early, {said(judged.results())}", flush=True)  # fmt: skip
    print("exact" if not wrong else f"{wrong} DIFFERENT")
    return 1 if wrong else 0


def cut_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Pieces of 1 to 100 tokens from all over the dataset."""
    rows, draw = open_dataset(arguments.data), np.random.default_rng(arguments.seed)
    prompts = []
    while len(prompts) < arguments.prompts:
        documents = unpack(rows[int(draw.integers(len(rows)))])
        tokens = documents[int(draw.integers(len(documents)))].tokens
        length = int(draw.integers(1, min(100, len(tokens)) + 1))
        begin = int(draw.integers(len(tokens) - length + 1))
        prompts.append(tokens[begin : begin + length].tolist())
    return prompts


if __name__ == "__main__":
    sys.exit(main())
