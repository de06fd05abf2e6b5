"""`qwen3_8b_dflash.py` with Muon for the drafter's matrices.

    specauf train --config configs/qwen3_8b_dflash_muon.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile --no-code` 6.65 GiB of each chip's 15.75 GiB there.
Expected time: not yet measured. As `qwen3_8b_dflash.py`, and 0.12 s a step for Muon's own products on 16 v5e, by the
compiler's estimate.
Expected tau: not yet measured here. On SmolLM2-135M, 1,500 steps at AdamW's learning rate: 1.576, AdamW 1.491.
"""

import dataclasses
import runpy
from pathlib import Path

_adamw = runpy.run_path(str(Path(__file__).with_name("qwen3_8b_dflash.py")))["config"]
config = dataclasses.replace(
    _adamw, out="runs/qwen3_8b_dflash_muon", train=dataclasses.replace(_adamw.train, optimizer="muon")
)
