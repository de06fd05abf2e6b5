"""Accept-until-fail where there is no language: plans through mazes, carried out up to the first wrong move.

    python launch/measure/prefix_task.py --out prefix_task.json

In a random maze without loops one path leads to the goal. From the map and its place a small network plans the next
--moves moves at one time. A supervisor carries the plan out up to the first wrong move, makes the right one in its
place, and asks for a new plan: as speculative decoding does with drafts. For every objective and seed the script trains
such a planner, all of a seed on the same mazes from the same weights, and tells how many moves a plan brings in mazes
that it never saw, and how many plans an episode takes. `specauf_jax.objectives` is used as it is.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from specauf_jax.config import Objective
from specauf_jax.objectives import label_scores, objective_sums, prefix_acceptance

OBJECTIVES = ("full", "decay", "auf", "dpace")
STEPS = np.array([[-1, 0], [0, 1], [1, 0], [0, -1]])  # of the moves: north, east, south, west


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--objectives", nargs="+", default=[*OBJECTIVES], metavar="NAME", help=f"of {', '.join(OBJECTIVES)} and others")
    add("--seeds", type=int, default=5)
    add("--steps", type=int, default=2000)
    add("--batch-size", type=int, default=128)
    add("--mazes", type=int, default=20_000, help="to learn from")
    add("--held-out", type=int, default=1000, help="mazes to measure in")
    add("--size", type=int, default=6, help="cells of a side")
    add("--moves", type=int, default=8, help="of a plan")
    add("--channels", type=int, default=32)
    add("--layers", type=int, default=6)
    add("--learning-rate", type=float, default=2e-3)
    add("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    objectives = {name: Objective(name) for name in arguments.objectives}
    if soft := [name for name, objective in objectives.items() if objective.soft]:
        parser.error(f"{', '.join(soft)} learns from a target's distribution; here are labels alone")
    found: dict[str, list[dict]] = {name: [] for name in objectives}
    for seed in range(arguments.seeds):
        mazes, held_out = (Mazes(count, arguments.size, [seed, which])
                           for which, count in enumerate((arguments.mazes, arguments.held_out)))  # fmt: skip
        for name, objective in objectives.items():
            begin = time.perf_counter()
            planner = train(arguments, objective, mazes, seed)
            measures = episodes(planner, held_out, arguments.moves)
            found[name].append(measures)
            print(f"seed {seed}, {name}: {measures['moves_per_plan']:.3f} moves a plan, {measures['plans']:.2f} plans, "
                  f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
    print(
        f"\n| objective | moves a plan | plans an episode | right moves of all {arguments.moves} |\n|---|---|---|---|"
    )
    for name, runs in found.items():
        cells = (spread([run[key] for run in runs]) for key in ("moves_per_plan", "plans", "accuracy"))
        print(f"| {name} | {' | '.join(cells)} |")
    if arguments.out:
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        arguments.out.write_text(json.dumps({"settings": settings, "found": found}, indent=2) + "\n")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


class Mazes:
    """Random mazes, each with a goal and, for every cell, the move that leads there."""

    def __init__(self, count: int, size: int, seed):
        self.size, rng = size, np.random.default_rng(seed)
        self.open = np.zeros((count, size * size, 4), bool)  # ways out of a cell
        for ways in self.open:
            dig(ways, size, rng)
        self.goal = rng.integers(0, size * size, count)
        self.move = np.full((count, size * size), -1)  # that leads to the goal; -1 there
        for ways, goal, move in zip(self.open, self.goal, self.move, strict=True):
            lead(ways, goal, move, size)

    def inputs(self, maze: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Ways out, goal and place of each cell: float32 `[B, size, size, 6]`."""
        marks = np.eye(self.size**2, dtype=bool)
        planes = (self.open[maze], marks[self.goal[maze]][..., None], marks[cell][..., None])
        return np.concatenate(planes, axis=-1).astype(np.float32).reshape(len(maze), self.size, self.size, 6)

    def plans(self, maze: np.ndarray, cell: np.ndarray, moves: int):
        """The right moves, 0 behind the goal, and which stand before it: int and bool `[B, moves]`."""
        found = np.empty((len(maze), moves), int)
        for k in range(moves):
            found[:, k] = self.move[maze, cell]
            cell = self.after(maze, cell, np.ones(len(maze), int))
        return np.maximum(found, 0), found >= 0

    def after(self, maze: np.ndarray, cell: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """The cell so many right moves further on; the goal is not left."""
        cell = cell.copy()
        for made in range(moves.max(initial=0)):
            move = self.move[maze, cell]
            going = (move >= 0) & (made < moves)
            cell[going] += STEPS[move[going]] @ [self.size, 1]
        return cell


def dig(ways: np.ndarray, size: int, rng) -> None:
    """Opens ways between all cells, without a loop: a random walk that steps back where it cannot go on."""
    path, seen = [int(rng.integers(size * size))], set()
    while path:
        row, column = divmod(path[-1], size)
        seen.add(path[-1])
        around = [(move, row + dy, column + dx) for move, (dy, dx) in enumerate(STEPS.tolist())]
        free = [(move, y * size + x) for move, y, x in around
                if 0 <= y < size and 0 <= x < size and y * size + x not in seen]  # fmt: skip
        if not free:
            path.pop()
            continue
        move, cell = free[rng.integers(len(free))]
        ways[path[-1], move] = ways[cell, (move + 2) % 4] = True
        path.append(cell)


def lead(ways: np.ndarray, goal: int, move: np.ndarray, size: int) -> None:
    """Of every cell the move towards the goal."""
    cells = [int(goal)]
    for cell in cells:
        for way in np.flatnonzero(ways[cell]):
            other = cell + int(STEPS[way] @ [size, 1])
            if other != goal and move[other] < 0:
                move[other] = (way + 2) % 4
                cells.append(other)


class Planner(nnx.Module):
    """Residual convolutions over the map; all moves of a plan at one time."""

    def __init__(self, size: int, channels: int, layers: int, moves: int, *, rngs: nnx.Rngs):
        self.moves = moves
        self.first = nnx.Conv(6, channels, (3, 3), rngs=rngs)
        self.layers = nnx.List([nnx.Conv(channels, channels, (3, 3), rngs=rngs) for _ in range(layers)])
        self.hidden = nnx.Linear(size * size * channels, 4 * channels, rngs=rngs)
        self.out = nnx.Linear(4 * channels, 4 * moves, rngs=rngs)

    def __call__(self, maps: jax.Array) -> jax.Array:
        """Logits of the moves, `[B, moves, 4]`."""
        x = nnx.relu(self.first(maps))
        for layer in self.layers:
            x = x + nnx.relu(layer(x))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return self.out(x).reshape(len(x), self.moves, 4)


def train(arguments: argparse.Namespace, objective: Objective, mazes: Mazes, seed: int):
    """The trained planner as a function: maps → the best moves, `[B, moves]`."""
    a, rng = arguments, np.random.default_rng(seed)
    graph, params = nnx.split(Planner(a.size, a.channels, a.layers, a.moves, rngs=nnx.Rngs(seed)))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, a.learning_rate, a.steps // 20, a.steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, maps, moves, valid):
        def loss(params):
            scores = label_scores(nnx.merge(graph, params)(maps), moves)
            sums = objective_sums(objective, scores, valid, block_size=a.moves + 1)
            return sums.numerator / jnp.maximum(sums.denominator, 1)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(a.steps):
        maze, cell = rng.integers(0, len(mazes.goal), a.batch_size), rng.integers(0, a.size**2, a.batch_size)
        params, state = step(params, state, mazes.inputs(maze, cell), *mazes.plans(maze, cell, a.moves))
    planner = nnx.merge(graph, params)
    return jax.jit(lambda maps: planner(maps).argmax(-1))


def episodes(planner, mazes: Mazes, moves: int) -> dict[str, float]:
    """One walk in every maze, from its first cell (or the last, where the goal is the first) to the goal."""
    maze = np.arange(len(mazes.goal))
    cell = np.where(mazes.goal == 0, mazes.size**2 - 1, 0)
    plans = made = right = planned = 0
    while (going := mazes.move[maze, cell] >= 0).any():
        labels, valid = mazes.plans(maze, cell, moves)
        drafts = np.asarray(planner(mazes.inputs(maze, cell)))
        correct = (drafts == labels) & valid
        accepted = np.asarray(prefix_acceptance(jnp.where(valid, drafts, -1), jnp.asarray(labels)))
        carried_out = np.minimum(accepted + 1, valid.sum(-1))  # the supervisor's own move among them
        plans, made = plans + going.sum(), made + carried_out[going].sum()
        right, planned = right + correct[going].sum(), planned + valid[going].sum()
        cell = mazes.after(maze, cell, carried_out)
    return {"moves_per_plan": made / plans, "plans": plans / len(maze), "accuracy": right / planned}


if __name__ == "__main__":
    main()
