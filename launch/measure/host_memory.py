"""Host memory that loading a target takes beyond its arrays, on a synthetic checkpoint of any size.

    python launch/measure/host_memory.py --folder /tmp/big --layers 28 [--devices 8] [--dtype bfloat16]

Writes a Qwen3 checkpoint of random bfloat16 numbers into --folder (4 GB with the defaults, in shards
of 1 GB; kept, and used again), loads it, and watches this process' anonymous memory meanwhile.
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--layers", type=int, default=28, help="each is 100 MB at the default width")
    parser.add_argument("--width", type=int, default=2048, help="D, a multiple of 256")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the loaded parameters")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices to spread them over: 1 or 8")
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from specauf_jax.architecture import Target
    from specauf_jax.config import Mesh
    from specauf_jax.models.weights import load_target
    from specauf_jax.sharding import make_mesh

    if not (arguments.folder / "config.json").exists():
        D = arguments.width
        write(Target(vocab_size=arguments.vocabulary, hidden_size=D, intermediate_size=3 * D,
                     num_hidden_layers=arguments.layers, num_attention_heads=D // 128, num_key_value_heads=D // 256,
                     head_dim=128, tie_word_embeddings=False), arguments.folder)  # fmt: skip
    mesh = make_mesh(Mesh(replica=2, fsdp=2, tensor=2)) if arguments.devices == 8 else make_mesh(Mesh())
    before, watch = anonymous(), Watch()
    begin = time.perf_counter()
    params, _ = load_target(arguments.folder, arguments.dtype, mesh)
    seconds = time.perf_counter() - begin
    peak = watch.stop()
    arrays = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    stored = sum(path.stat().st_size for path in arguments.folder.glob("*.safetensors"))
    print(f"{stored / 1e9:.2f} GB of files, {arrays / 2**20:,.0f} MiB of {arguments.dtype} arrays on "
          f"{len(jax.devices())} device(s) in {seconds:.1f} s; "
          f"at most {(peak - before - arrays) / 2**20:,.0f} MiB of host memory beside them")  # fmt: skip


def write(config, folder: Path) -> None:
    """A checkpoint in shards of about 1 GB."""
    import jax
    import ml_dtypes
    import numpy as np

    from specauf_jax.models import hf_target
    from specauf_jax.models.target import target_shapes
    from specauf_jax.models.tensors import file_names, write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    rng, shard, index = np.random.default_rng(0), {}, {}

    def finish():
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        write_tensors(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for path, leaf in jax.tree_util.tree_leaves_with_path(target_shapes(config)):
        shape = leaf.shape[1:] if path[0].key == "layers" else leaf.shape
        for name in file_names(path, leaf.shape):
            name = name if name.startswith("lm_head") else f"model.{name}"
            x = rng.integers(-100, 100, shape[::-1] if path[-1].key == "kernel" else shape, dtype=np.int8)
            shard[name] = x.astype(ml_dtypes.bfloat16)
            if sum(x.nbytes for x in shard.values()) > 1e9:
                finish()
    if shard:
        finish()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(hf_target.write_target(config)))


def anonymous() -> int:
    """Bytes of this process that no file backs (Linux)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


class Watch:
    """The highest `anonymous()` until `stop`, looked at every 10 ms."""

    def __init__(self):
        self._peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._ended.wait(0.01):
            self._peak = max(self._peak, anonymous())

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._peak


if __name__ == "__main__":
    main()
