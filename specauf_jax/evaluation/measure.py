"""What decoding achieved, from each round's accepted drafts. numpy and plain lists.

A round with a accepted drafts counts as a + 1 tokens, also the last one, whose tokens a stop may
have cut off (z-lab's convention).
"""

from collections.abc import Sequence

import numpy as np

LOOP_SPAN = 16
"""A loop is a stretch of period at most this, over at least this many tokens."""


def tau_micro(accepted: Sequence[Sequence[int]]) -> float | None:
    """Tokens per round over all rounds; None without any round."""
    rounds = [a + 1 for history in accepted for a in history]
    return float(np.mean(rounds)) if rounds else None


def tau_macro(accepted: Sequence[Sequence[int]]) -> float | None:
    """Mean over prompts of each prompt's tokens per round."""
    means = [np.mean(history) + 1 for history in accepted if len(history)]
    return float(np.mean(means)) if means else None


def alpha(accepted: Sequence[Sequence[int]], block_size: int) -> list[float | None]:
    """alpha_k = #{accepted >= k} / #{accepted >= k-1} for k = 1..K-1; None where no round got that far."""
    rounds = np.asarray([a for history in accepted for a in history])
    reached = [int((rounds >= k).sum()) for k in range(block_size)]
    return [after / before if before else None for before, after in zip(reached, reached[1:], strict=False)]


def calibration(generations: Sequence) -> dict[str, list[float]] | None:
    """For each n = 1..K-1: how often a drafter's confidence said that n drafts would stand, and how often they did.

    Args:
      generations: with `accepted` and `survival`.

    Returns:
      `predicted` and `observed`, means over all rounds; None for a drafter that predicts nothing.
    """
    rounds = np.asarray([a for g in generations for a in g.accepted])
    predicted = np.sum([g.survival for g in generations], axis=0)
    if not (len(rounds) and predicted.size):
        return None
    observed = [float((rounds >= n).mean()) for n in range(1, predicted.size + 1)]
    return {"predicted": (predicted / len(rounds)).tolist(), "observed": observed}


def in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last LOOP_SPAN tokens repeat what stands p tokens before them, for some p up to LOOP_SPAN."""
    tail = list(tokens[-2 * LOOP_SPAN :])
    return any(
        len(tail) >= LOOP_SPAN + p and tail[-LOOP_SPAN:] == tail[-LOOP_SPAN - p : -p] for p in range(1, LOOP_SPAN + 1)
    )


def outside_loops(prompt: Sequence[int], tokens: Sequence[int], accepted: Sequence[int]) -> list[int]:
    """The accepted counts of those rounds whose anchor did not stand in a loop."""
    text, end, kept = [*prompt, *tokens], len(prompt), []
    for a in accepted:
        if not in_loop(text[:end][-2 * LOOP_SPAN :]):
            kept.append(a)
        end += a + 1
    return kept


def acceptance_measures(generations: Sequence, block_size: int, prompts: Sequence | None = None) -> dict:
    """The acceptance part of a result: tau three ways, alpha, rounds and tokens.

    Args:
      generations: with `prompt`, `tokens` and `accepted`.
      block_size: K.
      prompts: what tells which generations are turns of one prompt; None if each is a prompt of its own.
    """
    accepted = [g.accepted for g in generations]
    by_prompt: dict = {}
    for prompt, history in zip(range(len(accepted)) if prompts is None else prompts, accepted, strict=True):
        by_prompt[prompt] = [*by_prompt.get(prompt, []), *history]
    return {
        "tau_micro": tau_micro(accepted),
        "tau_macro": tau_macro(list(by_prompt.values())),
        "tau_outside_loops": tau_micro([outside_loops(g.prompt, g.tokens, g.accepted) for g in generations]),
        "alpha": alpha(accepted, block_size),
        "calibration": calibration(generations),
        "rounds": sum(len(history) for history in accepted),
        "tokens": sum(len(g.tokens) for g in generations),
        "prompts": len(by_prompt),
    }
