"""The ladder of `static_vs_dynamic`: ways to come by the matrix that mixes tokens, and sizes."""

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_attn import (
    attention,
    causal,
    check_leaves,
    count,
    data,
    draw,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    init_static_mixer,
    project_qkv,
    rope,
    static_mixer,
    static_weights,
    window,
)
from jax_attn.params import fan_in
from jax_attn.readers import attention_rows

# Which models there are of each rung: what their names end in, and in words.
COLUMNS = {"+mlp": "with MLP", "": "without MLP"}
STATIC, DYNAMIC = ("none", "uniform", "random", "static"), ("synthesizer", "frozen", "attention")
LADDER = (*STATIC, *DYNAMIC)


def columns(names: Container[str]) -> dict[str, str]:
    """Say of which columns there are models."""
    return {
        suffix: title
        for suffix, title in COLUMNS.items()
        if any(name + suffix in names for name in LADDER)
    }


class Rung(NamedTuple):
    """One way to come by the matrix that mixes tokens."""

    part: str
    """Of a block: "mixer" or "attention"."""
    init: Callable[..., Any]
    """(key, N=heads, E=width of values) -> parameters."""
    run: Callable[[Any, jax.Array], jax.Array]
    """(parameters, x_BTD) -> y_BTD."""
    weights: Callable[[Any, jax.Array], jax.Array]
    """(parameters, x_BTD) -> the matrix that `run` mixes by, [B,N,T,S]."""
    scores: int = 0
    """Numbers that each head trains to make it."""
    frozen: tuple[str, ...] = ()
    """Leaves that stay as they were drawn."""
    rates: Mapping[str, float] = {}
    """Leaves that learn at another rate, and the factor."""


def rungs(cfg: Any) -> dict[str, Rung]:
    """Declare the ladder, from the bottom."""
    D, T, H = cfg.D, cfg.T, cfg.D // cfg.N
    turned = rope.plain(H) if cfg.rope else None
    attend = Rung(
        "attention",
        partial(init_attention, D=D, H=H),
        partial(attention, mask=causal(), rope=turned),
        partial(attention_maps, turned=turned),
        2 * D * H,
    )
    alone, past = (
        Rung(
            "mixer",
            partial(init_static_mixer, D=D),
            partial(static_mixer, mask=mask),
            partial(static_maps, mask=mask),
        )
        for mask in (window(0), causal())
    )
    matrix = past._replace(init=partial(init_static_mixer, D=D, T=T))
    return {
        "none": alone,
        "uniform": past,
        "random": matrix._replace(frozen=("logits_NTS",)),
        "static": matrix._replace(scores=T * T, rates={"logits_NTS": D**0.5}),
        "synthesizer": Rung(
            "mixer",
            partial(init_synthesizer, D=D, H=H, T=T),
            synthesizer,
            synthesizer_maps,
            (D + T) * H,
        ),
        "frozen": attend._replace(scores=0, frozen=("wq_DNH", "wk_DKH")),
        "attention": attend,
    }


def static_maps(params: Any, x_BTD: jax.Array, *, mask: Any) -> jax.Array:
    """Write out what a static mixer mixes by, once for each input."""
    weights_NTS = static_weights(params, x_BTD.shape[1], mask=mask)
    return jnp.broadcast_to(weights_NTS[None], (x_BTD.shape[0], *weights_NTS.shape))


def attention_maps(params: Any, x_BTD: jax.Array, *, turned: Any) -> jax.Array:
    """Write out what causal attention mixes by."""
    q_BTNH, k_BSKH, _ = project_qkv(params, x_BTD, rope=turned)
    return attention_rows(q_BTNH, k_BSKH, rows=jnp.arange(x_BTD.shape[1]), mask=causal())


def init_synthesizer(key: jax.Array, *, D: int, N: int, H: int, E: int, T: int) -> Any:
    """Draw a dense synthesizer: H hidden units a head make the scores of T keys."""
    leaves = {
        **{"w_in_DNH": fan_in(D), "w_out_NHS": fan_in(H)},
        **{"wv_DNE": fan_in(D), "wo_NED": fan_in(N, E)},
    }
    return draw(key, leaves, {"D": D, "N": N, "H": H, "E": E, "S": T})


