"""Blocks at anchors, `loss_fn`, the step, checkpoints and the loop."""
