"""Noise: its distribution against the claimed scale, and that no two streams are one."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import get_context

import numpy as np
import pytest
from scipy import stats

from bridge.privacy.noise import NoiseSource, open_unit

SCALES = (0.03, 1.0, 40.0)


@pytest.mark.parametrize("deviation", SCALES)
@pytest.mark.parametrize("source", [NoiseSource.from_system(), NoiseSource.seeded(5, "a")], ids=["system", "seeded"])
def test_noise_has_the_claimed_scale_and_no_other(source: NoiseSource, deviation: float) -> None:
    drawn = source.normal(20_000, deviation)
    # One true sample in a million is rejected.
    assert stats.kstest(drawn, stats.norm(scale=deviation).cdf).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(drawn, stats.norm(scale=wrong * deviation).cdf).pvalue < 1e-12


def test_the_variance_is_right_over_ten_million_draws() -> None:
    drawn = NoiseSource.from_system().normal(10_000_000, 2.5)
    assert drawn.var() == pytest.approx(6.25, rel=0.01)
    # Six standard errors: tails and independence of neighbours as well.
    assert abs(drawn.mean()) < 6 * 2.5 / np.sqrt(1e7)
    assert (np.abs(drawn) > 4 * 2.5).mean() == pytest.approx(2 * stats.norm.sf(4), rel=0.25)
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 6 * 6.25 / np.sqrt(1e7)


def test_the_shape_is_the_asked_one_and_the_stream_goes_on() -> None:
    whole = NoiseSource.seeded(1).normal(24, 1.0)
    parts = NoiseSource.seeded(1)
    np.testing.assert_array_equal(parts.normal((2, 3, 2), 1.0).ravel(), whole[:12])
    np.testing.assert_array_equal(parts.normal((12,), 3.0), 3.0 * whole[12:])
    assert parts.normal((0, 5), 1.0).shape == (0, 5)


def test_a_seed_and_its_labels_name_one_stream() -> None:
    first = NoiseSource.seeded(1, "ab", "c", 3).uniform(8)
    np.testing.assert_array_equal(first, NoiseSource.seeded(1, "ab", "c", 3).uniform(8))
    others = [
        NoiseSource.seeded(2, "ab", "c", 3),
        NoiseSource.seeded(1, "a", "bc", 3),
        NoiseSource.seeded(1, "ab", "c", "3"),
        NoiseSource.seeded(1, "ab", "c"),
    ]
    assert len({first[0], *(other.uniform(8)[0] for other in others)}) == 5


def test_the_open_interval_is_never_left() -> None:
    ends = open_unit(np.array([0, 2**64 - 1, 2**63], dtype=np.uint64))
    assert 0.0 < ends[0] < 2.0**-52
    assert 1.0 - 2.0**-52 < ends[1] < 1.0
    assert ends[2] == pytest.approx(0.5, abs=2.0**-52)
    assert ends[0] == 1.0 - ends[1]


def test_a_key_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 16"):
        NoiseSource(bytes(16))


DRAW = "from bridge.privacy.noise import NoiseSource as N; print(*N.from_system().uniform(500).tolist())"


def forked(_: int) -> list[float]:
    found: list[float] = NoiseSource.from_system().uniform(500).tolist()
    return found


def test_two_processes_never_share_a_stream() -> None:
    """Neither processes started afresh, nor forks of one that has drawn before, nor two sources of one process."""
    started = [subprocess.Popen([sys.executable, "-c", DRAW], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    drawn = [NoiseSource.from_system().uniform(500).tolist() for _ in range(2)]
    with get_context("fork").Pool(3) as pool:
        drawn += pool.map(forked, range(3), chunksize=1)
    drawn += [[float(word) for word in child.communicate()[0].split()] for child in started]
    everything = [number for stream in drawn for number in stream]
    assert len(everything) == 8 * 500
    assert len(set(everything)) == len(everything)
