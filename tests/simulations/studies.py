"""A study small enough for a test: the smoke configuration, made smaller still. Its teacher knows all three classes,
if not well: from 30 supervised steps on it predicts each of them for a fifth of the windows or more."""

from __future__ import annotations

from simulations.config import SimulationConfig, load_simulation
from tests.conftest import ROOT

SMOKE = ROOT / "configs" / "smoke.yaml"

TINY = (
    "name=tiny",
    "data.builtin.public_old_patients=6",
    "data.builtin.public_new_patients=6",
    "data.builtin.hospital_patients=14",
    "data.builtin.devices=2",
    "data.builtin.seconds=90",
    "partition={kind: unequal, hospitals: 2, shares: [3, 2]}",
    "encoders.old.pretrain.steps=3",
    "encoders.old.supervised.steps=40",
    "encoders.new.pretrain.steps=6",
    "train.rounds=3",
    "train.local_steps=3",
)


def tiny(*overrides: str) -> SimulationConfig:
    return load_simulation(SMOKE, [*TINY, *overrides])
