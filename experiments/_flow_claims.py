"""The founding claims C1 to C10, each measured on the models that `flow` trained."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import (
    attention,
    block,
    causal,
    count,
    data,
    dense_weights,
    init_attention,
    init_block,
    init_mlp,
    mlp,
    norm,
    stack,
    static_mixer,
    static_weights,
)
from jax_attn.shapes import axes

LINE = "total = width * height; print(total, width)"
# The same length, and the same last token; only what stands before "mat" differs.
CAT = "the cat sat on the mat"
DOG = "the dog lay by his mat"


Run = partial[Any]


class Claim(NamedTuple):
    """One statement, what was measured, and whether it held; None where that is undecided.

    C1, C6 and C7 are true of any such layer by construction: here they fail if the code breaks.
    The others are findings.
    """

    name: str
    statement: str
    measured: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return {True: "holds", False: "does not hold", None: "undecided"}[self.holds]


class Measured(NamedTuple):
    """All claims, and the maps that the figures show."""

    claims: list[Claim]
    seen: dict[str, Any]


def measure(cfg: Any, trained: dict[str, Any], run: Run, inputs: jax.Array) -> Measured:
    """Measure every claim on the trained models; seed 0 where one model is looked at."""
    full = {when: first(getattr(trained["both"], when)) for when in ("before", "after")}
    static = {when: first(getattr(trained["static"], when)) for when in ("before", "after")}
    line = jnp.asarray(data.encode(LINE[: cfg.T]))[None]
    pair = jnp.stack([jnp.asarray(data.encode(s[-cfg.T :])) for s in (CAT, DOG)])
    maps = partial(attention_maps, run)
    seen = {
        "texts": (LINE[: cfg.T], CAT[-cfg.T :], DOG[-cfg.T :]),
        "line": {when: np.asarray(maps(full[when], line)[1]) for when in full},
        "pair": np.asarray(maps(full["after"], pair)[1]),
        "pair_static": np.asarray(static_maps(run, static["after"], pair)),
    }
    claims = [
        c1(full["after"]),
        c2(full["after"], inputs, run),
        c3(full, static, inputs, run),
        c4(full["after"], first(trained["mlp"].after), pair, run),
        c5(full["after"], static["after"], inputs, run),
        c6(),
        c7(cfg),
        c8(trained),
        c9(full["after"], first(trained["mlp"].after), inputs, run),
        c10(trained),
    ]
    return Measured(claims, seen)


def first(tree: Any) -> Any:
    """Take seed 0 of a tree of seeds."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


