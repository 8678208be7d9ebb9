"""`fedbridge-site predict`: an exported bridge on a site's recordings, from the new modality alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.chain import InferenceChain, Manifest, load_chain, read_manifest
from bridge.errors import ExportError
from bridge.files import write_whole
from client.errors import ModelsDifferError
from client.site import Site
from client.site_file import Split
from client.windowing import Windows, windows_of


def predict_site(bridge_folder: Path, site: Site, split: Split | None) -> tuple[Windows, NDArray[np.float32], Manifest]:
    """Windows of the split's patients (None: all), their class probabilities `(n, classes)`, and the bridge's manifest.

    The old modality is not read and need not exist. Raises `ExportError` on a damaged bridge folder,
    `ModelsDifferError` where the site cuts its windows for another new encoder, and `SiteFileError` where its machine
    can't compute as the site file says.
    """
    torch.set_num_threads(1)
    manifest = read_manifest(bridge_folder)
    if site.new_card.digest != manifest.models.new_encoder:
        raise ModelsDifferError(
            f"the site's new encoder {site.new_card.digest[:16]}... is not the bridge's",
            why=f"the bridge was trained with {manifest.models.new_encoder[:16]}...",
            fix=f"point models.new_encoder of {site.path} to {bridge_folder / 'new_encoder'}",
        )
    chain: InferenceChain = load_chain(bridge_folder, site.compute)
    windows = windows_of(site, split, roles=("new",))
    assert windows.new is not None
    return windows, chain.logits(windows.new).softmax(dim=-1).numpy(), manifest


def write_predictions(
    path: Path, windows: Windows, probabilities: NDArray[np.float32], classes: tuple[str, ...]
) -> None:
    """One CSV row a window: patient, recording, start_seconds, prediction, and a probability for each class.

    Written in one rename. Raises `ExportError` where it can't be written.
    """
    table, chosen = windows.table, probabilities.argmax(axis=1)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = [f"probability_{name}" for name in classes]
    writer.writerow(["patient", "recording", "start_seconds", "prediction", *names])
    for row in range(len(table)):
        shown = [f"{value:.6f}" for value in probabilities[row]]
        place = [table.patients[row], table.recordings[row], f"{table.starts[row]:g}"]
        writer.writerow([*place, classes[chosen[row]], *shown])
    try:
        write_whole(path, text.getvalue())
    except OSError as error:
        raise ExportError(
            f"{path}: the predictions can't be written",
            why=error.strerror or "",
            fix="free space, or name another --out",
        ) from error
