"""The one-shot bridge at the wire: one message, the pooled ridge, and noise where the server adds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.fft import dct
from sklearn.linear_model import Ridge

from bridge.errors import ConfigError, WeightsError
from bridge.job import parse_job
from bridge.shape import BridgeShape
from server.initialisation import first_broadcast
from server.record import read_record
from tests.server.conftest import Models
from tests.server.wire import TOKENS_OLD, WIDTH_NEW, WIDTH_OLD, Arrays, Site, WireGrid, rng, run_server

PATIENTS = {"alpha": 1, "beta": 4, "gamma": 31}
COSINES, PROTOTYPES, COMPONENTS, RIDGE = 2, 3, 4, 0.2
ROWS, COLUMNS = COMPONENTS + 1, COSINES * PROTOTYPES
BRIDGE = {
    "kind": "factored",
    "rank": ROWS,
    "cosines": COSINES,
    "prototypes": PROTOTYPES,
    "components": COMPONENTS,
    "initialisation": "directions",
    "frozen_prototypes": True,
    "constant": "public",
    "whitening": "public",
}
SITES = {"minimum": 3, "wait_seconds": 5, "timeout_seconds": 5, "retries": 0, "expected": tuple(PATIENTS)}
FIXED = {"mode": "fixed", "input_position": 1, "output_position": 2}


def job_of(models: Models, **changes: Any) -> str:
    wanted: dict[str, Any] = {
        "bridge": BRIDGE,
        "train": {"method": "closed_form", "ridge": RIDGE, "rounds": 2},
        "evaluate": {"final": False},
        "selection": FIXED,
        "sites": SITES,
    }
    return models.job(**(wanted | changes))


def windows(site: str, patient: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A patient's features and tokens, one to five windows."""
    source = rng("closed form", site, patient)
    h = source.normal(size=(source.integers(1, 6), WIDTH_NEW)) + source.normal(size=WIDTH_NEW)
    tokens = np.sin(h @ rng("truth").normal(size=(WIDTH_NEW, TOKENS_OLD * WIDTH_OLD)))
    return h, tokens.reshape(-1, TOKENS_OLD, WIDTH_OLD)


