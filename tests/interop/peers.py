"""Small random models in the peers' own classes, and how they are asked."""

import json
import math

import numpy as np
import torch
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel, OnlineDominoModel, OnlineDSparkModel
from specforge.modeling.draft import dflash
from specforge.modeling.draft.domino import DominoDraftModel
from specforge.modeling.draft.dspark import DSparkDraftModel
from speculators import SpeculatorModel, SpeculatorModelConfig
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

CONFIGS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig, "qwen3_moe": Qwen3MoeConfig,
           "gemma3": Gemma3TextConfig, "gpt_oss": GptOssConfig}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {
    "vocab_size": 151,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def write_target(folder, model_type="qwen3", dtype="float32", shards=1, seed=0, rope=None, **changes):
    """A random target as transformers writes it; returns transformers' own reading of the files, in float32."""
    rope = {"rope_type": "default", **(rope or {})}
    if model_type == "gemma3":
        local = {"rope_type": "default", "rope_theta": 1e4}
        rope = {"full_attention": rope, "sliding_attention": local}
    config = CONFIGS[model_type](**(SIZES | changes), rope_parameters=rope)
    model = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed).to(DTYPES[dtype])
    model.save_pretrained(folder, max_shard_size=math.ceil(model.get_memory_footprint() / shards))
    assert (folder / "model.safetensors.index.json").exists() == (shards > 1)
    return read_target(folder)


def read_target(folder):
    """transformers' reading of a target's folder, in float32; every tensor must be met."""
    model, seen = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert_complete(seen)
    return model.eval()


def read_drafter(folder, attention="sdpa"):
    """specforge's reading of a drafter's folder, in float32; every tensor must be met."""
    projector = json.loads((folder / "config.json").read_text())["dflash_config"].get("projector_type", "dflash")
    kind = {"dflash": dflash.DFlashDraftModel, "domino": DominoDraftModel, "dspark": DSparkDraftModel}[projector]
    model, seen = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    assert_complete(seen)
    return model.eval()


def read_speculators(folder):
    """speculators' reading of a drafter's folder; embedding and LM head come from the target that it names."""
    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32)
    model.load_verifier_weights()
    return model.eval()


def training(drafter, target, anchors, keep, backend="sdpa", **settings):
    """specforge's training model around a drafter and its target, with the given anchors in place of random ones."""
    models = {DominoDraftModel: OnlineDominoModel, DSparkDraftModel: OnlineDSparkModel}
    model = models.get(type(drafter), OnlineDFlashModel)
    online = model(drafter, target.lm_head, target.model.embed_tokens, drafter.mask_token_id,
                   block_size=drafter.block_size, attention_backend=backend, **settings)  # fmt: skip
    online._sample_anchor_positions = lambda *_: (torch.as_tensor(anchors), torch.as_tensor(keep))
    return online


def speculate(drafter, target, prompt, max_new_tokens, stop_tokens=None):
    """specforge's greedy generation: new tokens, and the accepted drafts of every round.

    Both caches are cropped once a round, first the drafter's to the anchor, then the target's to the next anchor.
    """
    crops = []

    class Logged(DynamicCache):
        def crop(self, length):
            crops.append(length)
            super().crop(length)

    before, dflash.DynamicCache = dflash.DynamicCache, Logged
    try:
        found = drafter.spec_generate(target, torch.tensor([prompt]), max_new_tokens, stop_tokens, 0.0)
    finally:
        dflash.DynamicCache = before
    accepted = [after - at - 1 for at, after in zip(crops[::2], crops[1::2], strict=True)]
    return found[0, len(prompt) :].tolist(), accepted


def assert_complete(loading_info):
    """Of transformers' report on what it read."""
    found = {name: sorted(map(str, loading_info[name])) for name in ("missing_keys", "unexpected_keys")}
    assert found == {"missing_keys": [], "unexpected_keys": []}
    assert not loading_info["mismatched_keys"]


def randomise(model, seed):
    """Weights under which every layer matters: outputs of the size of inputs, norms and biases that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.2 * noise
            elif x.ndim > 1 and "embed_tokens" not in name:
                noise = noise / math.sqrt(x.shape[-1])
            x.copy_(noise)
    return model


def relative_error(found, expected, floor=0.0) -> float:
    """max|found - expected| / max(floor, max|expected|)."""
    found, expected = (
        np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (found, expected)
    )
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(floor, np.abs(expected).max()))
