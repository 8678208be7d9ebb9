from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bridge.encoders.loading import load_encoder
from bridge.job import TrainJob
from client.features import FeatureSet, features
from client.site import open_site
from client.training import EMPTY, batch_key, batch_rows
from tests.client.sites import Small, ask, build_job, start_arrays, train_config


def rows(patients: list[str], key: int = 1, **changes: int) -> list[NDArray[np.int64]]:
    names = np.array(patients)
    order = np.argsort(names, kind="stable")
    sizes = {"local_steps": 6, "patients_per_batch": 3, "windows_per_patient": 4, **changes}
    return list(batch_rows(names, order, TrainJob.model_validate(sizes), key))


def test_batches_have_the_asked_shape_and_hold_one_patient_a_row() -> None:
    patients = ["a"] * 9 + ["b"] * 2 + ["c"] * 4 + ["d"] * 30
    batches = rows(patients)
    assert [batch.shape for batch in batches] == [(3, 4)] * 6
    for batch in batches:
        for slot in batch:
            kept = slot[slot != EMPTY]
            assert len({patients[row] for row in kept}) == 1
            assert len(set(kept.tolist())) == len(kept)
            owner = patients[kept[0]]
            assert len(kept) == min(4, patients.count(owner))
            assert (slot[len(kept) :] == EMPTY).all()


def test_patients_come_equally_often_whatever_their_windows() -> None:
    patients = ["a"] * 50 + ["b"] * 2 + ["c"] * 4 + ["d"]
    seen = Counter(patients[slot[0]] for batch in rows(patients, local_steps=8) for slot in batch)
    assert seen == {"a": 6, "b": 6, "c": 6, "d": 6}


def test_a_site_narrower_than_the_batch_still_fills_it() -> None:
    batches = rows(["a"] * 3 + ["b"] * 9, patients_per_batch=5)
    assert all((batch[:, 0] != EMPTY).all() for batch in batches)


def test_batches_depend_on_the_key_and_on_nothing_else() -> None:
    patients = ["a"] * 9 + ["b"] * 7 + ["c"] * 8
    first, again, other = rows(patients, 5), rows(patients, 5), rows(patients, 6)
    assert all((x == y).all() for x, y in zip(first, again, strict=True))
    assert any((x != y).any() for x, y in zip(first, other, strict=True))


def test_keys_differ_by_seed_site_and_round(small: Small) -> None:
    job = build_job(small.models, seed=1)
    keys = {
        batch_key(job, "alpha", 1),
        batch_key(job, "alpha", 2),
        batch_key(job, "beta", 1),
        batch_key(build_job(small.models, seed=2), "alpha", 1),
    }
    assert len(keys) == 4
    assert batch_key(build_job(small.models, seed=1), "alpha", 1) in keys


def by_hand(small: Small, layer: str, round_: int) -> tuple[dict[str, NDArray[np.float32]], float]:
    """The same round written plainly: einsum for the bridge, one window at a time through the old blocks, Adam by name.

    Shares the draw of the batches (`batch_rows`) and the frozen networks with the product, nothing else.
    """
    job, m, l = build_job(small.models), 2, 1  # noqa: E741
    found: FeatureSet = features(open_site(small.site), "pair")
    encoder = load_encoder(small.models / "old_encoder")
    table = found.table
    order = np.array(sorted(range(len(table)), key=lambda i: (table.patients[i], table.recordings[i], table.starts[i])))
    weights = {name: torch.tensor(value, requires_grad=True) for name, value in start_arrays().items()}
    optimiser = torch.optim.Adam(list(weights.values()), lr=job.train.learning_rate)
    losses = []
    for batch in batch_rows(table.patients, order, job.train, batch_key(job, "alpha", round_)):
        means = []
        for slot in batch:
            each = []
            for row in slot[slot != EMPTY]:
                h = torch.tensor(found.new_output(m)[row])
                mixing = (h @ weights["A"] @ weights["B"]).reshape(8, 4)
                tokens = torch.einsum("tp,pw->tw", mixing, weights["P"])
                wanted = found.old_tokens([row])[0] if layer == "final" else found.old_input_tokens(l, [row])[0]
                reached = encoder.suffix(tokens[None], l)[0] if layer == "final" else tokens
                each.append((reached - torch.tensor(wanted)).square().mean())
            means.append(torch.stack(each).mean())
        loss = torch.stack(means).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    start = start_arrays()
    return {name: value.detach().numpy() - start[name] for name, value in weights.items()}, float(np.mean(losses))


@pytest.mark.parametrize("layer", ["final", "bridge"])
def test_a_round_equals_the_same_round_by_hand(small: Small, layer: str) -> None:
    job = build_job(small.models, alignment={"loss": "mse", "layer": layer})
    reply = ask(small.site, job, "train", train_config(2), start_arrays())
    update, loss = by_hand(small, layer, 2)
    for name, value in update.items():
        got = reply.content["arrays"][f"update.{name}"].numpy()
        assert np.abs(value).max() > 1e-3
        np.testing.assert_allclose(got, value, atol=2e-6)
    assert reply.content["metrics"]["train_loss"] == pytest.approx(loss, rel=1e-5)
