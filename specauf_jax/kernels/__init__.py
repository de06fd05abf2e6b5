"""Attention over ranges, block attention, the LM head up to each block's first miss: in XLA, and Pallas for TPU."""
