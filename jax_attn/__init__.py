"""Attention and MLP blocks as pure functions, made to be measured."""

__version__ = "0.1.0"

from jax_attn import (
    attribution,
    control,
    data,
    intervene,
    masks,
    readers,
    rope,
    softmax,
    train,
    view,
)
from jax_attn.alibi import alibi, alibi_slopes
from jax_attn.attention import attention, init_attention, project_qkv
from jax_attn.block import block, init_block, init_stack, stack
from jax_attn.bootstrap import Processes, bootstrap
from jax_attn.context import context_attention, zigzag_order
from jax_attn.data_parallel import data_parallel
from jax_attn.decode import extend, generate, init_cache, sample
from jax_attn.dispatch import Explanation, explain, strict
from jax_attn.dot_product import dense_weights, dot_product_attention
from jax_attn.language_model import init_language_model, language_model
from jax_attn.linear_attention import dpfp, linear_attention
from jax_attn.masks import (
    Mask,
    causal,
    chunks,
    dense,
    lengths,
    prefix,
    segments,
    where,
    window,
)
from jax_attn.mesh import make_mesh, read_mesh
from jax_attn.mixing import (
    init_static_mixer,
    init_token_mlp,
    static_mixer,
    static_weights,
    token_mlp,
)
from jax_attn.mlp import gated_mlp, init_gated_mlp, init_mlp, mlp
from jax_attn.moe import Routing, init_moe, moe
from jax_attn.norm import init_layer_norm, init_rms_norm, norm, rms_norm
from jax_attn.observe import head_summary, mean_of, window_mass
from jax_attn.params import check_leaves, count, draw
from jax_attn.rope import Rope, rotate
from jax_attn.shapes import ALPHABET, Sizes, axes, dims, spec
from jax_attn.sharding import (
    ACTIVATIONS,
    PARAMS,
    global_batch,
    shard_init,
    shard_step,
    specs,
    whole_width,
)

__all__ = [
    "ACTIVATIONS",
    "ALPHABET",
    "PARAMS",
    "Explanation",
    "Mask",
    "Processes",
    "Rope",
    "Routing",
    "Sizes",
    "alibi",
    "alibi_slopes",
    "attention",
    "attribution",
    "axes",
    "block",
    "bootstrap",
    "causal",
    "check_leaves",
    "chunks",
    "context_attention",
    "control",
    "count",
    "data",
    "data_parallel",
    "dense",
    "dense_weights",
    "dims",
    "dot_product_attention",
    "dpfp",
    "draw",
    "explain",
    "extend",
    "gated_mlp",
    "generate",
    "global_batch",
    "head_summary",
    "init_attention",
    "init_block",
    "init_cache",
    "init_gated_mlp",
    "init_language_model",
    "init_layer_norm",
    "init_mlp",
    "init_moe",
    "init_rms_norm",
    "init_stack",
    "init_static_mixer",
    "init_token_mlp",
    "intervene",
    "language_model",
    "lengths",
    "linear_attention",
    "make_mesh",
    "masks",
    "mean_of",
    "mlp",
    "moe",
    "norm",
    "prefix",
    "project_qkv",
    "read_mesh",
    "readers",
    "rms_norm",
    "rope",
    "rotate",
    "sample",
    "segments",
    "shard_init",
    "shard_step",
    "softmax",
    "spec",
    "specs",
    "stack",
    "static_mixer",
    "static_weights",
    "strict",
    "token_mlp",
    "train",
    "view",
    "where",
    "whole_width",
    "window",
    "window_mass",
    "zigzag_order",
]
