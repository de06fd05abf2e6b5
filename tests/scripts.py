"""How tests run the scripts of launch/measure, and a recorded case for golden.py."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import tiny

from specauf_jax.models.tensors import flatten
from specauf_jax.models.weights import save_drafter, save_target

MEASURE = Path(__file__).resolve().parents[1] / "launch/measure"


def run(script: str, *arguments) -> int:
    """The exit code of a script, in this process: JAX is here already."""
    before = sys.argv, sys.path
    sys.argv, sys.path = [script, *map(str, arguments)], sys.path[:]
    try:
        runpy.run_path(str(MEASURE / script), run_name="__main__")
    except SystemExit as ended:
        return ended.code or 0
    finally:
        sys.argv, sys.path = before
    return 0


def load(script: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, MEASURE / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record_case(golden, folder: Path, kinds: tuple[str, ...]) -> int:
    """A case of golden.py with what this project computes from random models; how many arrays are compared.

    Args:
      golden: the script as a module.
      folder: to write.
      kinds: the drafters, of dflash and domino.
    """
    target = tiny.target_config()
    heads = {"dflash": tiny.drafter_config(), "domino": tiny.domino_config()}
    heads = {kind: heads[kind] for kind in kinds}
    save_target(tiny.target_params(), target, folder / "target")
    for kind, config in heads.items():
        save_drafter(tiny.drafter_params(config), config, folder / kind)
    anchors, keep = np.array([[0, 3, 7]]), np.array([[True, True, False]])
    prompts = {f"gen_prompt_{i}": np.array([1 + i, 2, 3]) for i in (0, 1)}
    inputs = {"input_ids": np.arange(1, 13)[None] % 5 + 1, "loss_mask": np.ones((1, 12), int), "anchors": anchors,
              "block_keep": keep, "all_anchors": anchors, "all_block_keep": keep, "spk_anchors": np.array([2, 5]),
              "gen_stop_token": np.array(2), **prompts}  # fmt: skip
    unknown = {"spk_target_ids": np.zeros((2, 4), int)}
    if "dflash" not in kinds:
        unknown.clear()
    for kind, config in heads.items():
        decoding = golden.Decoding(golden.TargetStep(target, config.target_layer_ids), config)
        params = tiny.drafter_params(config)
        for i in (0, 1):
            found = golden.run(params, tiny.target_params(), prompts[f"gen_prompt_{i}"], decoding, 4)
            unknown[f"gen_{kind}_{i}_ids"] = np.array(found.prompt + found.tokens)
            unknown |= {f"gen_{kind}_{i}_accept": np.zeros(0, int), f"gen_{kind}_{i}_proposals": np.zeros((0, 4), int)}
        if kind == "dflash":
            stop = golden.dataclasses.replace(decoding, stop_tokens=(2,))
            found = golden.run(params, tiny.target_params(), prompts["gen_prompt_0"], stop, 32)
            unknown["gen_stop_ids"] = np.array(found.prompt + found.tokens)
        name = {"dflash": "grad_decay7", "domino": "grad_domino"}[kind]
        unknown |= {f"{name}/{key}": value for key, value in list(flatten(params, np.float32).items())[:1]}

    class Recorder(golden.Report):
        def close(self, name, found, where=None):
            self.golden[name] = np.asarray(found)

        same = close

        def end(self, inputs):
            np.savez(folder / "golden.npz", **self.golden)
            self.passed = len(self.golden.keys() - inputs)

    np.savez(folder / "golden.npz", **inputs, **unknown)
    recorder = Recorder(0.0)
    golden.check_case(folder, recorder)
    return recorder.passed