@partial(jax.jit, static_argnums=0)
def attention_maps(run: Run, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the scaled logits q·k and the probabilities of every layer, [L,B,N,T,S]."""
    attend = partial(run.keywords["attend"], keep=("q_BTNH", "k_BSKH"))
    kept = run(params, tokens_BT, attend=attend)[1]["attention"]["kept"]
    q, k = kept["q_BTNH"], kept["k_BSKH"]
    logits = jnp.einsum("LBTNH,LBSNH->LBNTS", q, k) * q.shape[-1] ** -0.5
    return logits, jax.vmap(partial(dense_weights, mask=causal()))(q, k)


@partial(jax.jit, static_argnums=0)
def static_maps(run: Run, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Return the mixing matrices that a static mixer uses on each input, [L,B,N,T,S]."""

    def mix(params: Any, x_BTD: jax.Array) -> Any:
        weights_NTS = static_weights(params, x_BTD.shape[1], mask=causal())
        used = jnp.broadcast_to(weights_NTS, (x_BTD.shape[0], *weights_NTS.shape))
        return static_mixer(params, x_BTD, mask=causal()), {"weights": used}

    return run(params, tokens_BT, mix=mix)[1]["mixer"]["weights"]


def c1(params: Any) -> Claim:
    """A fully connected layer applies one matrix to all inputs: its Jacobian does not vary."""
    leaves = first(params["layers"]["mlp"])
    x_D = jax.random.normal(jax.random.key(0), (5, leaves["w_in_DF"].shape[0]))
    # Before the nonlinearity: the map that the layer's weights are.
    jacobian = jax.vmap(jax.jacfwd(lambda x: x @ leaves["w_in_DF"]))(x_D)
    variance = float(np.var(np.asarray(jacobian, np.float64), axis=0).max())
    return Claim(
        "C1",
        "a fully connected layer holds weights: one matrix for every input",
        f"variance of its matrix over 5 inputs: {variance:g} (exactly 0 expected)",
        variance == 0.0,
    )


def c2(params: Any, inputs: jax.Array, run: Run) -> Claim:
    """Scores are a softmax: compare with float64 NumPy."""
    logits, p = (np.asarray(x, np.float64) for x in attention_maps(run, params, inputs))
    T = logits.shape[-1]
    exact = np.where(np.tri(T, dtype=bool), logits, -np.inf)
    exact = np.exp(exact - exact.max(axis=-1, keepdims=True))
    exact /= exact.sum(axis=-1, keepdims=True)
    rows, least, error = abs(p.sum(-1) - 1).max(), p.min(), abs(p - exact).max()
    # A sum of T float32 numbers rounds by at most T half-ulps of 1.
    bound = T * np.finfo(np.float32).eps
    return Claim(
        "C2",
        "scores = softmax(scaled QK^T): a distribution for each query",
        f"rows sum to 1 within {rows:.1e}, least score {least:g}, against float64 {error:.1e} "
        f"(bound {bound:.1e})",
        bool(rows <= bound and least >= 0 and error <= bound),
    )


def c3(full: Any, static: Any, inputs: jax.Array, run: Run) -> Claim:
    """Static against dynamic: variance of the mixing matrix over inputs, before and after."""

    def spread(maps: Any) -> float:
        return float(np.var(np.asarray(maps, np.float64), axis=1).mean())

    dynamic = {
        when: spread(attention_maps(run, params, inputs)[1]) for when, params in full.items()
    }

    # The static mixer is asked, not believed: how its output answers to its input, as a Jacobian.
    leaves = first(static["after"]["layers"]["mixer"])
    x_BTD = jax.random.normal(jax.random.key(0), (3, 11, leaves["wv_DNE"].shape[0]))

    def out(x_TD: jax.Array) -> jax.Array:
        return static_mixer(leaves, x_TD[None], mask=causal())[0]

    jacobian = np.asarray(jax.lax.map(jax.jacfwd(out), x_BTD), np.float64)
    fixed = float(np.var(jacobian, axis=0).max())
    return Claim(
        "C3",
        "attention's mixing matrix depends on the input, a static mixer's does not",
        f"mean variance over 7 inputs: attention {dynamic['before']:.2e} at init, "
        f"{dynamic['after']:.2e} trained; static mixer's Jacobian {fixed:g}",
        min(dynamic.values()) > 0 and fixed == 0.0,
    )


def c4(params: Any, alone: Any, pair: jax.Array, run: Run) -> Claim:
    """The same token pair in two contexts: its logit and score, and what "mat" becomes."""
    logits, p = attention_maps(run, params, pair)
    # "t" asks "m", both of the last word "mat".
    gap = np.asarray(jnp.abs(logits[:, 0, :, -1, -3] - logits[:, 1, :, -1, -3]).max(axis=-1))
    score = np.asarray(jnp.abs(p[:, 0, :, -1, -3] - p[:, 1, :, -1, -3]).max(axis=-1))
    mixed, unmixed = (np.asarray(jax.jit(run)(tree, pair)[0][:, -1]) for tree in (params, alone))
    moved, still = float(abs(mixed[0] - mixed[1]).max()), float(abs(unmixed[0] - unmixed[1]).max())
    by_layer = ", ".join(f"{value:.2e}" for value in gap)
    return Claim(
        "C4",
        "the score of one token pair, and what 'mat' becomes, depend on the context",
        f"'m' from 't' in two sentences: score differs by {score.max():.2e}; logit by {by_layer} "
        f"in layers 1.. (layer 1 has seen no context yet); 'mat' logits move by {moved:.2f}, "
        f"MLP only by {still:g}",
        bool((score > 0).all() and moved > 0 and still == 0 and (gap[1:] > gap[0]).all())
        if len(gap) > 1
        else None,
    )


def c5(params: Any, static: Any, inputs: jax.Array, run: Run) -> Claim:
    """Derived, not learned: no leaf is a score; Wq and Wk get the gradient."""
    changed = inputs.at[:, 0].set((inputs[:, 0] + 1) % data.VOCABULARY)
    p, q = (attention_maps(run, params, tokens)[1] for tokens in (inputs, changed))
    moved = float(jnp.abs(p - q).max())
    names = [str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    scores = [name for name in names if {"T", "S"} & set(axes(name))]
    learned = [
        str(path[-1].key)
        for path, _ in jax.tree_util.tree_leaves_with_path(static)
        if {"T", "S"} & set(axes(str(path[-1].key)))
    ]

    def loss(params: Any) -> jax.Array:
        return jnp.mean(jax.nn.logsumexp(run(params, inputs)[0], axis=-1))

    grads = jax.jit(jax.grad(loss))(params)["layers"]["attention"]
    norms = {name: float(jnp.linalg.norm(grads[name])) for name in ("wq_DNH", "wk_DKH")}
    return Claim(
        "C5",
        "scores are derived, not learned: the gradient reaches Wq and Wk, no leaf is a score",
        f"first token changed, parameters untouched: a score moves by {moved:.2f}; leaves over "
        f"positions: {', '.join(scores) or 'none'} (static mixer: {', '.join(learned) or 'none'}); "
        f"gradient norm Wq {norms['wq_DNH']:.1e}, Wk {norms['wk_DKH']:.1e}",
        moved > 0 and not scores and bool(learned) and min(norms.values()) > 0,
    )


def c6() -> Claim:
    """The shapes and counts of the founding example."""
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: init_attention(key, D=768, N=12))
    feed = jax.eval_shape(lambda: init_mlp(key, D=768, F=3072))
    x_BTD = jax.ShapeDtypeStruct((4, 256, 768), jnp.float32)
    y_BTD = jax.eval_shape(partial(attention, mask=causal()), params, x_BTD)
    z_BTD = jax.eval_shape(mlp, feed, y_BTD)
    return Claim(
        "C6",
        "(4, 256, 768) -> (4, 256, 768) by four matrices of 768 x 768; MLP 768 -> 3072 -> 768",
        f"attention {y_BTD.shape}, {count(params):,} parameters; "
        f"MLP {z_BTD.shape}, {count(feed):,}",
        y_BTD.shape == z_BTD.shape == x_BTD.shape
        and all(leaf.size == 768**2 for leaf in params.values())
        and count(feed) == 2 * 768 * 3072,
    )


def c7(cfg: Any) -> Claim:
    """Each part has its own random init: swap one, the other stays bit-equal."""
    D = cfg.D
    heads, feed = partial(init_attention, D=D, N=cfg.N), partial(init_mlp, D=D, F=cfg.F)

    # One key for the block in all three; only one part's initialiser is exchanged.
    def swapped_init(init: Any) -> Any:
        return lambda key: init(jax.random.fold_in(key, 1))

    layer = partial(init_block, jax.random.key(0), D)
    base = layer(attention=heads, mlp=feed)
    other_mlp = layer(attention=heads, mlp=swapped_init(feed))
    other_attention = layer(attention=swapped_init(heads), mlp=feed)
    x_BTD = jax.random.normal(jax.random.key(0), (2, 13, D))

    @jax.jit
    def handed_on(params: Any) -> jax.Array:
        mixing = {name: leaf for name, leaf in params.items() if name.startswith("attention")}
        return block(mixing, x_BTD)[0]

    y, y_other = handed_on(base), handed_on(other_mlp)
    output = bool((y == y_other).all())
    weights = all(bool((base["mlp"][k] == other_attention["mlp"][k]).all()) for k in base["mlp"])
    swapped = not bool((base["mlp"]["w_in_DF"] == other_mlp["mlp"]["w_in_DF"]).all())
    swapped &= not bool(
        (base["attention"]["wq_DNH"] == other_attention["attention"]["wq_DNH"]).all()
    )
    return Claim(
        "C7",
        "attention hands on an output, not weights; each part has its own random init",
        f"MLP's init swapped: attention's output {'bit-equal' if output else 'differs'}; "
        f"attention's init swapped: MLP's weights {'bit-equal' if weights else 'differ'}",
        output and weights and swapped,
    )


def c8(trained: dict[str, Any]) -> Claim:
    """Both learn together: norms at every step, and the price of freezing either."""
    least = {
        f"{norm}/{part}": min(float(row[f"{norm}/{part}"].min()) for row in rows)
        for rows in [trained["both"].history.train]
        for norm in ("grad_norm", "update_norm")
        for part in ("attention", "mlp")
    }
    cost = {
        part: trained[f"frozen_{part}"].bits - trained["both"].bits for part in ("attention", "mlp")
    }
    spelled = ", ".join(f"{name} {value:.1e}" for name, value in least.items())
    return Claim(
        "C8",
        "both learn together from step 1, and freezing either one costs loss",
        f"least over all steps and seeds: {spelled}; frozen attention costs "
        f"{interval(cost['attention'])}, frozen MLP {interval(cost['mlp'])} bits per byte",
        min(least.values()) > 0 and larger(*cost.values()),
    )


def c9(params: Any, alone: Any, inputs: jax.Array, run: Run) -> Claim:
    """Without attention "mat" is processed on its own; with it, it knows what stands before."""
    t = inputs.shape[1] * 2 // 3
    other = inputs.at[:, :t].set((inputs[:, :t] + 1) % data.VOCABULARY)
    here, there = (jax.jit(run)(alone, tokens)[0][:, t] for tokens in (inputs, other))
    still = bool((here == there).all())

    options = run.keywords

    # From the embedding on: the gradient is told apart by position, not by token.
    def logit(x_BTD: jax.Array) -> jax.Array:
        x_BTD, _ = stack(params["layers"], x_BTD, **options)
        return jnp.sum(jnp.square(norm(params["norm"], x_BTD)[:, t] @ params["embed_VD"].T))

    gradient_BTD = jax.jit(jax.grad(logit))(params["embed_VD"][inputs])
    norms = np.asarray(jnp.linalg.norm(gradient_BTD, axis=-1))
    before, after = float(norms[:, :t].min()), float(norms[:, t + 1 :].max())
    return Claim(
        "C9",
        "MLP only: 'mat' is bit-equal under any prefix; with attention it depends on all before",
        f"MLP only under another prefix: {'bit-equal' if still else 'differs'}; with attention "
        f"the least gradient to a token before is {before:.1e}, the largest to a later {after:g}",
        still and before > 0 and after == 0.0,
    )


def c10(trained: dict[str, Any]) -> Claim:
    """Together more than either alone, at equal parameters and paired seeds."""
    gaps = {
        name: trained[name].bits - trained["both"].bits for name in ("attention", "mlp", "static")
    }
    spelled = "; ".join(f"{trained[name].title} {interval(gap)}" for name, gap in gaps.items())
    return Claim(
        "C10",
        "attention and MLP together do more than either alone, at equal parameter count",
        f"extra bits per byte against attention → MLP, same seeds: {spelled}",
        larger(*gaps.values()),
    )


def larger(*gaps: np.ndarray) -> bool | None:
    """Say whether every gap is above 0 for each seed, and on average above its own spread.

    Less than three seeds show no spread: a gap of the right sign then decides nothing.
    """
    if not all((gap > 0).all() for gap in gaps):
        return False
    return all(bool(gap.mean() > np.ptp(gap)) for gap in gaps) if gaps[0].size >= 3 else None


def interval(values: np.ndarray) -> str:
    """Spell mean [min, max]."""
    return f"{values.mean():+.3f} [{values.min():+.3f}, {values.max():+.3f}]"
