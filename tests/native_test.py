"""The C++ kernel keeps the contract wherever it takes the call, and says why where it does not."""

import os
import pathlib
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from jax_attn import causal, dot_product_attention, explain, lengths
from jax_attn.compile import build
from jax_attn.kernels import native
from tests.attention_cases import Options, check
from tests.attention_contract import AttentionContract
from tests.observe_contract import Observes

INTERVALS = ("causal", "window", "ahead", "prefix_B", "chunks", "segments", "lengths", "packed")


@pytest.fixture(scope="module", autouse=True)
def library():
    """Compile the kernel where there is a compiler; elsewhere there is nothing to test."""
    try:
        path = build()
    except RuntimeError as error:
        if "no C++ compiler" not in str(error):
            raise
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: path)
        yield


class TestNative(AttentionContract, Observes):
    implementation = "native"
    dtypes = ("float32", "bfloat16")
    every_option = Options(softcap=3.0, scale=0.7, sinks=True, q_offset=3)
    everything = Options(softcap=2.0, sinks=True)
    takes_bias_and_score = False
    refuses = True

    @hypothesis.settings(
        max_examples=20, suppress_health_check=[hypothesis.HealthCheck.differing_executors]
    )
    @hypothesis.given(
        shape=st.sampled_from(["mqa", "gqa"]),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        q_offset=st.integers(-2, 12),
        mask=st.sampled_from(INTERVALS),
        seed=st.integers(0, 999),
    )
    def test_any_case(self, shape, dtype, q_offset, mask, seed):
        options = self.every_option._replace(q_offset=q_offset)
        self.check(shape, mask, options, dtype, seed=seed, traced_offset=True)

    @pytest.mark.parametrize("mask", INTERVALS)
    def test_intervals_are_not_refused(self, mask):
        check("native", "gqa", mask, Options(sinks=True, q_offset=2))


def test_two_threads_or_one_give_the_same_bits(tmp_path: pathlib.Path) -> None:
    program = """
import os, sys
os.sched_setaffinity(0, {int(core) for core in sys.argv[1].split(",")})
import hashlib, jax, jax.numpy as jnp
from jax_attn import causal, dot_product_attention
q, k, v = (jax.random.normal(jax.random.key(i), (2, 307, 3, 13)) for i in range(3))
def loss(x):
    return jnp.sin(dot_product_attention(*x, mask=causal(), implementation="native")).sum()
grads = jax.jit(jax.grad(loss))((q, k, v))
print(hashlib.sha256(b"".join(jax.device_get(g).tobytes() for g in grads)).hexdigest())
"""
    cores = sorted(os.sched_getaffinity(0))
    made = []
    for use in (cores, cores[:1]):
        run = subprocess.run(
            [sys.executable, "-c", program, ",".join(map(str, use))],
            env={**os.environ, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        made.append(run.stdout)
    assert made[0] == made[1] != ""


def test_what_it_does_not_take_is_said() -> None:
    x_BTNH = jnp.ones((1, 5, 2, 3))
    bias = jnp.zeros((1, 1, 1, 1))
    with pytest.raises(ValueError, match="implementation='native' does not take bias_BNTS"):
        dot_product_attention(x_BTNH, x_BTNH, x_BTNH, bias_BNTS=bias, implementation="native")
    assert explain(x_BTNH, x_BTNH, x_BTNH, bias_BNTS=bias).chosen != "native"
    assert explain(x_BTNH, x_BTNH, x_BTNH, mask=causal()).chosen == "native"


def test_without_a_library_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(native, "library", lambda: tmp_path / "none.so")
    x_BTNH = jnp.ones((1, 5, 2, 3))
    with pytest.raises(ValueError, match="run python -m jax_attn"):
        dot_product_attention(x_BTNH, x_BTNH, x_BTNH, implementation="native")
    assert explain(x_BTNH, x_BTNH, x_BTNH).chosen != "native"


def test_compile_without_a_compiler_is_one_line(tmp_path: pathlib.Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CXX": ""}
    command = [sys.executable, "-m", "jax_attn.compile"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "error: no C++ compiler: install g++" in run.stderr
    assert "Traceback" not in run.stderr


def test_compile_shows_the_compilers_words(tmp_path: pathlib.Path) -> None:
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho no room for you >&2\nexit 3\n")
    broken.chmod(0o755)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(broken)}
    command = [sys.executable, "-m", "jax_attn.compile"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "no room for you" in run.stderr
    assert not list((tmp_path / "jax_attn").iterdir())


def test_per_shard_gradients_of_what_is_replicated_are_summed() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    q, k, v = (jax.random.normal(jax.random.key(i), (4, 7, 2, 5)) for i in range(3))
    sinks_N = jnp.array([0.3, 0.2])

    def loss(q, k, v, sinks_N, implementation):
        mask = causal() & lengths(kv_B=jnp.array([5]))
        options = {"mask": mask, "sinks_N": sinks_N, "implementation": implementation}
        return jnp.sin(dot_product_attention(q, k, v, **options)).sum()

    def shard(q, k, v, sinks_N):
        return jax.lax.psum(loss(q, k, v, sinks_N, "native"), "data")

    spec = (P("data"), P("data"), P("data"), P())
    sharded = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=P()))
    got = jax.jit(jax.grad(sharded, argnums=(0, 1, 2, 3)))(q, k, v, sinks_N)
    want = jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, sinks_N, "dense")
    for a, b in zip(got, want, strict=True):
        assert jnp.abs(a - b).max() < 8 * 1.2e-7 * jnp.abs(b).max()


def test_a_mapped_call_is_the_calls_one_by_one() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (3, 2, 7, 2, 5)) for i in range(3))

    def attend(q, k, v):
        return dot_product_attention(q, k, v, mask=causal(), implementation="native")

    got = jax.jit(jax.vmap(attend))(q, k, v)
    want = jnp.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    assert (got == want).all()
