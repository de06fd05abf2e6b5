"""Useful tokens a second of training on packed rows, against rows by length (powers of two) and one document a row.

    specauf prepare --input conversations.jsonl --vocab-size 4096 --out runs/packing/data
    python launch/measure/bench_packing.py --data runs/packing/data

The documents are those of a prepared dataset, short and long ones mixed: of every five, four stay and the fifth grows
by the next ones up to a length drawn between an eighth and the whole of a row. Each layout trains on all of them once,
in batches of the same number of tokens and with an anchor for every fourth position. A step is timed for every shape of
batch, in turn within each repeat, and counted as often as the layout needs it. Useful tokens are supervised ones.
Weights are random.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from specauf_jax.architecture import Drafter, Target
from specauf_jax.config import Objective, TrainOptimisation
from specauf_jax.data.dataset import open_dataset, read_manifest
from specauf_jax.data.packing import Document, document_positions, pack, unpack
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import init_target
from specauf_jax.training.blocks import Batch
from specauf_jax.training.loss import LossConfig
from specauf_jax.training.step import init_state, make_optimizer, make_train_step

SHORTEST = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of specauf prepare")
    parser.add_argument("--sequence-length", type=int, default=1024, help="S of packed and single rows")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256, help="D of target and drafter")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON to write")
    arguments = parser.parse_args()
    documents = mixed(arguments)
    layouts = {
        name: rows_by_length(name, documents, arguments.sequence_length) for name in ("packed", "bucketed", "single")
    }
    seconds = step_seconds({length for rows in layouts.values() for length in rows}, layouts, arguments)
    useful, tokens = (sum(map(f, documents)) for f in (lambda d: int(d.loss_mask.sum()), lambda d: len(d.tokens)))
    measured = {}
    for name, rows in layouts.items():
        slots = sum(length * len(r) for length, r in rows.items())
        whole = sum(slots_ * seconds[length] / arguments.batch_tokens for length, slots_ in
                    ((length, length * len(r)) for length, r in rows.items()))  # fmt: skip
        measured[name] = {"filled": tokens / slots, "seconds": whole, "useful_tokens_per_s": useful / whole}
        ratio = measured["packed"]["useful_tokens_per_s"] / measured[name]["useful_tokens_per_s"]
        print(
            f"{name:<9} {tokens / slots:6.1%} filled  {useful / whole:10,.0f} useful tokens/s   packed is {ratio:.2f} x"
        )
    lengths = np.quantile([len(d.tokens) for d in documents], [0.1, 0.5, 0.9, 1]).astype(int).tolist()
    print(f"{len(documents)} documents, {tokens:,} tokens; lengths at 10, 50, 90, 100 %: {lengths}")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"settings": vars(arguments), "lengths": lengths, "layouts": measured}, file, indent=2)


def mixed(arguments) -> list[Document]:
    """The dataset's documents, every fifth grown by those after it."""
    rows, rng = open_dataset(arguments.data), np.random.default_rng(arguments.seed)
    short = [d for i in range(len(rows)) for d in unpack(rows[i]) if len(d.tokens) <= arguments.sequence_length]
    result = []
    while short:
        document = short.pop(0)
        if len(result) % 5 == 4:
            wanted = rng.integers(arguments.sequence_length // 8, arguments.sequence_length + 1)
            while short and len(document.tokens) + len(short[0].tokens) <= wanted:
                more = short.pop(0)
                document = Document(
                    np.concatenate([document.tokens, more.tokens]),
                    np.concatenate([document.loss_mask, more.loss_mask]),
                )
        result.append(document)
    return result


def rows_by_length(layout: str, documents: list[Document], length: int) -> dict[int, list[dict]]:
    """Row length → rows."""
    if layout == "packed":
        return {length: list(pack(documents, length))}
    rows: dict[int, list[dict]] = {}
    for document in documents:
        size = length if layout == "single" else max(SHORTEST, 1 << (len(document.tokens) - 1).bit_length())
        rows.setdefault(min(size, length), []).extend(pack([document], min(size, length)))
    return rows


def step_seconds(lengths, layouts, arguments) -> dict[int, float]:
    """Median time of a step of every row length; rows of the whole length are those of the packed layout."""
    vocabulary = read_manifest(arguments.data)["vocab_size"]
    D = arguments.width
    target = Target(vocab_size=vocabulary, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=6,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=D // 4)  # fmt: skip
    drafter = resolve_drafter(Drafter(block_size=8, num_hidden_layers=2, mask_token_id=vocabulary - 1), target)
    target_params = init_target(target, jax.random.key(0))
    optimizer = make_optimizer(TrainOptimisation())
    runs = {}
    for length in lengths:
        rows = next(rows[length] for rows in layouts.values() if length in rows)
        count = arguments.batch_tokens // length
        batch = {name: np.stack([rows[i % len(rows)][name] for i in range(count)]) for name in rows[0]}
        batch = Batch(**batch, positions=document_positions(batch["document_ids"]))
        config = LossConfig(drafter=drafter, objective=Objective("auf"), num_anchors=length // 4)
        step = jax.jit(make_train_step(config, target, optimizer))
        state = init_state(init_drafter(drafter, jax.random.key(1)), optimizer)
        runs[length] = step.lower(state, target_params, batch).compile(), state, batch
        jax.block_until_ready(runs[length][0](state, target_params, batch))
    seconds = {length: [] for length in runs}
    for _ in range(arguments.repeats):
        for length, (step, state, batch) in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(state, target_params, batch))
            seconds[length].append(time.perf_counter() - begin)
    return {length: statistics.median(times) for length, times in seconds.items()}


if __name__ == "__main__":
    main()
