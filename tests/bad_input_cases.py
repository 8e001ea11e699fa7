"""Arguments for the tables of bad inputs, each fine by itself, and how an entry is called."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_attn as a

# ((function, arguments, options), pattern of the message)
Entry = tuple[tuple[Any, tuple, dict], str]

KEY = jax.random.key(0)


def x(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def i(*shape: int) -> Any:
    return np.ones(shape, np.int32)


def tree(**leaves: Any) -> dict:
    return {name: x(*leaf) if isinstance(leaf, tuple) else leaf for name, leaf in leaves.items()}


# Two of everything but N = 3, K = 3, D = 6: no two axes of one array could be mistaken.
Q, K, V = x(2, 5, 3, 7), x(2, 11, 3, 7), x(2, 11, 3, 13)
X = x(2, 5, 6)
ATTENTION = tree(wq_DNH=(6, 3, 2), wk_DKH=(6, 1, 2), wv_DKE=(6, 1, 4), wo_NED=(3, 4, 6))
MLP = tree(w_in_DF=(6, 24), w_out_FD=(24, 6))
GATED = MLP | tree(w_gate_DF=(6, 24))
MOE = tree(router_DX=(6, 4), w_in_XDF=(4, 6, 8), w_out_XFD=(4, 8, 6))
MIXER = tree(wv_DNE=(6, 3, 2), wo_NED=(3, 2, 6), logits_NTS=(3, 4, 4))
FREE = tree(wv_DNE=(6, 3, 2), wo_NED=(3, 2, 6))
TOKEN = tree(w_in_SF=(5, 10), w_out_FT=(10, 5))
BLOCK: dict = {"mlp": MLP, "mlp_norm": tree(scale_D=(6,))}
LAYERS: dict = {"mlp": tree(w_in_DF=(2, 6, 24), w_out_FD=(2, 24, 6))}
HEADS = tree(wq_DNH=(2, 6, 3, 2), wk_DKH=(2, 6, 1, 2), wv_DKE=(2, 6, 1, 4), wo_NED=(2, 3, 4, 6))
MODEL: dict = {"embed_VD": x(11, 6), "layers": {"attention": HEADS}}
CACHE: dict = {"k_BSKH": x(2, 4, 1, 2), "v_BSKE": x(2, 4, 1, 4)}
HELD: dict = {
    "layers": {"k_BSKH": x(2, 2, 4, 1, 2), "v_BSKE": x(2, 2, 4, 1, 4)},
    "length": jnp.int32(0),
}
INIT = partial(a.init_mlp, D=6, F=8)
LAYER = partial(a.init_block, D=6, mlp=INIT)


def without(params: dict, name: str) -> dict:
    return {key: leaf for key, leaf in params.items() if key != name}


def call(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, tuple, dict]:
    return fn, args, options


def public() -> Iterator[tuple[str, Any]]:
    """Public functions and classes by name, those of public modules as module.name."""
    for name in a.__all__:
        value = getattr(a, name)
        if isinstance(value, ModuleType):
            for inner in getattr(value, "__all__", ()):
                if getattr(a, inner, None) is not getattr(value, inner):
                    yield f"{name}.{inner}", getattr(value, inner)
        elif callable(value):
            yield name, value


def every_entry() -> Iterator[Entry]:
    """The entries of all tables: `BAD` in each file bad_input*_test.py."""
    for path in sorted(Path(__file__).parent.glob("bad_input*_test.py")):
        yield from importlib.import_module(f"tests.{path.stem}").BAD


def tables(*entries: Entry) -> Any:
    """Parametrize a test over entries, named for what they call."""

    def called(entry: Entry) -> str:
        names = (name for name, value in public() if value is entry[0][0])
        return next(names, getattr(entry[0][0], "__name__", "partial"))

    ids = [f"{called(entry)}-{index}" for index, entry in enumerate(entries)]
    return pytest.mark.parametrize("entry", entries, ids=ids)


def assert_named(entry: Entry) -> None:
    """Fail unless the call raises the ValueError, in one sentence for a person."""
    (fn, args, options), message = entry
    with pytest.raises(ValueError, match=message) as caught:
        fn(*args, **options)
    text = str(caught.value)
    assert "\n" not in text, text
    assert len(text) < 250, text
