"""Wrong arguments raise ValueError with a message that says which, and what was wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_attn as a
from jax_attn import rope, train
from tests.bad_input_cases import (
    ATTENTION,
    BLOCK,
    CACHE,
    FREE,
    GATED,
    HELD,
    INIT,
    KEY,
    LAYER,
    LAYERS,
    MIXER,
    MLP,
    MODEL,
    MOE,
    TOKEN,
    Entry,
    K,
    Q,
    V,
    X,
    assert_named,
    call,
    every_entry,
    i,
    public,
    tables,
    tree,
    without,
    x,
)

dot = a.dot_product_attention
attend = a.attention
BAD: list[Entry] = [
    # dot_product_attention
    (call(dot, Q[0], K, V), r"q_BTNH needs rank 4, one axis for each of B T N H, .*rank 3"),
    (call(dot, Q, K[..., :5], V), r"k_BSKH has H=5 but q_BTNH has H=7"),
    (call(dot, Q, K[:1], V), r"k_BSKH has B=1 but q_BTNH has B=2"),
    (call(dot, Q, K, V[:, :4]), r"v_BSKE has S=4 but k_BSKH has S=11"),
    (call(dot, Q, K, V[:, :, :1]), r"v_BSKE has K=1 but k_BSKH has K=3"),
    (call(dot, Q, K[:, :, :2], V[:, :, :2]), r"q_BTNH has N=3, no multiple of K=2 of k_BSKH"),
    (call(dot, Q.astype(int), K, V), r"q_BTNH must be floating point, got int64"),
    (call(dot, Q, K.astype(complex), V), r"k_BSKH must be floating point, got complex"),
    (call(dot, Q.tolist(), K, V), r"q_BTNH must be an array with axes BTNH, got list"),
    (call(dot, Q, K, V, mask=x(2, 3, 5, 11)), r"mask_BNTS must be bool, .* got float32"),
    (call(dot, Q, K, V, mask=x(5, 11, dtype=bool)), r"mask_BNTS needs rank 4.* rank 2"),
    (call(dot, Q, K, V, mask=x(2, 3, 5, 4, dtype=bool)), r"mask_BNTS has S=4.*S=11"),
    (call(dot, Q, K, V, mask="causal"), r"mask must be a mask .* got str"),
    (call(dot, Q, K, V, mask=a.lengths(kv_B=i(3))), r"kv_B has B=3.*B=2"),
    (call(dot, Q, K, V, mask=a.segments(i(2, 5))), r"kv_ids_BS has S=5.*S=11"),
    (call(dot, Q, K, V, mask=~(a.causal() & a.prefix(i(7)))), r"n_B has B=7.*B=2"),
    (call(dot, Q, K, V, bias_BNTS=x(2, 5, 11)), r"bias_BNTS needs rank 4.* rank 3"),
    (call(dot, Q, K, V, bias_BNTS=x(1, 2, 5, 11)), r"bias_BNTS has N=2.*N=3"),
    (call(dot, Q, K, V, bias_BNTS=i(1, 1, 5, 11)), r"bias_BNTS must be floating point, got int32"),
    (call(dot, Q, K, V, sinks_N=x(2)), r"sinks_N has N=2 but q_BTNH has N=3"),
    (call(dot, Q, K, V, sinks_N=i(3)), r"sinks_N must be floating point"),
    (call(dot, Q, K, V, score=3), r"score must be a function \(logits, b, n, t, s\), got 3"),
    (call(dot, Q, K, V, score=lambda s, b, n, t, at: s[0]), r"score must return logits .*\(3, 5"),
    (
        call(dot, Q, K, V, score=lambda s, b, n, t, at: 1.0),
        r"score must return logits of the shape",
    ),
    (call(dot, Q, K, V, scale=x(3)), r"scale must be a real scalar, got shape \(3,\)"),
    (call(dot, Q, K, V, scale="small"), r"scale must be a real scalar, got 'small'"),
    (call(dot, Q, K, V, softcap=0.0), r"softcap must be > 0 or None, got 0.0"),
    (call(dot, Q, K, V, softcap=float("nan")), r"softcap must be a finite number, got nan"),
    (call(dot, Q, K, V, softcap=x(3)), r"softcap must be a real scalar, got shape \(3,\)"),
    (call(dot, Q, K, V, q_offset=1.0), r"q_offset must be an int, got 1.0"),
    (call(dot, Q, K, V, q_offset=i(2)), r"q_offset must be a scalar, got shape \(2,\)"),
    (call(dot, Q, K, V, q_offset="1"), r"q_offset must be an int, got '1'"),
    (call(dot, Q, K, V, dropout_rate=1.0), r"dropout_rate must be a number in \[0, 1\), got 1.0"),
    (call(dot, Q, K, V, dropout_rate=-0.1), r"dropout_rate must be a number in \[0, 1\)"),
    (call(dot, Q, K, V, dropout_rate="0"), r"dropout_rate must be a number in \[0, 1\), got '0'"),
    (call(dot, Q, K, V, dropout_rate=0.5), r"dropout_rate=0.5 needs a dropout_key"),
    (call(dot, Q, K, V, dropout_rate=0.5, dropout_key=3), r"dropout_key must be one jax.random"),
    (
        call(dot, Q, K, V, dropout_rate=0.5, dropout_key=jax.random.split(KEY, 3)),
        r"dropout_key must be one jax.random key, got shape \(3,\)",
    ),
    (call(dot, Q, K, V, implementation="fast"), r"implementation must be .*'dense'.* got 'fast'"),
    (call(a.explain, Q, K[..., :5], V), r"k_BSKH has H=5 but q_BTNH has H=7"),
    (call(a.explain, Q, K, V, implementation="flash"), r"None or one of 'dense', .* got 'flash'"),
    (call(a.dense_weights, Q, K[..., 1:]), r"k_BSKH has H=6 but q_BTNH has H=7"),
    (call(a.dense_weights, Q, K, scale=x(2, 2)), r"scale must be a real scalar"),
    (call(a.dense_weights, Q, K, mask=a.dense(x(1, 1, 9, 11, dtype=bool))), r"T=9.*T=5"),
    # alibi
    (call(a.alibi, x(3, 1)), r"slopes_N needs rank 1"),
    (call(a.alibi, i(3)), r"slopes_N must be floating point"),
    (call(dot, Q, K, V, score=a.alibi(jnp.ones(5))), r"slopes_N has N=5 but q_BTNH has N=3"),
    (call(a.alibi_slopes, 0), r"N must be an int >= 1, got 0"),
    (call(a.alibi_slopes, 2.0), r"N must be an int >= 1, got 2.0"),
    # masks
    (call(a.window, -1), r"left must be an int >= 0 or None, got -1"),
    (call(a.window, 1, 2.0), r"right must be an int >= 0 or None, got 2.0"),
    (call(a.window, True), r"left must be an int >= 0"),
    (call(a.prefix, 1.5), r"prefix: n must be an int or an int array \[B\], got 1.5"),
    (call(a.prefix, i(2, 2)), r"n_B needs rank 1"),
    (call(a.chunks, 0), r"n must be an int >= 1, got 0"),
    (call(a.segments, i(5)), r"q_ids_BT needs rank 2"),
    (call(a.segments, x(2, 5)), r"q_ids_BT must be integers, got float32"),
    (call(a.segments, i(2, 5), [1, 2]), r"kv_ids_BS must be an array .* got list"),
    (call(a.lengths), r"give q_B, kv_B or both"),
    (call(a.lengths, x(2)), r"q_B must be integers"),
    (call(a.lengths, kv_B=i(2, 1)), r"kv_B needs rank 1"),
    (call(a.where, 3), r"fn must be a function .* got int"),
    (call(a.where(lambda b, n, t, s: t + s).materialize, 2, 3), r"fn must return bool, got int32"),
    (call(a.where(lambda b, n, t, s: jnp.array(True)).materialize, 2, 3), r"must return rank 4"),
    (call(a.dense, i(1, 1, 2, 3)), r"mask_BNTS must be bool, .* use mask.astype\(bool\)"),
    (call(a.dense, x(1, 1, 2, 3)), r"mask_BNTS must be bool, .* bias_BNTS"),
    (call(lambda: a.causal() and a.window(3)), r"combine masks with &, \|, ~"),
    (call(a.dense, x(2, 3, dtype=bool)), r"mask_BNTS needs rank 4"),
    (call(lambda: a.causal() & x(2, 3, dtype=bool)), r"wrap a bool array in dense\(\)"),
    (call(a.causal().classify, (2, 2), (0, 1)), r"t_range needs 0 <= first < end, got \(2, 2\)"),
    # attention
    (call(a.init_attention, KEY, 7, 2), r"N=2 must divide D=7"),
    (call(a.init_attention, KEY, 8, 4, K=3), r"N=4 .* must be a multiple of K=3"),
    (call(a.init_attention, KEY, 8, 4, K=0), r"must be a multiple of K=0"),
    (call(a.init_attention, KEY, 8, 4, E=0), r"E .* must be an int >= 1, got 0"),
    (call(a.init_attention, KEY, 0, 1), r"D .* must be an int >= 1, got 0"),
    (call(a.init_attention, KEY, 8, 4, dtype=jnp.int32), r"dtype must be floating point"),
    (call(attend, ATTENTION, X[0]), r"x_BTD needs rank 3"),
    (call(attend, ATTENTION, x(2, 5, 8)), r"wq_DNH has D=6 but x_BTD has D=8"),
    (call(attend, ATTENTION, X.astype(int)), r"x_BTD must be floating point"),
    (call(attend, without(ATTENTION, "wo_NED"), X), r"leaf 'wo_NED' is missing"),
    (
        call(attend, ATTENTION | tree(bq_HN=(3, 2)), X),
        r"leaf 'bq_HN', did you mean 'bq_NH'",
    ),
    (call(attend, ATTENTION | tree(wk_DKH=(6, 1, 3)), X), r"wk_DKH has H=3 but wq_DNH has H=2"),
    (call(attend, ATTENTION | {"wk_DKH": i(6, 1, 2)}, X), r"wk_DKH must be floating point"),
    (call(attend, [1], X), r"params must be a dict of leaves, got list"),
    (call(attend, ATTENTION, X, kv_BSD=x(3, 4, 6)), r"kv_BSD has B=3 but x_BTD has B=2"),
    (call(attend, ATTENTION, X, kv_BSD=x(2, 4, 5)), r"kv_BSD has D=5 but x_BTD has D=6"),
    (call(attend, ATTENTION, X, rope=rope.plain(4)), r"frequency_H has H=4 but x_BTNH has H=2"),
    (call(attend, ATTENTION, X, cache=tree(k_BSKH=(2, 4, 1, 2))), r"leaf 'v_BSKE' is missing"),
    (call(attend, ATTENTION, X, cache=CACHE), r"k_BSKH has S=4, too short for q_offset=0 \+ T=5"),
    (call(attend, ATTENTION, X[:1, :1], cache=CACHE), r"cache k_BSKH has shape \(2, 4, 1, 2\)"),
    (call(attend, ATTENTION, X, cache=CACHE, kv_BSD=X), r"cache with kv_BSD"),
    (call(attend, ATTENTION, X, implementation="ring"), r"implementation must be .* got 'ring'"),
    (
        call(attend, ATTENTION, X, rope=rope.plain(2), position_BT=i(2, 4)),
        r"position_BT has shape \(2, 4\) but x_BTNH has B=2, T=5",
    ),
    (
        call(attend, ATTENTION, X, kv_BSD=X, rope=rope.plain(2), position_BT=i(2, 5)),
        r"position_BT with kv_BSD",
    ),
    (call(a.project_qkv, ATTENTION, X, x(2, 5)), r"kv_BSD needs rank 3"),
    (call(a.project_qkv, without(ATTENTION, "wq_DNH"), X), r"leaf 'wq_DNH' is missing"),
    # rope
    (call(rope.plain, 5), r"H must be an even int >= 2, got 5"),
    (call(rope.plain, 4, theta=1.0), r"theta must be > 1"),
    (call(rope.linear, 4, factor=0.5), r"factor must be >= 1"),
    (call(rope.llama3, 4, low=4.0, high=1.0), r"needs 0 < low < high"),
    (call(rope.yarn, 4, factor=2.0, original=0), r"original must be >= 1"),
    (call(rope.yarn, 4, factor=2.0, original=9, fast=1.0), r"needs 0 < slow < fast"),
    (call(a.rotate, Q, rope.plain(4), i(2, 5)), r"frequency_H has H=4 but x_BTNH has H=7"),
    (call(a.rotate, x(2, 5, 3, 4), rope.plain(4), i(5)), r"position_BT needs rank 2"),
    (call(a.rotate, x(2, 5, 3, 4), rope.plain(4), i(3, 5)), r"position_BT has shape \(3, 5\)"),
    # feed-forward
    (call(a.init_mlp, KEY, 6, 0), r"F .* must be an int >= 1, got 0"),
    (call(a.mlp, MLP, X[0]), r"x_BTD needs rank 3"),
    (call(a.mlp, MLP, x(2, 5, 7)), r"w_in_DF has D=6 but x_BTD has D=7"),
    (call(a.mlp, MLP, X, activation="tanh"), r"activation must be one of relu, .* got 'tanh'"),
    (call(a.mlp, MLP | tree(b_inF=(24,)), X), r"unknown leaf 'b_inF', did you mean 'b_in_F'"),
    (call(a.mlp, without(MLP, "w_in_DF"), X), r"leaf 'w_in_DF' is missing"),
    (call(a.mlp, MLP, i(2, 5, 6)), r"x_BTD must be floating point, got int32"),
    (call(a.init_gated_mlp, KEY, -6, 8), r"D .* must be an int >= 1, got -6"),
    (call(a.gated_mlp, MLP, X), r"leaf 'w_gate_DF' is missing"),
    (call(a.gated_mlp, GATED, X, activation="swish"), r"activation must be one of"),
    (call(a.gated_mlp, GATED | tree(w_out_FD=(23, 6)), X), r"w_out_FD has F=23 but .* has F=24"),
    (call(a.init_moe, KEY, 6, 8, 0), r"X .* must be an int >= 1, got 0"),
    (call(a.moe, MOE, X, k=5), r"k must be an int from 1 to X=4 experts, got 5"),
    (call(a.moe, MOE, X, k=0), r"k must be an int from 1 to X=4"),
    (call(a.moe, MOE, X, k=1.0), r"k must be an int from 1 to X=4"),
    (call(a.moe, MOE, X, activation="none"), r"activation must be one of"),
    (call(a.moe, MOE | tree(router_DX=(6, 5)), X), r"w_in_XDF has X=4 but router_DX has X=5"),
    (call(a.moe, MOE, x(2, 6)), r"x_BTD needs rank 3"),
    # linear attention
    (call(a.linear_attention, Q, K, V[:, :, :1]), r"v_BSKE has K=1 but k_BSKH has K="),
    (call(a.linear_attention, Q, K, V, causal=True), r"causal needs T = S: .*T=5, .*S=11"),
    (call(a.linear_attention, Q, K, V, block=0), r"block must be an int >= 1, got 0"),
    (call(a.linear_attention, Q, i(2, 11, 3, 4), V), r"k_BSKH"),
    (call(a.dpfp, X, nu=0), r"nu must be an int from 1 to 11, got 0"),
    (call(a.dpfp, X, nu=12), r"nu must be an int from 1 to 11, got 12"),
    # static mixers
    (call(a.init_static_mixer, KEY, 7, 2), r"N=2 must divide D=7"),
    (call(a.init_static_mixer, KEY, 6, 0), r"N=0 must divide D=6"),
    (call(a.init_static_mixer, KEY, 6, 2, T=0), r"T .* must be an int >= 1, got 0"),
    (call(a.static_mixer, MIXER, X), r"x_BTD has T=5 but logits_NTS has T=4, S=4"),
    (call(a.static_mixer, FREE, x(2, 5, 7)), r"wv_DNE has D=6 but x_BTD has D=7"),
    (
        call(a.static_mixer, FREE, X, logits_NTS=x(2, 5, 5)),
        r"logits_NTS has N=2 but .* N=3",
    ),
    (call(a.static_mixer, MIXER, X[:, :4], logits_NTS=x(3, 4, 4)), r"both a leaf .* and an option"),
    (call(a.static_mixer, FREE, X, mask=x(1, 3, 5, 5, dtype=bool)), r"mask must come from"),
    (call(a.static_mixer, FREE, X, mask=a.lengths(kv_B=i(2))), r"kv_B has B=2.*B=1"),
    (call(a.static_weights, MIXER, 5), r"T=5 but logits_NTS has T=4"),
    (call(a.static_weights, FREE, 3, logits_NTS=i(3, 4, 4)), r"logits_NTS must be floating point"),
    (call(a.static_weights, FREE, 2.0), r"T must be an int >= 0, got 2.0"),
    (call(a.init_token_mlp, KEY, 0, 4), r"S .* must be an int >= 1, got 0"),
    (call(a.token_mlp, TOKEN, x(2, 4, 6)), r"x_BTD has T=4 but w_in_SF has S=5, w_out_FT T=5"),
    (call(a.token_mlp, TOKEN, x(2, 6, 6), causal=True), r"x_BTD has T=6 but w_in_SF has S=5"),
    (
        call(a.token_mlp, tree(w_in_SF=(5, 7), w_out_FT=(7, 5)), X, causal=True),
        r"w_in_SF has F=7, no multiple of T=5",
    ),
    (call(a.token_mlp, TOKEN, X, activation=None), r"activation must be one of"),
]

BAD += [
    # norms
    (call(a.rms_norm, X, x(5)), r"scale has shape \(5,\) but x ends in \(6,\)"),
    (call(a.rms_norm, i(2, 6), x(6)), r"x must be floating point"),
    (call(a.norm, tree(scale_D=(5,)), X), r"scale_D has D=5 but x_BTD has D=6"),
    (call(a.norm, tree(bias_D=(6,)), X), r"leaf 'scale_D' is missing"),
    (call(a.norm, tree(scale_D=(6,)), x(5, 6)), r"x_BTD needs rank 3"),
    (call(a.init_rms_norm, 0), r"D .* must be an int >= 1, got 0"),
    (call(a.init_layer_norm, 2.0), r"D .* must be an int >= 1, got 2.0"),
    # blocks
    (call(a.init_block, KEY, 6), r"give an initialiser for attention, mixer or mlp"),
    (call(a.init_block, KEY, 0, mlp=INIT), r"D .* must be an int >= 1, got 0"),
    (call(a.init_stack, KEY, 0, LAYER), r"L \(layers\) must be an int >= 1, got 0"),
    (call(a.block, {}, X), r"params has none of the parts attention, mixer, mlp"),
    (call(a.block, BLOCK | {"mpl": MLP}, X), r"unknown leaf 'mpl', did you mean 'mlp'"),
    (call(a.block, BLOCK | {"mixer_norm": {}}, X), r"has 'mixer_norm' but not the part"),
    (call(a.block, BLOCK, x(2, 6)), r"x_BTD needs rank 3"),
    (call(a.block, BLOCK, x(2, 5, 7)), r"scale_D has D=6 but x_BTD has D=7"),
    (call(a.block, BLOCK, X, dropout_rate=0.1), r"dropout_rate=0.1 needs a dropout_key"),
    (call(a.block, BLOCK, X, dropout_rate=1.0, dropout_key=KEY), r"dropout_rate must be a number"),
    (call(a.block, {"mixer": FREE}, X, cache=CACHE), r"static mixer .* cannot use a cache"),
    (call(a.stack, {}, X), r"params is empty"),
    (call(a.stack, LAYERS, X, remat="all"), r"remat must be None or one of full, dots, got 'all'"),
    (call(a.stack, {"mlp": MLP}, X), r"w_out_FD'\] has L=\(24,\) but .*w_in_DF'\] has L=6"),
    (call(a.stack, LAYERS, X.astype(np.float16)), r"x_BTD is float16 but a block returns float32"),
    # language model
    (
        call(a.init_language_model, KEY, V=0, D=6, L=2, layer=LAYER),
        r"V .* must be an int >= 1, got 0",
    ),
    (call(a.init_language_model, KEY, V=5, D=6, L=0, layer=LAYER), r"L \(layers\) must be an int"),
    (call(a.init_language_model, KEY, V=5, D=6, L=1, T=0, layer=LAYER), r"T .* must be an int"),
    (call(a.language_model, MODEL, x(2, 5)), r"tokens_BT must be integers, got float32"),
    (call(a.language_model, MODEL, i(5)), r"tokens_BT needs rank 2"),
    (call(a.language_model, without(MODEL, "layers"), i(2, 5)), r"leaf 'layers' is missing"),
    (call(a.language_model, MODEL | tree(head_VD=(11, 6)), i(2, 5)), r"did you mean 'head_DV'"),
    (call(a.language_model, MODEL | tree(head_DV=(6, 9)), i(2, 5)), r"head_DV has V=9 .* V=11"),
    (call(a.language_model, MODEL | tree(position_TD=(4, 6)), i(2, 5)), r"T=5 but .* has T=4"),
    (call(a.language_model, MODEL | tree(position_TD=(9, 5)), i(2, 5)), r"position_TD has D=5"),
    (call(a.language_model, MODEL, i(2, 5), remat="some"), r"remat must be None or one of"),
    # decoding
    (call(a.init_cache, MODEL, 0, 4), r"B must be an int >= 1, got 0"),
    (call(a.init_cache, MODEL, 1, 4.0), r"S must be an int >= 1, got 4.0"),
    (call(a.init_cache, {"layers": LAYERS}, 1, 4), r"has no 'attention', nothing to cache"),
    (call(a.extend, MODEL, i(2, 5), HELD), r"tokens_BT has T=5 but the cache has S=4"),
    (call(a.extend, MODEL, i(3, 2), HELD), r"cache k_BSKH has shape \(2, 4, 1, 2\), new .*\(3, 2"),
    (call(a.extend, MODEL, i(5), HELD), r"tokens_BT needs rank 2"),
    (call(a.sample, KEY, x(5)), r"logits_BV needs rank 2"),
    (call(a.sample, None, x(2, 5)), r"temperature=1.0 needs a key"),
    (call(a.sample, KEY, x(2, 5), temperature=-1.0), r"temperature must be a number >= 0"),
    (call(a.sample, KEY, x(2, 5), temperature=float("nan")), r"temperature must be a number >= 0"),
    (call(a.sample, KEY, x(2, 5), top_k=6), r"top_k must be an int from 1 to V=5, got 6"),
    (call(a.sample, KEY, x(2, 5), top_k=0), r"top_k must be an int from 1 to V=5, got 0"),
    (call(a.sample, KEY, x(2, 5), top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
    (call(a.sample, KEY, x(2, 5), top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
    (call(a.sample, KEY, i(2, 5)), r"logits_BV must be floating point, got int32"),
    (call(a.generate, MODEL, i(2, 3), steps=0, key=KEY), r"steps must be an int >= 1, got 0"),
    (call(a.generate, MODEL, i(2, 3), steps=2), r"temperature=1.0 needs a key"),
    (call(a.generate, MODEL, i(2, 3), steps=2, key=KEY, top_k=12), r"from 1 to V=11, got 12"),
    (call(a.generate, MODEL, i(2, 3), steps=2, key=KEY, top_p=-0.1), r"top_p must be in \(0, 1\]"),
    (call(a.generate, MODEL, i(2, 3), steps=2, temperature="0"), r"temperature must be a number"),
    (call(a.generate, MODEL, i(2, 0), steps=2, key=KEY), r"prompt_BT has T=0"),
    (call(a.generate, MODEL, x(2, 3), steps=2, key=KEY), r"prompt_BT must be integers"),
    (call(a.generate, {}, i(2, 3), steps=2, key=KEY), r"leaf 'embed_VD' is missing"),
    # names, leaves
    (call(a.dims, x_BTD=x(2, 3)), r"x_BTD needs rank 3, .* B T D, but has rank 2: shape \(2, 3\)"),
    (call(a.dims, x_BTD=x(2, 3, 5), y_BD=x(2, 6)), r"y_BD has D=6 but x_BTD has D=5"),
    (call(a.dims, x=x(2)), r"x has no axis suffix"),
    (call(a.Sizes(B=2).__setattr__, "B", 3), r"B=3 but B=2 is known already"),
    (call(a.spec, "BZ", {}), r"unknown axis letter 'Z'"),
    (call(a.spec, "DF", {"D": "model", "F": "model"}), r"'model' would shard both D and F of DF"),
    (call(a.draw, KEY, {"w_DF": jnp.ones}, {"D": 2}), r"w_DF needs a size for F"),
    (call(a.check_leaves, "mlp", {"w": 1}, ["w_D"]), r"mlp: unknown leaf 'w'"),
    # training
    (call(train.next_token_loss, x(2, 3, 5), i(2, 4)), r"targets_BT has T=4 .* T=3"),
    (call(train.next_token_loss, x(2, 3, 5), x(2, 3)), r"targets_BT must be integers"),
]


@tables(*BAD)
def test_wrong_argument_is_named(entry: Entry) -> None:
    assert_named(entry)


# No argument to get wrong, or no claim about one: types, a count, letters of any text.
UNCHECKED = {"Explanation", "Mask", "Rope", "Routing", "Sizes", "intervene.Edit"}
UNCHECKED |= {"axes", "causal", "count", "strict", "Processes"}
UNCHECKED |= {"train.keep_memory", "train.stop_requests"}
# tests/bad_input_sharding_test.py has theirs, raised by what they return or under a mesh.
UNCHECKED |= {"shard_step", "whole_width"}
# tests/train_guard_test.py, checkpoint_test.py and train_watch_test.py have theirs, and loops too.
UNCHECKED |= {"train.Checkpoints", "train.Diverged", "train.Guard", "train.History", "train.Run"}
UNCHECKED |= {"train.Stopped", "train.TrainState", "train.average_params", "train.averaged"}
UNCHECKED |= {"train.bits_per_byte", "train.compute_in", "train.digest", "train.fit"}
UNCHECKED |= {"train.freeze", "train.init_state", "train.make_train_step", "train.scale_rates"}
UNCHECKED |= {"train.tensorboard", "train.DIVERGED", "train.STOPPED", "train.UNSAVED"}
UNCHECKED |= {"train.NotSaved", "view.plot_curves"}
# tests/view_test.py has their bad inputs, of many arguments at once.
UNCHECKED |= {"view.attention_html", "view.plot_heads", "view.plot_statistic_over_training"}


def test_every_public_function_is_in_the_table() -> None:
    tried = [entry[0][0] for entry in every_entry()]
    missing = {name for name, value in public() if not any(value is fn for fn in tried)}
    unknown = sorted(missing - UNCHECKED)
    assert not unknown, f"no bad input is tried on {', '.join(unknown)}"
    assert not UNCHECKED - missing
    assert {"attention", "intervene.zero", "control.qk_clip"} <= dict(public()).keys()


def test_what_the_table_checks() -> None:
    def wrong(message: str) -> None:
        raise ValueError(message)

    assert_named((call(wrong, "x has B=2"), "B=2"))
    for entry in (
        (call(wrong, "x has B=2"), "B=3"),
        (call(wrong, "x\nhas B=2"), "B=2"),
        (call(wrong, "B=2" * 99), "B=2"),
    ):
        with pytest.raises(AssertionError):
            assert_named(entry)
