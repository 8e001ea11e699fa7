"""Generation with a key/value cache: an explicit pytree that is passed in and handed back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.language_model import language_model
from jax_attn.params import Params
from jax_attn.shapes import dims, floating, integer

Model = Callable[..., Any]


def init_cache(params: Params, B: int, S: int, dtype: Any = None) -> Params:
    """Make an empty cache for a language model.

    Args:
      params: of a language model whose blocks have attention.
      B: batch.
      S: room for this many tokens, prompt and generated ones.
      dtype: of keys and values; default that of the parameters.
    Returns: {"layers": {"k_BSKH", "v_BSKE"} with a leading L, "length": int32 tokens held}.
    Raises: ValueError if the blocks have no attention, or naming B or S.
    Example:
      >>> params = {"layers": {"attention": {"wk_DKH": jnp.ones((2, 6, 1, 3)),
      ...                                    "wv_DKE": jnp.ones((2, 6, 1, 3))}}}
      >>> init_cache(params, B=1, S=8)["layers"]["k_BSKH"].shape
      (2, 1, 8, 1, 3)
    """
    for name, size in (("B", B), ("S", S)):
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"init_cache: {name} must be an int >= 1, got {size!r}")
    if "attention" not in params.get("layers", {}):
        raise ValueError("init_cache: params['layers'] has no 'attention', nothing to cache")
    leaves = params["layers"]["attention"]

    def room(name: str) -> jax.Array:
        L, _, K, width = leaves[name].shape
        return jnp.zeros((L, B, S, K, width), leaves[name].dtype if dtype is None else dtype)

    layers = {"k_BSKH": room("wk_DKH"), "v_BSKE": room("wv_DKE")}
    return {"layers": layers, "length": jnp.zeros((), jnp.int32)}


def extend(
    params: Params, tokens_BT: jax.Array, cache: Params, *, model: Model = language_model
) -> tuple[jax.Array, Params]:
    """Feed tokens behind those in the cache: the prompt at once (prefill), or one more (step).

    Args:
      params: of the model.
      tokens_BT: the next tokens; all sequences have the same length.
      cache: from `init_cache` or an earlier `extend`.
      model: `language_model`, with its options bound: `partial(language_model, attend=...)`.
    Returns: (logits_BTV of these tokens, cache with them added). If the cache has no room left
      the logits are NaN: under `jit` the length is known only when it runs.
    Raises: ValueError naming the argument, the letter and both sizes.
    Example:
      >>> from functools import partial
      >>> from jax_attn import init_attention, init_block, init_language_model
      >>> layer = partial(init_block, D=6, attention=partial(init_attention, D=6, N=2))
      >>> params = init_language_model(jax.random.key(0), V=11, D=6, L=2, layer=layer)
      >>> logits_BTV, cache = extend(params, jnp.array([[1, 2, 3]]), init_cache(params, 1, 8))
      >>> logits_BTV.shape, int(cache["length"])
      ((1, 3, 11), 3)
    """
    sizes = dims(tokens_BT=tokens_BT)
    room = cache["layers"]["k_BSKH"].shape[2]
    if room < sizes.T:
        raise ValueError(f"tokens_BT has T={sizes.T} but the cache has S={room}")
    logits_BTV, aux = model(params, tokens_BT, cache=cache["layers"], q_offset=cache["length"])
    return logits_BTV, {
        "layers": aux["attention"]["cache"],
        "length": cache["length"] + sizes.T,
    }


def sample(
    key: jax.Array | None,
    logits_BV: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Draw one token a sequence.

    p = softmax(logits / temperature), restricted to the top_k most probable tokens, then to the
    smallest set of them whose mass reaches top_p (nucleus, arXiv:1904.09751). Ties at a border
    stay in.

    Args:
      key: a jax.random key; may be None at temperature 0.
      logits_BV: of the next token.
      temperature: 0, or what float32 cannot tell from it, takes the most probable token.
      top_k: int from 1 to V, or None.
      top_p: in (0, 1], or None. The most probable token always stays.
    Returns: int32 [B]; -1, which is no token, where a logit is NaN.
    Raises: ValueError naming the argument.
    Example:
      >>> sample(None, jnp.array([[0.0, 2.0, 1.0]]), temperature=0.0).tolist()
      [1]
    """
    sizes = dims(logits_BV=logits_BV)
    floating(logits_BV=logits_BV)
    _check_sampling(key, temperature, top_k, top_p, sizes.V)
    unknown_B = jnp.isnan(logits_BV).any(axis=-1)
    if temperature < jnp.finfo(jnp.float32).tiny:  # float32 would divide by 0
        return jnp.where(unknown_B, -1, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)
    assert key is not None
    logits_BV = logits_BV.astype(jnp.float32)
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if top_p is not None and top_p < 1:  # at 1 rounding of the sum could drop a token
        falling = jnp.sort(logits_BV, axis=-1, descending=True)
        p = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    token_B = jax.random.categorical(key, logits_BV, axis=-1)
    return jnp.where(unknown_B, -1, token_B).astype(jnp.int32)


