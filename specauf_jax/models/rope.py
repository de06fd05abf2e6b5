"""Rotary position embedding in half-split form, with the scalings that Qwen and Llama checkpoints ask for.

Formulas: RoPE (arXiv 2104.09864), linear (arXiv 2306.15595), YaRN (arXiv 2309.00071), Llama 3.1's own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specauf_jax.architecture import ResolvedDrafter, Target

_LANES = 128  # of a TPU's register


def rope_angles(positions: jax.Array, config: Target | ResolvedDrafter) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's rotations, float32 `[..., 1, R/2]` (one head axis), R = `rotary_dim`.

    float32 throughout: in bfloat16 positions above 256 could not be told apart.

    Args:
      positions: int `[...]`.
      config: whose `rope_scaling`, base and head size are used.
    """
    frequencies, amplitude = rope_frequencies(config)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first R elements of `[..., H, E]` in half-split form (element e pairs with e + R/2).

    The angles have no gradient. Compiled for TPUs, it is differentiated backward alone (no `jax.jvp`).
    """
    angles, half = lax.stop_gradient(angles), angles[0].shape[-1]
    on_tpu = _by_product if half % _LANES else _by_halves
    turned = lax.platform_dependent(x[..., : 2 * half], *angles, tpu=on_tpu, default=_by_halves)
    return turned if x.shape[-1] == 2 * half else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def _by_halves(x, cos, sin):
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def _by_product(x, cos, sin):
    """An element's partner comes by a product with 1, -1 and 0, which is exact of finite numbers: to move half a head
    that is not whole registers costs a TPU more. The gradient is the rotation back, as exact."""
    partners = np.kron([[0, 1], [-1, 0]], np.eye(cos.shape[-1]))
    partner = jnp.einsum("...e,ef->...f", x, jnp.asarray(partners, x.dtype), precision=lax.Precision.HIGHEST)
    cos, sin = (jnp.concatenate([part, part], axis=-1) for part in (cos, sin))
    return (x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin).astype(x.dtype)


def _back(angles, cotangent):
    cos, sin = angles
    return _by_product(cotangent, cos, -sin), None, None


_by_product.defvjp(lambda x, *angles: (_by_product(x, *angles), angles), _back)


def rope_frequencies(config: Target | ResolvedDrafter) -> tuple[np.ndarray, float]:
    """Radians per position, float32 `[R/2]`, and the amplitude of the rotations.

    Computed on the host, in the precision in which models were trained: one unit in the last place
    of a frequency is 0.002 radians at position 32,768.
    """
    scaling = config.rope_scaling
    length = scaling.original_max_position_embeddings or config.max_position_embeddings
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    # The power is rounded once, from float64: numpy's float32 power is off by a unit in many places.
    period = (np.float64(config.rope_theta) ** exponent).astype(np.float32)
    plain = np.float32(1) / period
    match scaling.rope_type:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / np.float32(scaling.factor), 1.0
        case "llama3":
            return _llama3(plain, scaling, length), 1.0
        case "yarn":
            return _yarn(period, config, length), _yarn_amplitude(scaling)


def _llama3(plain, scaling, length: int) -> np.ndarray:
    """Stretch waves longer than the pretraining length, leave short ones, and blend between."""
    wave = np.float32(2 * math.pi) / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = (length / wave - low) / np.float32(high - low)  # of the plain frequency
    blended = (1 - share) * plain / np.float32(scaling.factor) + share * plain
    long, short = wave > length / low, wave < length / high
    return np.where(long, plain / np.float32(scaling.factor), np.where(short, plain, blended)).astype(np.float32)


def _yarn(period, config, length: int) -> np.ndarray:
    """Stretch frequencies with few turns over the pretraining length, leave those with many, and blend between."""
    scaling, E = config.rope_scaling, config.rotary_dim

    def index_of(turns: float) -> float:
        return E * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, E - 1)
    ramp = (np.arange(E // 2, dtype=np.float32) - np.float32(first)) / np.float32(max(last - first, 0.001))
    keep = 1 - np.clip(ramp, 0, 1)
    stretched = 1 / (np.float32(scaling.factor) * period)
    return (stretched * (1 - keep) + keep / period).astype(np.float32)


def _yarn_amplitude(scaling) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)
