"""Flax Linen shells: they declare leaves of the same names and call the functions.

One parameter tree serves both: `attention(variables["params"], x_BTD)` and
`Attention(...).apply(variables, x_BTD)` are bit-equal. NNX users wrap a shell in
`flax.nnx.bridge.ToNNX(shell, rngs=nnx.Rngs(0)).lazy_init(x_BTD)`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_attn.attention import attention, attention_leaves, attention_sizes
from jax_attn.block import PARTS, Init, Part, block, init_stack
from jax_attn.dot_product import Score
from jax_attn.language_model import (
    causal_attention,
    causal_mixer,
    language_model,
    language_model_leaves,
)
from jax_attn.mask_types import Mask
from jax_attn.mixing import static_mixer, static_mixer_leaves, static_mixer_sizes
from jax_attn.mlp import gated_mlp, gated_mlp_leaves, mlp, mlp_leaves
from jax_attn.moe import moe, moe_leaves
from jax_attn.norm import init_rms_norm
from jax_attn.observe import Mean
from jax_attn.params import Leaves, Params
from jax_attn.rope import Rope
from jax_attn.shapes import dims, shape


def _declare(module: nn.Module, leaves: Leaves, sizes: dict[str, int], dtype: Any) -> Params:
    return {
        name: module.param(name, init, shape(name, sizes), dtype) for name, init in leaves.items()
    }


def _dropout_key(module: nn.Module, drop: bool, deterministic: bool) -> jax.Array | None:
    """Make a key if the blocks drop, or if one is there for an `attend` that has its own rate."""
    if drop or (not deterministic and module.has_rng("dropout")):
        return module.make_rng("dropout")
    return None


class Attention(nn.Module):
    """Shell of `attention`: fields as in `init_attention` and `attention`, D is x's.

    What `observe` asks for is sown as "seen" into the collection "intermediates".

    Example:
      >>> x_BTD = jnp.ones((1, 3, 8))
      >>> shell = Attention(N=2, observe=("entropy",))
      >>> variables = shell.init(jax.random.key(0), x_BTD)
      >>> variables["params"]["wq_DNH"].shape
      (8, 2, 4)
      >>> y_BTD, state = shell.apply(variables, x_BTD, mutable="intermediates")
      >>> state["intermediates"]["seen"][0]["entropy"].shape
      (1, 3, 2)
    """

    N: int
    K: int | None = None
    H: int | None = None
    E: int | None = None
    bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    mask: Mask | None = None
    rope: Rope | None = None
    score: Score | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_rate: float = 0.0
    observe: tuple[str | Mean, ...] | None = None
    implementation: str | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kv_BSD: jax.Array | None = None,
        *,
        mask: Mask | jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Return attention's output; `mask` replaces the field, dropout uses rng "dropout"."""
        sizes = attention_sizes(dims(x_BTD=x_BTD).size("D"), self.N, self.K, self.H, self.E)
        options = {"bias": self.bias, "qk_norm": self.qk_norm, "sinks": self.sinks}
        leaves = attention_leaves(sizes["D"], self.N, sizes["E"], **options)
        drop = self.dropout_rate > 0.0 and not deterministic
        made = attention(
            _declare(self, leaves, sizes, self.param_dtype),
            x_BTD,
            kv_BSD=kv_BSD,
            mask=self.mask if mask is None else mask,
            rope=self.rope,
            score=self.score,
            scale=self.scale,
            softcap=self.softcap,
            dropout_rate=self.dropout_rate if drop else 0.0,
            dropout_key=self.make_rng("dropout") if drop else None,
            observe=self.observe,
            implementation=self.implementation,
        )
        if self.observe is None:
            return made
        y_BTD, aux = made
        self.sow("intermediates", "seen", aux["seen"])
        return y_BTD


class MLP(nn.Module):
    """Shell of `mlp`: fields as in `init_mlp` and `mlp`, D is x's.

    Example:
      >>> variables = MLP(F=16).init(jax.random.key(0), jnp.ones((1, 3, 8)))
      >>> variables["params"]["w_in_DF"].shape
      (8, 16)
    """

    F: int
    bias: bool = False
    activation: str = "gelu"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return the MLP's output."""
        D = dims(x_BTD=x_BTD).size("D")
        leaves = mlp_leaves(D, self.F, bias=self.bias)
        params = _declare(self, leaves, {"D": D, "F": self.F}, self.param_dtype)
        return mlp(params, x_BTD, activation=self.activation)


class GatedMLP(nn.Module):
    """Shell of `gated_mlp`: fields as in `init_gated_mlp` and `gated_mlp`, D is x's.

    Example:
      >>> variables = GatedMLP(F=16).init(jax.random.key(0), jnp.ones((1, 3, 8)))
      >>> variables["params"]["w_gate_DF"].shape
      (8, 16)
    """

    F: int
    activation: str = "silu"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return the gated MLP's output."""
        D = dims(x_BTD=x_BTD).size("D")
        leaves = gated_mlp_leaves(D, self.F)
        params = _declare(self, leaves, {"D": D, "F": self.F}, self.param_dtype)
        return gated_mlp(params, x_BTD, activation=self.activation)


