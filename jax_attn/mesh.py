"""Meshes: devices arranged along four axes, whose sizes are the modes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

MESH_AXES = ("data", "fsdp", "context", "model")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    model: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arrange devices in a mesh that always has all four axes; one of size 1 costs nothing.

    So every table of rules fits every mesh, and a mode is a size, not another program.

    Args:
      data: copies of the model, each with its own rows of the batch.
      fsdp: shares of the model width D that parameters, gradients and the optimizer's state are
        stored in; rows of the batch are split over it too.
      context: shares of the sequence.
      model: shares of heads, hidden width, vocabulary and experts.
      devices: None takes all devices of all processes.
    Returns: a Mesh with axes data, fsdp, context, model, in Auto mode.
    Raises: ValueError naming an axis that is no int >= 1, or both numbers if the product of the
      sizes is not the number of devices.
    Example:
      >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'context': 1, 'model': 1}
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, context, model), strict=True))
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"make_mesh: {name} must be an int >= 1, got {size!r}")
    devices = jax.devices() if devices is None else list(devices)
    if len({device.id for device in devices}) < len(devices):
        raise ValueError(f"make_mesh: devices has a device more than once: {devices}")
    product = math.prod(sizes.values())
    if product != len(devices):
        written = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"make_mesh: {written} is {product} but there are {len(devices)} devices; change a "
            f"size or pass {product} of them as devices"
        )
    # Auto: in Explicit mode, the default, every operation would have to name its output's axes.
    modes = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=modes, devices=devices)


def read_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh that a command line names.

    Args:
      text: sizes such as "data=2,model=4"; "" takes all devices as data.
      devices: as for `make_mesh`.
    Returns: the mesh.
    Raises: ValueError showing what such a text looks like, or from `make_mesh`.
    Example:
      >>> dict(read_mesh("model=1", jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'context': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(MESH_AXES, 1)
    if not text:
        sizes["data"] = len(devices)
    seen: set[str] = set()
    for part in text.split(",") if text else ():
        name, equals, size = part.partition("=")
        if name not in MESH_AXES or name in seen or not equals or not size.isdecimal():
            raise ValueError(
                f"a mesh looks like data=2,fsdp=2,model=2, of {', '.join(MESH_AXES)}, each once; "
                f"got {text!r}"
            )
        seen.add(name)
        sizes[name] = int(size)
    if (product := math.prod(sizes.values())) != len(devices):
        raise ValueError(
            f"a mesh of {text} is {product} but there are {len(devices)} devices; name sizes whose "
            f"product is {len(devices)}, such as data={len(devices)}"
        )
    return make_mesh(
        data=sizes["data"],
        fsdp=sizes["fsdp"],
        context=sizes["context"],
        model=sizes["model"],
        devices=devices,
    )


def require_auto(owner: str, mesh: Mesh | AbstractMesh) -> None:
    """Raise unless the compiler may split along all axes of a mesh.

    Args:
      owner: what to call the caller.
      mesh: the mesh.
    Raises: ValueError naming an axis that is not Auto.
    Example:
      >>> require_auto("example", make_mesh(devices=jax.devices()[:1]))
    """
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind != AxisType.Auto:
            raise ValueError(
                f"{owner}: mesh axis {name!r} is of type {kind.name}, not Auto; use make_mesh, or "
                f"give jax.make_mesh axis_types=(jax.sharding.AxisType.Auto,) for each axis"
            )
