"""What measures beside the peers runs, and golden.py checks a whole case."""

import json
import subprocess
import sys

import jax
import numpy as np
import tiny
from scripts import MEASURE, load, record_case, run

from specauf_jax.data.tokenizer import train_bpe
from specauf_jax.models.weights import save_drafter, save_target


def test_compare_peers(tmp_path):
    words = ["the quick brown fox", "jumps over", "the lazy dog and the quick brown fox"]
    target = tiny.target_config(vocab_size=300, num_hidden_layers=6)
    params = tiny.target_params(target)
    # specforge's generation cuts the mask token from its text: a target that never writes it.
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, 3].set(0.0)
    save_target(params, target, tmp_path / "target")
    train_bpe(words * 9, 300, tmp_path / "target")
    drafter = tiny.drafter_config(target, mask_token_id=3, target_layer_ids=(1,))
    save_drafter(tiny.drafter_params(drafter), drafter, tmp_path / "drafter")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words))
    sizes = ["--B", "1", "--S", "24", "--A", "2", "--K", "4", "--V", "64", "--D", "64", "--max-new-tokens", "6"]
    folders = ["--target", tmp_path / "target", "--drafter", tmp_path / "drafter"]
    command = [sys.executable, MEASURE / "compare_peers.py", *folders, "--prompts", tmp_path / "prompts.jsonl",
               *sizes, "--repeats", "1", "--out", tmp_path / "out.json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["generation"]["same"] == found["generation"]["prompts"] == 3
    assert found["training"]["step_s"].keys() == {"specforge", "decay", "auf"}


def test_golden_sees_one_changed_number(tmp_path, capsys):
    before = jax.config.jax_default_matmul_precision
    count = record_case(load("golden.py"), tmp_path / "case", ("dflash", "domino"))
    with np.load(tmp_path / "case/golden.npz") as arrays:
        arrays = dict(arrays)
    arrays["dflash_loss_decay7"] += 1e-3
    np.savez(tmp_path / "case/golden.npz", **arrays)
    capsys.readouterr()
    try:
        assert run("golden.py", tmp_path) == 1
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{count - 1} passed, 1 failed"
    assert [line.split()[2] for line in lines if "FAIL" in line] == ["dflash_loss_decay7:"]