def synthesizer_maps(params: Any, x_BTD: jax.Array) -> jax.Array:
    """Make the matrix: a row's scores are a function of its own token, relu(x W_in) W_out."""
    check_leaves("synthesizer", params, ("w_in_DNH", "w_out_NHS", "wv_DNE", "wo_NED"))
    T = x_BTD.shape[1]
    h_BTNH = jax.nn.relu(jnp.einsum("BTD,DNH->BTNH", x_BTD, params["w_in_DNH"]))
    s_BNTS = jnp.einsum("BTNH,NHS->BNTS", h_BTNH, params["w_out_NHS"][:, :, :T])
    return jax.nn.softmax(jnp.where(causal().materialize(T, T), s_BNTS, -jnp.inf), axis=-1)


def synthesizer(params: Any, x_BTD: jax.Array) -> jax.Array:
    """Mix tokens by what each of them says about where to look, whatever stands there."""
    p_BNTS, x_BSD = synthesizer_maps(params, x_BTD), x_BTD
    v_BSNE = jnp.einsum("BSD,DNE->BSNE", x_BSD, params["wv_DNE"])
    o_BTNE = jnp.einsum("BNTS,BSNE->BTNE", p_BNTS, v_BSNE)
    return jnp.einsum("BTNE,NED->BTD", o_BTNE, params["wo_NED"])


class Model(NamedTuple):
    """One model: a rung, with its sizes."""

    rung: Rung
    init: Callable[[jax.Array], Any]
    N: int
    F: int
    """0 without an MLP."""
    trained: int
    """Numbers of a block that training moves."""
    frozen: int


def models(cfg: Any) -> dict[str, Model]:
    """Size the models: each block trains as many numbers as attention with its MLP, to 1 %."""
    D, H = cfg.D, cfg.D // cfg.N
    budget = 4 * D * D + 2 * D * cfg.F + 2 * D  # four matrices, an MLP, two norms
    ladder = rungs(cfg)
    made = {}
    for name in cfg.rungs.split(",") if cfg.rungs else LADDER:
        if name not in ladder:
            raise ValueError(f"--rungs must be of {','.join(LADDER)}, got {name!r}")
        rung = ladder[name]
        for suffix, column in COLUMNS.items():
            if not (suffix or cfg.without_mlp):
                continue
            N, E, F = cfg.N, H, 0
            if suffix:
                F = max(1, round((budget - 2 * D - N * (rung.scores + 2 * D * E)) / (2 * D)))
            else:
                N = max(1, round((budget - D) / (rung.scores + 2 * D * H)))
                E = max(1, round(((budget - D) / N - rung.scores) / (2 * D)))
            parts = {rung.part: partial(rung.init, N=N, E=E)}
            feed = partial(init_mlp, D=D, F=F) if F else None
            layer = partial(init_block, D=D, mlp=feed, **parts)
            block = jax.eval_shape(layer, jax.random.key(0))
            frozen = count({leaf: block[rung.part][leaf] for leaf in rung.frozen})
            trained = count(block) - frozen
            if abs(trained / budget - 1) > 0.01:
                raise ValueError(
                    f"a block of {name!r} {column} trains {trained:,} numbers where attention has "
                    f"{budget:,}: more than 1 % apart; with --D={D}, --N={cfg.N}, --T={cfg.T} give "
                    f"another --F than {cfg.F}"
                )
            init = partial(
                init_language_model, V=data.VOCABULARY, D=D, L=cfg.L, T=cfg.T, layer=layer
            )
            made[name + suffix] = Model(rung, init, N, F, trained, frozen)
    return made


def watched(rung: Rung) -> Callable[..., Any]:
    """Let the part of a rung also say how its matrix varies from input to input, and its mean.

    The variance is that of a row, summed over keys: its mean square distance from the mean row,
    between 0 and 1. Measured from the first input, so that equal matrices give exactly 0.
    """

    def run(params: Any, x_BTD: jax.Array) -> Any:
        p_BNTS = rung.weights(params, x_BTD)
        apart_BNTS = p_BNTS - p_BNTS[:1]
        variance_NTS = jnp.var(apart_BNTS, axis=0, ddof=1)
        said = {"variance_N": variance_NTS.sum(-1).mean(-1), "mean_NTS": p_BNTS.mean(0)}
        return rung.run(params, x_BTD), said

    return run


def with_maps(params: Any, maps_LNTS: jax.Array) -> Any:
    """Turn a model of attention into one of static mixers that mix by given maps."""
    layers = dict(params["layers"])
    attention = layers.pop("attention")
    layers["mixer_norm"] = layers.pop("attention_norm")
    layers["mixer"] = {
        "wv_DNE": attention["wv_DKE"],
        "wo_NED": attention["wo_NED"],
        "logits_NTS": jnp.log(maps_LNTS),
    }
    return {**params, "layers": layers}
