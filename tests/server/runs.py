"""Run records as real runs leave them, for the tests of the report, the comparison and the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from server.record import Metric, RunRecord, write_record
from server.report.windows import ExampleWindow, write_example_windows

SITES = ("hospital-a", "hospital-b", "hospital-c", "hospital-d", "hospital-e", "hospital-f")
CLASSES = ["under 75", "75 to 100", "over 100"]


def metrics(value: float, half: float | None = 0.03, agreement: float | None = None) -> dict[str, Any]:
    """Figures around one value, with intervals of half that width; none where `half` is None."""

    def one(level: float) -> dict[str, float | None]:
        return Metric(
            value=level, low=None if half is None else level - half, high=None if half is None else level + half
        ).model_dump()

    return {
        "balanced_accuracy": one(value),
        "f1_macro": one(value - 0.01),
        "f1_weighted": one(value + 0.02),
        "agreement": one(agreement) if agreement is not None else None,
    }


def config(seed: int = 0, **train: Any) -> dict[str, Any]:
    """A resolved configuration, shaped as a job's."""
    return {
        "name": f"ppg-for-ecg-{seed}",
        "seed": seed,
        "models": {"old_encoder": "a" * 64, "new_encoder": "b" * 64, "task_head": "c" * 64},
        "selection": {"mode": "scores", "windows_per_patient": 16, "folds": 5, "ridge": 0.01},
        "bridge": {"rank": 8, "prototypes": 32, "initialisation": "random"},
        "alignment": {"loss": "cosine", "layer": "final", "negatives": "batch", "temperature": 0.1},
        "train": {"rounds": 20, "local_steps": 20, "learning_rate": 0.001, "criterion": "agreement", **train},
        "strategy": {"name": "FedAvg"},
        "sites": {"minimum": 3, "expected": list(SITES), "timeout_seconds": 600},
        "privacy": {"mechanism": "none"},
    }


def _encoder(modality: str, channel: str) -> dict[str, Any]:
    return {
        "schema": "fedbridge.encoder/1",
        "family": "compact",
        "window": {"modality": modality, "channels": [channel], "rate_hz": 125.0, "samples": 1250},
        "layouts_in": [[50, 64]] * 5,
        "layouts_out": [[50, 64]] * 5,
        "parameters": 263_488,
        "training": {
            "data": "PhysioNet/CinC Challenge 2015, public third",
            "licence": "ODC-By 1.0",
            "objective": "masked reconstruction and the window's own log power spectrum",
            "patients": 156,
            "seed": 7,
        },
        "digest": ("a" if modality == "ECG" else "b") * 64,
    }


def _rounds(lost: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "loss": 0.2 + 0.5 * math.exp(-number / 6),
            "criterion": 0.86 - 0.3 * math.exp(-number / 5),
            "sites": [site for site in SITES[:5] if not (lost and site == "hospital-b" and number in (3, 7))],
            "bytes_up": 5 * 62_124,
            "bytes_down": 5 * 62_660,
            "seconds": 2.1,
        }
        for number in range(1, 21)
    ]


def _evaluation() -> dict[str, Any]:
    alone = {site: metrics(0.70 + 0.012 * index) for index, site in enumerate(SITES[:5])}
    return {
        "bridge": metrics(0.764, 0.032, 0.871),
        "teacher": metrics(0.793, 0.03),
        "chance": metrics(1 / 3, None),
        "baselines": {
            "shuffled_pairs": metrics(0.352, 0.028, 0.36),
            "centralised": metrics(0.771, 0.031, 0.88),
            "linear_student": metrics(0.757, 0.033, 0.85),
            "site_alone": metrics(0.702, 0.034, 0.79),
        },
        "site_alone_per_site": alone,
        "confusion": {
            "bridge": [[812, 140, 21], [160, 704, 122], [18, 131, 705]],
            "teacher": [[842, 118, 13], [133, 741, 112], [11, 120, 723]],
            "agreement": [[901, 77, 8], [70, 822, 87], [6, 60, 782]],
        },
        "groups": {
            group: {
                "teacher": metrics(0.80 - shift, 0.05),
                "bridge": metrics(0.75 - shift, 0.06),
                "shuffled_pairs": metrics(0.5, 0.04),
                "chance": metrics(0.5, None),
            }
            for group, shift in (
                ("asystole", 0.02),
                ("bradycardia", 0.05),
                ("tachycardia", -0.03),
                ("ventricular flutter or fibrillation", 0.12),
                ("ventricular tachycardia", 0.10),
            )
        },
        "classes": CLASSES,
        "patients": 141,
        "windows": 2813,
        "interval": "95 % bootstrap over patients, 2,000 resamples",
    }


def _outbox() -> list[dict[str, Any]]:
    items = [
        ("site", 1, 10, "order and report replies by the site's agreed name"),
        ("probe_scores", 1, 40, "choose the input position"),
        ("similarity_scores", 1, 40, "choose the output position"),
        ("update.A", 20, 20 * 2048, "train the bridge"),
        ("update.B", 20, 20 * 51_200, "train the bridge"),
        ("update.P", 20, 20 * 8192, "train the bridge"),
        ("train_loss", 20, 160, "follow the training"),
        ("confusion.bridge", 21, 21 * 72, "labels against the bridge"),
    ]
    return [
        {"site": site, "item": item, "count": count, "bytes": size, "purpose": purpose}
        for site in SITES[:5]
        for item, count, size, purpose in items
    ]