def both_sides(
    h: NDArray[np.float64], tokens: NDArray[np.float64], broadcast: Arrays
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Inputs and coefficients of windows, from the broadcast's constants."""
    x = np.c_[(h - broadcast["mean"]) @ broadcast["whitening"], np.ones(len(h))]
    waves = dct(tokens - broadcast["constant"], axis=1, norm="ortho")[:, :COSINES]
    c = np.linalg.lstsq(broadcast["P"].T, waves.reshape(-1, WIDTH_OLD).T, rcond=None)[0].T
    return x, c.reshape(len(h), COLUMNS)


def answering(site: str, item: str, gram: bool) -> Site:
    def statistics(broadcast: Arrays) -> Arrays:
        total = np.zeros(1 + ROWS * COLUMNS + (ROWS * (ROWS + 1) // 2 if gram else 0))
        for patient in range(PATIENTS[site]):
            x, c = both_sides(*windows(site, patient), broadcast)
            parts = [[0.25], (x.T @ c / len(x)).ravel() / np.sqrt(ROWS * COLUMNS)]
            if gram:
                parts.append((x.T @ x / len(x))[np.triu_indices(ROWS)] / ROWS)
            total += np.concatenate(parts)
        return {item: total}

    return Site(site, closed_form=statistics, loss=False)


def run(models: Models, folder: Path, text: str, *, private: bool = False) -> tuple[Arrays, list[Site]]:
    item = "statistics" if private else "closed_form_moments"
    members = [answering(site, item, gram=not private) for site in ("gamma", "alpha", "beta")]
    for site in members:
        site.weight = parse_job(text).sites.weight(site.name)
    run_server(WireGrid(members, shuffle=2), folder, models.folder, text)
    return load_file(folder / "bridge" / "bridge.safetensors"), members


def pooled(models: Models, weights: dict[str, float]) -> NDArray[np.float64]:
    """`(rows, columns)` of a ridge regression on one machine with all windows."""
    arrays = start(models)
    inputs, targets, shares = [], [], []
    for site, count in PATIENTS.items():
        for patient in range(count):
            x, c = both_sides(*windows(site, patient), arrays)
            inputs.append(x)
            targets.append(c)
            shares.append(np.full(len(x), weights[site] / len(x)))
    total = sum(weights[site] * count for site, count in PATIENTS.items())
    model = Ridge(alpha=RIDGE * total, fit_intercept=False, solver="cholesky")
    model.fit(np.concatenate(inputs), np.concatenate(targets), sample_weight=np.concatenate(shares))
    return np.asarray(model.coef_.T)


def start(models: Models) -> Arrays:
    job = parse_job(job_of(models))
    shape = BridgeShape(
        WIDTH_NEW, ROWS, TOKENS_OLD, PROTOTYPES, WIDTH_OLD, COSINES, COMPONENTS, constant=True, frozen_prototypes=True
    )
    return first_broadcast(job, shape, (1, 2), models.folder)


@pytest.mark.parametrize("weights", [{}, {"alpha": 1.0, "beta": 0.5, "gamma": 0.05}])
def test_one_message_gives_the_ridge_of_one_machine(models: Models, tmp_path: Path, weights: dict[str, float]) -> None:
    text = job_of(models, sites={**SITES, "weights": weights})
    arrays, members = run(models, tmp_path, text)
    expected = pooled(models, weights or dict.fromkeys(PATIENTS, 1.0))
    found = arrays["A"].astype(np.float64) @ arrays["B"]
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    for name, array in start(models).items():
        if name not in ("A", "B"):
            np.testing.assert_array_equal(arrays[name], array)
    for site in members:
        assert [kind for kind, _ in site.seen] == ["query.describe", "query.closed_form"]
        assert site.seen[1][1] == {"input-position": 1, "output-position": 2}
    record = read_record(tmp_path)
    assert (record.status, record.rounds) == ("completed", [])


def test_it_is_the_start_of_gradient_training_where_that_is_asked(models: Models, tmp_path: Path) -> None:
    text = job_of(models, train={"start": "closed_form", "ridge": RIDGE, "rounds": 1})
    seen: list[Arrays] = []
    members = [answering(site, "closed_form_moments", gram=True) for site in PATIENTS]

    def spy(site: Site, message: Any, honest: Any) -> Any:
        seen.append({name: array.numpy() for name, array in message.content.array_records["arrays"].items()})
        arrays = honest.array_records["arrays"]
        for name in [name for name in arrays if name.removeprefix("update.") not in ("A", "B")]:
            del arrays[name]
        return honest

    for site in members:
        site.wrong = {"train": spy}
    run_server(WireGrid(members), tmp_path, models.folder, text)
    assert len(seen) == 3
    expected = pooled(models, dict.fromkeys(PATIENTS, 1.0))
    np.testing.assert_allclose(seen[0]["A"].astype(np.float64) @ seen[0]["B"], expected, atol=1e-5)


def private(**closed_form: Any) -> dict[str, Any]:
    return {
        "mechanism": "central",
        "simulation_seed": 5,
        "closed_form": {"noise_multiplier": 0.5, "clip": 1.0, **closed_form},
    }


def test_under_central_the_server_adds_noise_and_drops_what_it_would_reach(models: Models, tmp_path: Path) -> None:
    found = {}
    # The sites' own sums are not clipped here, so the clip decides nothing but the noise.
    for name, changes in {
        "hardly any": {"clip": 1e-6},
        "some": {"drop_below_noise": False},
        "much": {"clip": 1e4},
    }.items():
        asked = private(**{"gram": "public", "clip": 1.0, **changes})
        arrays, _ = run(models, tmp_path / name, job_of(models, privacy=asked), private=True)
        found[name] = arrays["A"].astype(np.float64) @ arrays["B"]
    # Without the Gram matrix: the cross moments alone, over 1 + ridge.
    arrays = start(models)
    each = [both_sides(*windows(site, p), arrays) for site, count in PATIENTS.items() for p in range(count)]
    cross = np.mean([x.T @ c / len(x) for x, c in each], axis=0)
    np.testing.assert_allclose(found["hardly any"], cross / (1 + RIDGE), atol=1e-4 * np.abs(cross).max())
    error = np.abs(found["some"] - cross / (1 + RIDGE)).mean()
    deviation = 0.5 * np.sqrt(ROWS * COLUMNS) / 36 / (1 + RIDGE)
    assert 0.3 * deviation < error < 2 * deviation
    assert not found["much"].any()


def test_without_public_vectors_the_run_says_what_is_missing(models: Models, tmp_path: Path) -> None:
    shape = BridgeShape(WIDTH_NEW, 2, TOKENS_OLD, PROTOTYPES, WIDTH_OLD, COSINES, COMPONENTS, frozen_prototypes=True)
    job = parse_job(job_of(models))
    with pytest.raises(WeightsError, match="can't be read"):
        first_broadcast(job, shape, (1, 2), tmp_path)
    with pytest.raises(WeightsError, match=r"'mean\.9' holds nothing"):
        first_broadcast(job, shape, (9, 2), models.folder)


def test_a_bridge_without_a_closed_form_is_refused(models: Models) -> None:
    with pytest.raises(ConfigError, match="the closed form needs"):
        parse_job(job_of(models, bridge={**BRIDGE, "frozen_prototypes": False}))
