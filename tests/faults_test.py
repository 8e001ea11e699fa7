"""The quick form of tests/faults.py: jobs that are really killed, disks that are really full."""

import pathlib

import pytest

from tests import faults


@pytest.mark.parametrize("number", range(len(faults.FAULTS)))
def test_nothing_is_lost(number: int, tmp_path: pathlib.Path) -> None:
    fault, _, few = faults.FAULTS[number]
    assert fault(tmp_path, few) == [], fault.__doc__


def test_a_process_with_another_config_is_named_on_both(tmp_path: pathlib.Path) -> None:
    shared = {"count": 2, "port": faults.free_port(), "steps": 3}
    jobs = [
        faults.start(tmp_path / "run", shared | {"rank": rank, "rate": 0.02 + 0.01 * rank}, 1)
        for rank in range(2)
    ]
    codes = [faults.finish(job)[0] for job in jobs]
    assert 0 not in codes
    for rank in range(2):
        said = faults.errors(tmp_path / "run", rank)
        assert "process 1: config.rate: 0.03, process 0 0.02" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