def completed(seed: int = 0) -> dict[str, Any]:
    """A simulated run with everything: every control, every permission, one site that could not take part."""
    probe = [0.62, 0.70, 0.76, 0.785, 0.77]
    similarity = [0.31, 0.42, 0.47, 0.61, 0.58]
    return {
        "schema": "fedbridge.run/1",
        "status": "completed",
        "run_id": f"20260301-101500-{seed}",
        "name": f"ppg-for-ecg-{seed}",
        "config": config(seed),
        "seed": seed,
        "engine": "local",
        "sites": [
            {"site": site, "can_take_part": site != "hospital-f", "reason": "OK", "lost_turns": []}
            for site in SITES
            if site not in ("hospital-b", "hospital-f")
        ]
        + [
            {
                "site": "hospital-b",
                "can_take_part": True,
                "reason": "OK",
                "lost_turns": ["round 3: STORAGE", "round 7: STORAGE", "evaluate: GROUP_TOO_SMALL"],
            },
            {"site": "hospital-f", "can_take_part": False, "reason": "TOO_FEW_PATIENTS", "lost_turns": []},
        ],
        "selection": {
            "mode": "scores",
            "input_position": 3,
            "output_position": 3,
            "probe_scores": {
                "aggregate": probe,
                "per_site": {site: [v + 0.02 * (i - 2) for v in probe] for i, site in enumerate(SITES[:5])},
            },
            "similarity_scores": {
                "aggregate": similarity,
                "per_site": {site: [v + 0.03 * (i - 2) for v in similarity] for i, site in enumerate(SITES[:5])},
            },
        },
        "bridge": {"parameters": 15_360, "rank": 8, "prototypes": 32, "sha256": "d" * 64, "kept_round": 18},
        "rounds": _rounds(),
        "evaluation": _evaluation(),
        "outbox": _outbox(),
        "models": {
            "old_encoder": _encoder("ECG", "II"),
            "new_encoder": _encoder("PPG", "PLETH"),
            "task_head": {"classes": CLASSES, "width": 64, "training": {"patients": 156}, "digest": "c" * 64},
        },
        "versions": {"fedbridge": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0", "python": "3.11.9"},
        "started": "2026-03-01T10:15:00+00:00",
        "seconds": 172.4,
    }


def failed_early() -> dict[str, Any]:
    """A run that stopped before any site could take part."""
    return {
        "schema": "fedbridge.run/1",
        "status": "failed",
        "error": "1 of at least 3 sites\nWhy: hospital-c: TOO_FEW_PATIENTS\nWhat to do: ask <hospital-c> & run",
        "run_id": "r1",
        "name": "too-few",
        "config": config(),
        "seed": 0,
        "engine": "flower",
        "sites": [{"site": "hospital-c", "can_take_part": False, "reason": "TOO_FEW_PATIENTS"}],
    }


def running() -> dict[str, Any]:
    """A run in its fourth round."""
    record = completed()
    record |= {"status": "running", "rounds": record["rounds"][:4], "bridge": None, "evaluation": {}, "outbox": []}
    return record


def silent() -> dict[str, Any]:
    """A deployed run whose sites permit the default items alone: no loss, no criterion, no confusion."""
    record = completed() | {"engine": "deployment", "evaluation": {"interval": ""}}
    record["rounds"] = [row | {"loss": None, "criterion": None} for row in record["rounds"]]
    record["outbox"] = [row for row in record["outbox"] if not row["item"].startswith(("train_loss", "confusion"))]
    for scores in ("probe_scores", "similarity_scores"):
        record["selection"][scores] |= {"per_site": None}
    return record


def rotated(folder: Path) -> None:
    """A rotated run of three rotations, the last of which left no record."""
    top = completed() | {"selection": None, "bridge": None, "rounds": [], "sites": [], "outbox": [], "models": {}}
    write_run(folder, top | {"name": "rotated", "rotations": ["rotation-0", "rotation-1", "rotation-2"]})
    for index in range(2):
        part = completed(index) | {"rounds": []}
        part["evaluation"] |= {"groups": {}, "confusion": {}}
        write_run(folder / f"rotation-{index}", part)


def write_run(folder: Path, record: dict[str, Any]) -> Path:
    """Write a run folder that holds this record."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, RunRecord.model_validate(record))
    return folder


def write_windows(folder: Path) -> None:
    """Two example moments of both modalities."""
    windows = [
        ExampleWindow(
            title=f"Example {index}, class {name}",
            role=role,
            modality=modality,
            channel=channel,
            rate_hz=125.0,
            values=[math.sin(2 * math.pi * (0.9 + 0.4 * index) * i / 125) ** power for i in range(1250)],
        )
        for index, name in ((1, "under 75"), (2, "over 100"))
        for role, modality, channel, power in (("new", "PPG", "PLETH", 1), ("old", "ECG", "II", 15))
    ]
    write_example_windows(folder, windows)
