"""Serving engines' own drafters: tpu-inference's in JAX, z-lab's in torch; what they need besides is stubbed.

tpu-inference asks for vLLM, torchax and kernels of TPUs. Its model, weight loader, RoPE and cache shapes are its own
here; its reference attention stands in the place of its Pallas kernel, float32 in that of bfloat16.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig

_STUBBED = {"vllm", "torchax", "qwix", "tokamax", "pathwaysutils", "tpu_info", "torchvision", "numba"}


class _Anything(types.ModuleType):
    """A module with every class, and every function, which does nothing."""

    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        generic = {"__class_getitem__": classmethod(lambda cls, _: cls)}
        found = type(name, (), generic) if name[0].isupper() else mock.MagicMock()
        setattr(self, name, found)
        return found


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in _STUBBED else None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _stubbed():
    """Within, the stubbed packages can be imported; afterwards no trace is left for others that look for them."""
    finder, before = _Stubs(), {name: x for name, x in sys.modules.items() if name.partition(".")[0] in _STUBBED}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in _STUBBED and name not in before]:
            del sys.modules[name]


with _stubbed():
    import dflash.model as zlab
    from tpu_inference.kernels.ragged_paged_attention.v3.kernel import ref_ragged_paged_attention
    from tpu_inference.layers.common import attention_interface
    from tpu_inference.layers.common.attention_backend import RPAAttentionBackend
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata
    from tpu_inference.models.jax import dflash
    from tpu_inference.utils import get_padded_head_dim

PAGE = 16  # positions
_FLOAT32 = types.SimpleNamespace(**vars(jnp) | {"bfloat16": jnp.float32})


def _reference(*args, update_kv_cache, **settings):
    known = ("use_causal_mask", "sm_scale", "sliding_window", "soft_cap")
    return ref_ragged_paged_attention(*args, **{name: settings[name] for name in known})


class TpuInference:
    """tpu-inference's drafter of a folder."""

    def __init__(self, drafter, target, overrides: dict | None = None):
        """Reads both folders' config.json as vLLM does, and the drafter's weights.

        Args:
          drafter, target: folders.
          overrides: attributes of the target's config, as `--hf-overrides` sets them.
        """
        configs = [AutoConfig.from_pretrained(folder) for folder in (drafter, target)]
        for name, value in (overrides or {}).items():
            setattr(configs[1], name, value)
        models = [
            types.SimpleNamespace(
                hf_config=config,
                model=str(drafter),
                dtype=jnp.float32,
                seed=0,
                is_multimodal_model=False,
                get_head_size=lambda config=config: config.head_dim,
                get_hidden_size=lambda config=config: config.hidden_size,
                get_vocab_size=lambda config=config: config.vocab_size,
            )
            for config in configs
        ]
        self.config = configs[0]
        vllm_config = types.SimpleNamespace(
            model_config=models[1],
            speculative_config=types.SimpleNamespace(draft_model_config=models[0]),
            load_config=types.SimpleNamespace(download_dir=None),
            parallel_config=None,
        )
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
        with mock.patch.object(dflash, "jnp", _FLOAT32), jax.set_mesh(mesh):
            self.model = dflash.DFlashForCausalLM(vllm_config, jax.random.key(0), mesh)
            self.model.load_weights(jax.random.key(0))
        self.mesh = mesh

    def hidden(self, embedding, contexts, anchors) -> jax.Array:
        """Final hidden states `[n, K, D]` of n blocks.

        Args:
          embedding: `[V, D]`, the target's.
          contexts: n arrays `[S, L·D]`, tapped features of all positions before each anchor.
          anchors: n tokens.
        """
        config, K, n = self.config, self.model.block_size, len(anchors)
        lengths = np.array([len(context) for context in contexts], np.int32)
        pages = -(-(lengths.max() + K) // PAGE)
        size = get_padded_head_dim(config.hidden_size // config.num_attention_heads)  # as its cache manager does
        groups = config.num_key_value_heads
        shape = RPAAttentionBackend().get_kv_cache_shape(n * pages, PAGE, groups, size, jnp.float32)
        metadata = AttentionMetadata(
            input_positions=jnp.asarray((lengths[:, None] + np.arange(K)).reshape(-1)),
            block_tables=jnp.arange(n * pages, dtype=jnp.int32),
            seq_lens=jnp.asarray(lengths),
            query_start_loc=jnp.arange(n + 1, dtype=jnp.int32) * K,
            request_distribution=jnp.asarray([0, 0, n], jnp.int32),
        )
        tokens = np.full((n, K), self.model.mask_token_id, np.int32)
        tokens[:, 0] = anchors
        self.model.model.embed_tokens.embedding.value = jnp.asarray(embedding)
        features = self.model.combine_hidden_states(jnp.concatenate([jnp.asarray(c) for c in contexts]))
        starts = jnp.asarray(np.concatenate([[0], lengths.cumsum()]), jnp.int32)
        positions = jnp.asarray(np.concatenate([np.arange(length) for length in lengths]), jnp.int32)
        caches = [jnp.full(shape, jnp.nan) for _ in range(config.num_hidden_layers)]
        with (
            mock.patch.object(attention_interface, "ragged_paged_attention", _reference),
            mock.patch.object(
                attention_interface, "ragged_paged_attention_hd64", lambda q, k, v, kv, *_, **__: (q, kv)
            ),
            mock.patch.object(jax, "shard_map", lambda function, **_: function),
        ):
            _, found, _, _ = self.model(
                caches, jnp.asarray(tokens.reshape(-1)), (features, starts, positions), metadata
            )
        return found.reshape(n, K, -1)


def read_zlab(folder):
    """z-lab's reading of a drafter's folder, in float32, and what it says of the tensors."""
    return zlab.DFlashDraftModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)


def zlab_hidden(model, embedding, context, anchor) -> torch.Tensor:
    """Final hidden states `[K, D]` of one block; arguments as for `TpuInference.hidden`."""
    tokens = torch.full((1, model.block_size), model.mask_token_id)
    tokens[0, 0] = int(anchor)
    context = torch.as_tensor(np.asarray(context))[None]
    with torch.no_grad():
        return model(
            target_hidden=context,
            noise_embedding=torch.as_tensor(np.asarray(embedding))[tokens],
            position_ids=torch.arange(context.shape[1] + model.block_size)[None],
        )[0]


def zlab_generate(*arguments):
    """z-lab's greedy generation of one prompt, and its statistics, which it times on a GPU."""
    with mock.patch.object(zlab, "_cuda_time", time.perf_counter):
        return zlab.dflash_generate(*arguments, return_stats=True)