class MoE(nn.Module):
    """Shell of `moe`: fields as in `init_moe` and `moe`, D is x's.

    Example:
      >>> variables = MoE(F=16, X=4).init(jax.random.key(0), jnp.ones((1, 3, 8)))
      >>> variables["params"]["router_DX"].shape
      (8, 4)
    """

    F: int
    X: int
    k: int = 2
    gated: bool = True
    renormalize: bool = False
    activation: str = "silu"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Return (output, {"routing": Routing})."""
        D = dims(x_BTD=x_BTD).size("D")
        sizes = {"D": D, "F": self.F, "X": self.X}
        leaves = moe_leaves(D, self.F, gated=self.gated)
        params = _declare(self, leaves, sizes, self.param_dtype)
        return moe(
            params, x_BTD, k=self.k, renormalize=self.renormalize, activation=self.activation
        )


class StaticMixer(nn.Module):
    """Shell of `static_mixer`: fields as in `init_static_mixer` and `static_mixer`, D is x's.

    Example:
      >>> variables = StaticMixer(N=2, T=3).init(jax.random.key(0), jnp.ones((1, 3, 8)))
      >>> variables["params"]["logits_NTS"].shape
      (2, 3, 3)
    """

    N: int
    T: int | None = None
    E: int | None = None
    mask: Mask | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return the mixed tokens."""
        sizes = static_mixer_sizes(dims(x_BTD=x_BTD).size("D"), self.N, self.T, self.E)
        leaves = static_mixer_leaves(sizes["D"], self.N, sizes["E"], learned=self.T is not None)
        params = _declare(self, leaves, sizes, self.param_dtype)
        return static_mixer(params, x_BTD, mask=self.mask)


class Block(nn.Module):
    """Shell of `block`: initialisers of the parts as in `init_block`, functions as in `block`.

    Example:
      >>> from functools import partial
      >>> from jax_attn import init_mlp
      >>> shell = Block(init_feed=partial(init_mlp, D=8, F=16))
      >>> list(shell.init(jax.random.key(0), jnp.ones((1, 3, 8)))["params"])
      ['mlp', 'mlp_norm']
    """

    init_attend: Init | None = None
    init_mix: Init | None = None
    init_feed: Init | None = None
    attend: Part = attention
    mix: Part = static_mixer
    feed: Part = mlp
    init_norm: Any = init_rms_norm
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return (x_BTD, aux); dropout uses rng "dropout"."""
        D = dims(x_BTD=x_BTD).size("D")
        inits = zip(PARTS, (self.init_attend, self.init_mix, self.init_feed), strict=True)
        params: Params = {}
        for name, init in inits:
            if init is not None:
                params[name] = self.param(name, init)
                params[f"{name}_norm"] = self.param(f"{name}_norm", lambda _: self.init_norm(D))
        drop = self.dropout_rate > 0.0 and not deterministic
        return block(
            params,
            x_BTD,
            attend=self.attend,
            mix=self.mix,
            feed=self.feed,
            dropout_rate=self.dropout_rate if drop else 0.0,
            dropout_key=_dropout_key(self, drop, deterministic),
        )


class LanguageModel(nn.Module):
    """Shell of `language_model`: fields as in `init_language_model` and `language_model`.

    Example:
      >>> from functools import partial
      >>> from jax_attn import init_block, init_mlp
      >>> layer = partial(init_block, D=8, mlp=partial(init_mlp, D=8, F=16))
      >>> shell = LanguageModel(V=11, D=8, L=2, layer=layer)
      >>> list(shell.init(jax.random.key(0), jnp.array([[1, 2]]))["params"])
      ['embed_VD', 'layers', 'norm']
    """

    V: int
    D: int
    L: int
    layer: Init
    T: int | None = None
    tied: bool = True
    attend: Part = causal_attention
    mix: Part = causal_mixer
    feed: Part = mlp
    dropout_rate: float = 0.0
    remat: str | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return (logits_BTV, aux); dropout uses rng "dropout"."""
        sizes = {"V": self.V, "D": self.D} | ({} if self.T is None else {"T": self.T})
        leaves = language_model_leaves(self.D, T=self.T, tied=self.tied)
        params = _declare(self, leaves, sizes, self.param_dtype)
        params["layers"] = self.param("layers", lambda key: init_stack(key, self.L, self.layer))
        params["norm"] = self.param("norm", lambda _: init_rms_norm(self.D, self.param_dtype))
        drop = self.dropout_rate > 0.0 and not deterministic
        return language_model(
            params,
            tokens_BT,
            attend=self.attend,
            mix=self.mix,
            feed=self.feed,
            dropout_rate=self.dropout_rate if drop else 0.0,
            dropout_key=_dropout_key(self, drop, deterministic),
            remat=self.remat,
        )
