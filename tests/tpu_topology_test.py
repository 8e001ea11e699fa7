"""Tests of tpu.topology: names, counts, and agreement with JAX's own table."""

import pytest
from jax._src.pallas.mosaic import tpu_info

from tpu import topology


@pytest.mark.parametrize(
    ("name", "shape", "chips", "devices", "hosts", "accelerator_type", "machine"),
    [
        ("v4-8", "2x2x1", 4, 4, 1, "v4-8", "ct4p-hightpu-4t"),
        ("v5e-1", "1x1", 1, 1, 1, "v5litepod-1", "ct5lp-hightpu-1t"),
        ("v5e-8", "2x4", 8, 8, 1, "v5litepod-8", "ct5lp-hightpu-8t"),
        ("v5litepod-16", "4x4", 16, 16, 4, "v5litepod-16", "ct5lp-hightpu-4t"),
        ("v5p-16", "2x2x2", 8, 8, 2, "v5p-16", "ct5p-hightpu-4t"),
        ("v5p:4x4x12", "4x4x12", 192, 192, 48, "v5p-384", "ct5p-hightpu-4t"),
        ("v6e-256", "16x16", 256, 256, 64, "v6e-256", "ct6e-standard-4t"),
        ("tpu7x-8", "2x2x1", 4, 8, 1, "tpu7x-8", "tpu7x-standard-4t"),
        ("3*7x-16", "2x2x2", 8, 48, 2, "tpu7x-16", "tpu7x-standard-4t"),
    ],
)
def test_a_name_means_a_slice(
    name: str,
    shape: str,
    chips: int,
    devices: int,
    hosts: int,
    accelerator_type: str,
    machine: str,
) -> None:
    found = topology.find(name)
    assert (found.topology, found.chips, found.devices, found.hosts) == (
        shape, chips, devices, hosts
    )  # fmt: skip
    assert (found.accelerator_type, found.machine_type) == (accelerator_type, machine)
    assert topology.find(found.name) == found
    assert topology.find(found.compiler_name).shape == found.shape


def test_a_shape_that_its_number_does_not_mean_keeps_its_name() -> None:
    """v4-512 is 4x8x8, and v4-384 is no slice."""
    assert topology.find("v4:4x8x8").name == "v4-512"
    for name in ("v4:4x4x16", "v4:4x4x12", "2*v4:4x4x16"):
        assert topology.find(name).name == name
        assert topology.find(topology.find(name).name) == topology.find(name)


def test_only_slices_that_there_are_are_offered() -> None:
    with pytest.raises(ValueError, match=r", 4096, 6144, 8192 TensorCores"):
        topology.find("v4-9")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no such TPU; there are v4, v5e, v5p, v6e, 7x"),
        ("v7x-8", "no such TPU"),
        ("v5e", "no such TPU"),
        ("v5e-12", "v5e is let with 1, 4, 8, 16, 32, 64, 128, 256 chips; another"),
        ("v5p-9", "TensorCores"),
        ("v5e:4", "its shape must look like 4x4, got '4'"),
        ("v5e:3x3", "v5e has the shapes 1x1, 2x2"),
        ("v5p:2x4", "must look like 2x4x4"),
        ("v4:64x64x64", "262144 chips, a slice of v4 has at most 4096"),
        ("x*v5e-4", r"before \* must be a number of slices"),
        ("0*v5e-4", r"before \* must be a number of slices"),
    ],
)
def test_a_wrong_name_says_which_there_are(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology.find(name)


def test_rings_close_where_they_do() -> None:
    assert topology.find("v5e:8x16").wrap == (False, True)
    assert topology.find("v5p-128").wrap == (True, True, True)
    assert topology.find("v5p-64").wrap == (False, False, False)


@pytest.mark.parametrize(
    ("name", "version"),
    [("v4", "v4"), ("v5e", "v5e"), ("v5p", "v5p"), ("v6e", "v6e"), ("7x", "7x")],
)
def test_rates_agree_with_the_table_of_jax(name: str, version: str) -> None:
    """Within 15 %, which is how far sources differ; its rates are of a TensorCore."""
    ours = next(g for g in topology.GENERATIONS if g.name == name)
    theirs = tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion(version), 1)
    cores = ours.cores_per_chip
    for mine, other in (
        (ours.bf16_flops, cores * theirs.bf16_ops_per_second),
        (ours.hbm_bytes_per_s, cores * theirs.mem_bw_bytes_per_second),
        (ours.hbm_bytes, cores * theirs.hbm_capacity_bytes),
        (ours.usable_hbm_bytes * ours.devices_per_chip, cores * theirs.hbm_capacity_bytes),
    ):
        assert abs(mine / other - 1) <= 0.15
    assert ours.usable_hbm_bytes * ours.devices_per_chip <= ours.hbm_bytes
    assert ours.mxu_width == theirs.mxu_column_size
    assert ours.mxus_per_core == theirs.num_mxus
    assert ours.vmem_bytes_per_core == theirs.vmem_capacity_bytes
    # The clock that the peak implies: a cell multiplies and adds once a cycle, in v6e and 7x twice.
    cells = ours.mxus_per_core * ours.mxu_width**2 * cores * (2 if name in ("v6e", "7x") else 1)
    assert abs(ours.bf16_flops / (2 * cells * ours.clock_hz) - 1) <= 0.02
