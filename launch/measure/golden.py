"""Does this project compute what the public implementations computed? Checks a folder of golden cases.

    python launch/measure/golden.py FOLDER

Each case is a sub-folder: target/, dflash/ and domino/ (checkpoints; a case may lack either drafter) and golden.npz,
arrays that transformers, specforge and speculators computed from them in float32. Prints a line per array: the largest
difference over max(1, largest value); token ids and counts must be equal. Exit code 1 if any differs by more than
--tolerance, 2 on bad input.
"""

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.config import Objective
from specauf_jax.decoding.generate import generate, start
from specauf_jax.decoding.speculate import draft_and_verify, propose
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.models.heads.domino import prefix_states
from specauf_jax.models.resolve import fitted
from specauf_jax.models.target import TargetStep, target_features, target_head, target_hidden
from specauf_jax.models.tensors import flatten
from specauf_jax.models.weights import load_drafter, load_target
from specauf_jax.objectives import label_scores, objective_sums
from specauf_jax.training.blocks import Batch, make_blocks
from specauf_jax.training.loss import LossConfig, block_hidden, branch_factors, loss_sums, weighted

FULL, DECAY = Objective("full"), Objective("decay", gamma=7.0)
DPACE = Objective("dpace", dpace_denominator="rows")
LAMBDA = 0.3
NOT_OURS = {
    "dpace_cumulative": "half of D-PACE's weight: not an objective of this project",
    "dpace_continuation": "half of D-PACE's weight: not an objective of this project",
    "layer_out": "a layer's output inside the drafter: dflash_hidden checks all of them",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with a sub-folder per case")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="of max(1, largest value)")
    arguments = parser.parse_args()
    cases = sorted(path.parent for path in arguments.folder.glob("*/golden.npz"))
    if not cases:
        print(f"{arguments.folder} holds no case (SUBFOLDER/golden.npz)", file=sys.stderr)
        return 2
    jax.config.update("jax_default_matmul_precision", "highest")
    report = Report(arguments.tolerance)
    try:
        for folder in cases:
            check_case(folder, report)
    except SpecaufError as error:
        print(f"golden: {error}", file=sys.stderr)
        return 2
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


class Report:
    """Counts, and a line for each comparison."""

    def __init__(self, tolerance: float):
        self.tolerance, self.passed, self.failed = tolerance, 0, 0

    def begin(self, golden: dict, prefix: str) -> None:
        self.golden, self.prefix, self.seen = golden, prefix, set()

    def close(self, name: str, found, where=None) -> None:
        """`found` against the golden array of that name; `where` picks entries of both."""
        expected, found = self.golden[name], np.asarray(found, np.float64)
        self.seen.add(name)
        if where is not None:
            expected, found = expected[where], found[where]
        if found.shape != expected.shape:
            return self._line(name, f"shape {found.shape}, golden {expected.shape}", False)
        error = np.abs(found - expected).max(initial=0) / max(1.0, np.abs(expected).max(initial=0))
        return self._line(name, f"{error:.1e}", bool(error <= self.tolerance))

    def same(self, name: str, found, where=None) -> None:
        """As `close`, of integers that must be equal."""
        expected, found = self.golden[name], np.asarray(found)
        self.seen.add(name)
        if where is not None:
            expected, found = expected[where], found[where]
        equal = found.shape == expected.shape and bool((found == expected).all())
        self._line(name, "equal" if equal else f"{found.tolist()}, golden {expected.tolist()}", equal)

    def end(self, inputs: set) -> None:
        """Every array of the case must have been looked at, be an input, or have its reason."""
        for name in sorted(self.golden.keys() - self.seen - inputs):
            reason = next((reason for part, reason in NOT_OURS.items() if part in name), None)
            if reason is None:
                self._line(name, "was not compared", False)
            else:
                print(f"  --   {self.prefix} {name}: {reason}")

    def _line(self, name: str, text: str, passed: bool) -> None:
        self.passed, self.failed = self.passed + passed, self.failed + (not passed)
        print(f"  {'ok' if passed else 'FAIL':4} {self.prefix} {name}: {text}")


def check_case(folder: Path, report: Report) -> None:
    """All arrays of one case."""
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)
    report.begin(golden, folder.name)
    target_params, target = load_target(folder / "target")
    tokens = jnp.asarray(golden["input_ids"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    layers = tuple(range(target.num_hidden_layers))
    step = TargetStep(target, layers)
    logits, taps, _ = step(target_params, tokens, positions, step.init_cache(*tokens.shape))
    report.close("target_logits", logits)
    ones, embedded = jnp.ones_like(tokens), target_head(target_params).embedding[tokens]
    taps = jnp.moveaxis(taps.reshape(*tokens.shape, len(layers), -1), 2, 0)
    # The last of transformers' states is after the final norm, which no tap is.
    normed = target_hidden(target_params, tokens, positions, ones, config=target)
    report.close("target_hidden_states", jnp.concatenate([embedded[None], taps[:-1], normed[None]]))
    for kind in ("dflash", "domino"):
        if not (folder / kind).exists():
            continue
        params, config = load_drafter(folder / kind)
        config = fitted(config, target)
        features = target_features(
            target_params, tokens, positions, ones, config=target, layer_ids=config.target_layer_ids
        )
        batch = Batch(tokens=tokens, loss_mask=jnp.asarray(golden["loss_mask"] > 0), document_ids=ones,
                      positions=positions, features=features)  # fmt: skip
        case = Case(report, golden, params, config, target_head(target_params), batch)
        if kind == "dflash":
            report.close("target_features", features)
            check_dflash(case)
            check_speculators(case, logits)
        else:
            check_domino(case)
        decoding = Decoding(TargetStep(target, config.target_layer_ids), config)
        check_generation(kind, report, golden, params, target_params, decoding)
    report.end({"input_ids", "loss_mask", "anchors", "block_keep", "all_anchors", "all_block_keep", "spk_anchors",
                "gen_stop_token", "gen_prompt_0", "gen_prompt_1"})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A drafter and the rows that it is checked on."""

    report: Report
    golden: dict
    params: dict
    config: ResolvedDrafter
    head: object
    batch: Batch

    def anchors(self, prefix: str = "") -> tuple[jax.Array, jax.Array]:
        keep = jnp.asarray(self.golden[f"{prefix}block_keep"])
        return jnp.where(keep, jnp.asarray(self.golden[f"{prefix}anchors"]), 0), keep

    def sums(self, objective: Objective, config: ResolvedDrafter | None = None, prefix: str = ""):
        """Branch → numerator, and LossAux."""
        loss = self.loss(objective, config)
        return loss_sums(self.params, self.head, self.batch, *self.anchors(prefix), config=loss)

    def gradient(self, objective: Objective, share: float = 0.0) -> dict[str, np.ndarray]:
        """Of the loss, by the file's names."""

        def value(params):
            loss = self.loss(objective)
            numerators, aux = loss_sums(params, self.head, self.batch, *self.anchors(), config=loss)
            return weighted(numerators, jax.lax.stop_gradient(branch_factors(aux, self.config.head, share)))

        return flatten(jax.grad(value)(self.params), np.float32)

    def loss(self, objective: Objective, config: ResolvedDrafter | None = None) -> LossConfig:
        drafter = config or self.config
        base = objective if "base" in drafter.head.branches else None
        return LossConfig(drafter=drafter, objective=objective, base_objective=base)

    def blocks(self, config: ResolvedDrafter | None = None):
        """BlockBatch, hidden states of all slots, which blocks are kept."""
        blocks = make_blocks(self.batch, *self.anchors(), config=config or self.config)
        hidden = block_hidden(self.params, self.head, self.batch, blocks, config=self.loss(FULL, config))
        return blocks, hidden, np.asarray(blocks.keep)


def check_dflash(case: Case) -> None:
    report, golden = case.report, case.golden
    blocks, hidden, keep = case.blocks()
    report.same("noise_ids", np.where(keep[..., None], blocks.inputs, case.config.mask_token_id))
    report.same("draft_position_ids", np.asarray(blocks.positions).reshape(len(keep), -1))
    report.same("attn_mask", visible(blocks, case.batch.tokens.shape[1]))
    normed = case.batch.features @ case.params["fc"]["kernel"]
    scale = jax.lax.rsqrt((normed**2).mean(-1, keepdims=True) + case.config.rms_norm_eps)
    report.close("dflash_context", normed * scale * case.params["hidden_norm"]["scale"])
    report.close("dflash_hidden", hidden, keep)
    logits = hidden @ case.head.lm_head
    report.close("dflash_logits", logits, keep)
    report.same("dflash_target_ids", jnp.concatenate([blocks.inputs[..., :1], blocks.labels], -1), keep)
    report.same("dflash_weight_mask", np.pad(blocks.valid, ((0, 0), (0, 0), (1, 0))))
    labels = jnp.concatenate([blocks.inputs[..., :1], blocks.labels], -1)
    report.close("dflash_ce", label_scores(logits, labels)[0], keep)
    names = [name.partition("/")[2] for name in golden if name.startswith("grad_decay7/")]
    for name, objective in (("full", FULL), ("decay7", DECAY), ("dpace", DPACE)):
        numerators, aux = case.sums(objective)
        numerator = numerators["final"]
        report.close(f"dflash_loss_{name}", numerator / aux.final.denominator)
        report.close(f"dflash_loss_terms_{name}", jnp.stack([numerator, aux.final.denominator]))
        gradient = case.gradient(objective)
        report.close(f"dflash_gradnorm_{name}", [np.linalg.norm(gradient[n]) for n in names])
        if name == "decay7":
            for n in names:
                report.close(f"grad_decay7/{n}", gradient[n])
    report.close("dflash_accuracy", aux.measures()["common_token_accuracy"])
    numerators, aux = case.sums(FULL, prefix="all_")
    numerator = numerators["final"]
    report.close("dflash_loss_full_all_anchors", numerator / aux.final.denominator)


def check_speculators(case: Case, target_logits) -> None:
    """Row 0 with the target's own choices as labels; cross-entropies are divided by the number of slots."""
    report, golden, K = case.report, case.golden, case.config.block_size
    anchors = jnp.asarray(golden["spk_anchors"])[None]
    row = jax.tree.map(lambda x: x[:1], case.batch)
    blocks = make_blocks(row, anchors, jnp.ones_like(anchors, bool), config=case.config)
    choice = jnp.argmax(target_logits[0], axis=-1)
    labels = choice[jnp.maximum(anchors[0, :, None] + jnp.arange(K) - 1, 0)]
    report.same("spk_target_ids", labels.at[:, 0].set(golden["spk_target_ids"][:, 0]))  # the anchor's has no weight
    hidden = block_hidden(case.params, case.head, row, blocks, config=case.loss(FULL))
    scores = label_scores(hidden[0, :, 1:] @ case.head.lm_head, labels[:, 1:])
    valid = blocks.valid[0]
    decay = objective_sums(DECAY, scores, valid, block_size=K)
    report.close("spk_loss_ce_decay7", decay.numerator / valid.sum())
    soft, before = Objective("decay", "kl", gamma=7.0), anchors[0, :, None] + jnp.arange(K - 1)
    compared = label_scores(hidden[0, :, 1:] @ case.head.lm_head, labels[:, 1:], target_logits[0][before], soft)
    report.close("spk_loss_kl_decay7", objective_sums(soft, compared, valid, block_size=K).numerator / valid.sum())
    dpace = objective_sums(Objective("dpace"), scores, valid, block_size=K)
    report.close("spk_loss_ce_dpace", dpace.numerator / dpace.denominator)
    report.close("spk_eal", accepted_length(scores.rank == 0, valid))


def visible(blocks, length: int) -> np.ndarray:
    """What each slot sees of the row and of all blocks side by side, bool `[B, 1, A·K, S + A·K]`, in plain loops."""
    B, A, K = blocks.inputs.shape
    seen = np.zeros((B, 1, A * K, length + A * K), bool)
    for b, a in np.argwhere(np.asarray(blocks.keep)):
        own = slice(a * K, (a + 1) * K)
        seen[b, 0, own, int(blocks.start[b, a]) : int(blocks.anchors[b, a])] = True
        seen[b, 0, own, length + a * K : length + (a + 1) * K] = True
    return seen


def check_domino(case: Case) -> None:
    report, golden = case.report, case.golden
    for name, shift, prefix in (("shift", True, 1), ("noshift", False, 0)):
        head = dataclasses.replace(case.config.head, shift_label=shift, pure_draft_prefix_len=prefix)
        config = dataclasses.replace(case.config, head=head)
        blocks, hidden, keep = case.blocks(config)
        base = hidden @ case.head.lm_head
        if shift:
            report.close("domino_hidden", hidden, keep)
            report.close("domino_base_logits", base, keep)
        states = prefix_states(case.params, case.head.embedding[blocks.previous])
        z = hidden[:, :, config.first_slot :]
        features = head.correction_features(case.params, z, states, jnp.arange(config.num_labels))
        final = base.at[:, :, config.first_slot :].add(features @ case.params["embed_proj"]["up"]["kernel"])
        report.close(f"domino_{name}_final_logits", final, keep)
        first = blocks.inputs[..., :1]
        gold = blocks.labels if shift else jnp.concatenate([first, blocks.labels], -1)
        report.same(f"domino_{name}_target_ids", gold, keep)
        read = blocks.previous if shift else gold  # theirs also lists the last label, which it never reads
        report.same(f"domino_{name}_prev_ids", read, keep)
        for suffix, objective in (("", FULL), ("_decay7", DECAY)):
            key = f"domino_{name}{suffix}"
            numerators, aux = case.sums(objective, config)
            report.close(f"{key}_final_loss", numerators["final"] / aux.final.denominator)
            report.close(f"{key}_base_loss", numerators["base"] / aux.base.denominator)
            factors = branch_factors(aux, head, LAMBDA)
            report.close(f"{key}_loss_lambda{LAMBDA}", weighted(numerators, factors))
            measures = aux.measures()
            report.close(f"{key}_accuracy", measures["common_token_accuracy"])
            report.close(f"{key}_base_accuracy", measures["base_common_token_accuracy"])
            report.close(f"{key}_accuracy_denom", aux.final.valid)
            for branch, logits in (("", final), ("base_", base)):
                _, rank = label_scores(logits[:, :, config.first_slot :], blocks.labels)
                report.close(f"{key}_{branch}accept_len", accepted_length(rank == 0, blocks.valid))
    gradient = case.gradient(DECAY, LAMBDA)  # of the folder's own convention, shifted
    for name in golden:
        if name.startswith("grad_domino/"):
            report.close(name, gradient[name.partition("/")[2]])


def accepted_length(correct, valid) -> float:
    """SpecForge's measure: all K labels count where they are shifted, and a hole in the labels ends nothing."""
    correct, valid = np.asarray(correct), np.asarray(valid)
    prefix = np.cumprod(correct | ~valid, axis=-1) * valid
    return (prefix.sum(-1)[valid.any(-1)] + 1).mean()


def check_generation(kind: str, report: Report, golden: dict, params, target_params, decoding: Decoding) -> None:
    """Greedy texts, accepted lengths, drafts. Theirs take a token from the prompt's pass: ours get it as prompt."""
    for i in (0, 1):
        prompt, ids = golden[f"gen_prompt_{i}"], golden[f"gen_{kind}_{i}_ids"]
        new = len(ids) - len(prompt)
        whole = run(params, target_params, prompt, decoding, new)
        report.same(f"gen_{kind}_{i}_ids", whole.prompt + whole.tokens)
        rest = run(params, target_params, ids[: len(prompt) + 1], decoding, new - 1)
        drafted = drafts(params, target_params, ids[: len(prompt) + 1], decoding, new - 1)
        # They may run one more round though the text is complete: that one is not ours to compare.
        rounds, theirs = len(rest.accepted), golden[f"gen_{kind}_{i}_proposals"]
        more = slice(rounds, None) if len(theirs) <= rounds + 1 else slice(0)
        accepted = np.array(rest.accepted) + 1
        report.same(f"gen_{kind}_{i}_accept", np.append(accepted, golden[f"gen_{kind}_{i}_accept"][more]))
        report.same(f"gen_{kind}_{i}_proposals", np.concatenate([drafted, theirs[more]]))
    if kind == "dflash":
        stop = dataclasses.replace(decoding, stop_tokens=(int(golden["gen_stop_token"]),))
        prompt, ids = golden["gen_prompt_0"], golden["gen_stop_ids"]
        found = run(params, target_params, prompt, stop, 32)
        report.same("gen_stop_ids", found.prompt + found.tokens)
        # They look for a stop after a round only, so also where the prompt's pass already gave it.
        found = run(params, target_params, ids[: len(prompt) + 1], stop, 31)
        report.same("gen_stop_accept", np.array(found.accepted) + 1)


def run(params, target_params, prompt, decoding: Decoding, new: int):
    [found] = generate(params, target_params, [prompt.tolist()], config=decoding, max_new_tokens=new, batch_size=1)
    return found


def drafts(params, target_params, prompt, decoding: Decoding, new: int) -> np.ndarray:
    """Anchor and drafts of every round, `[rounds, K]`."""
    state = start(params, target_params, [prompt.tolist()], config=decoding, max_new_tokens=new)

    @jax.jit
    def draft(state):
        anchor = state.tokens[:, state.length[0] - 1][:, None]
        proposal = propose(params, target_params, state, anchor, state.keys, config=decoding)
        return jnp.concatenate([anchor, proposal.tokens], axis=1)

    following = jax.jit(functools.partial(draft_and_verify, config=decoding))
    rows = []
    while not state.done[0]:
        rows.append(draft(state)[0])
        state, _ = following(params, target_params, state)
    return np.stack(rows)


if __name__ == "__main__":
    sys.exit(main())