def generate(
    params: Params,
    prompt_BT: jax.Array,
    *,
    steps: int,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    model: Model = language_model,
) -> jax.Array:
    """Continue prompts by `steps` tokens, one at a time, with a cache.

    Each call compiles anew; for many calls keep `jax.jit(partial(generate, steps=..., ...))`.

    Args:
      params: of the model.
      prompt_BT: int tokens, T >= 1, all sequences of the same length.
      steps: tokens to add, >= 1.
      key: a jax.random key; token i of sequence b is a pure function of (key, i, b, its
        logits). May be None at temperature 0.
      temperature, top_k, top_p: see `sample`.
      model: `language_model` with its options bound.
    Returns: int32 [B, T + steps], the prompt included; -1 from where logits are NaN, which an
      unknown token in the prompt causes.
    Raises: ValueError naming the argument, the letter and both sizes.
    Example:
      >>> from functools import partial
      >>> from jax_attn import init_attention, init_block, init_language_model
      >>> layer = partial(init_block, D=6, attention=partial(init_attention, D=6, N=2))
      >>> params = init_language_model(jax.random.key(0), V=11, D=6, L=2, layer=layer)
      >>> generate(params, jnp.array([[1, 2, 3]]), steps=4, temperature=0.0).shape
      (1, 7)
    """
    sizes = dims(prompt_BT=prompt_BT)
    integer(prompt_BT=prompt_BT)
    if sizes.T < 1:
        raise ValueError("prompt_BT has T=0; give at least one token")
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, got {steps!r}")
    if "embed_VD" not in params:
        raise ValueError(f"generate: leaf 'embed_VD' is missing; params has: {', '.join(params)}")
    _check_sampling(key, temperature, top_k, top_p, params["embed_VD"].shape[0])
    fed = sizes.T + steps - 1  # the last token made is not read again
    if "position_TD" in params and params["position_TD"].shape[0] < fed:
        raise ValueError(
            f"prompt_BT has T={sizes.T}, which with steps={steps} needs {fed} positions, but "
            f"position_TD has T={params['position_TD'].shape[0]}"
        )
    # Room that devices can share evenly, where the cache is split over them.
    share = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    cache = init_cache(params, sizes.B, -(-fed // share) * share)
    logits_BTV, cache = extend(params, prompt_BT, cache, model=model)
    keys = jax.random.split(jax.random.key(0) if key is None else key, steps)

    def pick(key: jax.Array, logits_BV: jax.Array) -> jax.Array:
        return sample(key, logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)

    def step(carry: Any, key: jax.Array) -> Any:
        token_B, cache = carry
        logits_BTV, cache = extend(params, token_B[:, None], cache, model=model)
        token_B = pick(key, logits_BTV[:, -1])
        return (token_B, cache), token_B

    first_B = pick(keys[0], logits_BTV[:, -1])
    _, later = jax.lax.scan(step, (first_B, cache), keys[1:])
    made = jnp.concatenate([first_B[:, None], later.T], axis=1)
    return jnp.concatenate([prompt_BT.astype(jnp.int32), made], axis=1)


def _check_sampling(key: Any, temperature: Any, top_k: Any, top_p: Any, V: int) -> None:
    if not isinstance(temperature, int | float | np.number) or not temperature >= 0:
        raise ValueError(f"temperature must be a number >= 0, got {temperature!r}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} needs a key; 0 takes the most probable token")
    if top_k is not None and (not isinstance(top_k, int | np.integer) or not 1 <= top_k <= V):
        raise ValueError(f"top_k must be an int from 1 to V={V}, got {top_k!r}")
    if top_p is not None and (not isinstance(top_p, int | float | np.number) or not 0 < top_p <= 1):
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
