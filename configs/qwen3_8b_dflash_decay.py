"""DFlash's own objective, `decay`, for what configs/qwen3_8b_dflash.py trains with `auf`: the baseline to compare with.

    specauf train --config configs/qwen3_8b_dflash_decay.py --target TARGET --data DATA --out RUN

Hardware: as that recipe. Expected time: not yet measured; more than with `auf`, as every slot meets the LM head.
Expected tau: not yet measured here. The Spec-AUF paper: 2.40 over six sets of prompts (`auf`: 2.61).
"""

import dataclasses
import runpy
from pathlib import Path

from specauf_jax.config import Objective

auf = runpy.run_path(str(Path(__file__).with_name("qwen3_8b_dflash.py")))["config"]
config = dataclasses.replace(auf, objective=Objective("decay"), out="runs/qwen3_8b_dflash_decay")
