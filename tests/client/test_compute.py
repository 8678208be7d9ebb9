"""The site file's `compute`: what a site answers does not depend on its memory, and what can't be had is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from bridge.chain import export_chain
from bridge.messages import ReasonCode
from client.check import run_check
from client.errors import SiteFileError
from client.features import _Keys, features
from client.predict import predict_site
from client.site import open_site
from tests.client.sites import BLOCKS, KINDS, Small, arrays_for, ask, bridge_shape, build_job, start_arrays

TINY = {"memory_gigabytes": 1e-9}
"""One byte: a window at a time, block by block."""

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def with_compute(small: Small, folder: Path, **compute: Any) -> Path:
    """The same site on another machine, without its cache."""
    shutil.copytree(small.site, folder, ignore=shutil.ignore_patterns("cache", "studies", "audit*", "ledger*", "keys"))
    file = yaml.safe_load((folder / "site.yaml").read_text())
    (folder / "site.yaml").write_text(yaml.safe_dump({**file, "compute": compute}))
    return folder


def close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_features_are_the_same_in_any_memory_and_lie_under_the_same_keys(small: Small, tmp_path: Path) -> None:
    site = open_site(with_compute(small, tmp_path / "a", **TINY))
    found, expected = features(site, "pair"), features(open_site(small.site), "pair")
    rows = np.arange(0, len(found), 5)
    for m in range(BLOCKS["PPG"]):
        close(found.new_output(m), expected.new_output(m))
    for l in range(BLOCKS["ECG"]):  # noqa: E741
        close(found.old_input(l), expected.old_input(l))
        close(found.old_input_tokens(l, rows), expected.old_input_tokens(l, rows))
    close(found.old_tokens(rows), expected.old_tokens(rows))
    close(found.teacher_logits, expected.teacher_logits)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "cache").rglob("*.npy")}
    roomy = with_compute(small, tmp_path / "b", memory_gigabytes=2, device="auto")
    shutil.copytree(tmp_path / "a" / "cache", roomy / "cache")
    again = features(open_site(roomy), "pair")
    assert np.array_equal(again.new_output(1), found.new_output(1))
    assert len(list((roomy / "cache").rglob("*.npy"))) == len(written)


def test_keys_know_the_precision_and_neither_device_nor_memory(small: Small, tmp_path: Path) -> None:
    recording = open_site(small.site).files()[0]
    expected = _Keys(open_site(small.site)).of(recording)
    for number, (compute, same) in enumerate(
        (
            ({"device": "auto", "memory_gigabytes": 3}, True),
            ({"device": "cuda"}, True),
            ({"device": "cuda", "precision": "bfloat16"}, False),
            ({"device": "auto", "precision": "float16"}, False),
        )
    ):
        keys = _Keys(open_site(with_compute(small, tmp_path / str(number), **compute))).of(recording)
        assert keys["windows"] == expected["windows"]
        assert (keys["old"] == expected["old"]) is same
        assert (keys["new"] == expected["new"]) is same


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alignment": {"loss": "infonce"}},
        {"alignment": {"layer": "bridge"}},
    ],
)
def test_answers_are_the_same_in_any_memory(small: Small, tmp_path: Path, changes: dict[str, Any]) -> None:
    tiny = with_compute(small, tmp_path / "tiny", **TINY)
    job = build_job(small.models, **changes)
    for kind in ("query.probe", "query.similarity", "train", "evaluate"):
        expected = ask(small.site, job, kind, KINDS[kind], arrays_for(kind)).content["arrays"]
        found = ask(tiny, job, kind, KINDS[kind], arrays_for(kind)).content["arrays"]
        assert list(found) == list(expected)
        for name in expected:
            close(found[name].numpy(), expected[name].numpy())


def test_predictions_are_the_same_in_any_memory(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "bridge"
    arrays = start_arrays()
    arrays["B"] = np.random.default_rng(0).normal(size=arrays["B"].shape).astype(np.float32)
    export_chain(
        folder,
        models=small.models,
        bridge=arrays,
        shape=bridge_shape(),
        positions=(2, 1),
        job_name="small",
        kept_round=1,
    )
    _, expected, _ = predict_site(folder, open_site(small.site), "test")
    _, found, _ = predict_site(folder, open_site(with_compute(small, tmp_path / "tiny", **TINY)), "test")
    close(found, expected)


def test_half_precision_on_the_processor_is_refused_in_the_file(small: Small, tmp_path: Path) -> None:
    with pytest.raises(SiteFileError, match="precision bfloat16 is for CUDA alone"):
        open_site(with_compute(small, tmp_path / "a", precision="bfloat16"))


@needs_no_cuda
@pytest.mark.parametrize("compute", [{"device": "cuda"}, {"device": "auto", "precision": "float16"}])
def test_a_machine_without_cuda_says_so_before_anything_is_computed(
    small: Small, tmp_path: Path, compute: dict[str, str]
) -> None:
    folder = with_compute(small, tmp_path / "a", **compute)
    described = ask(folder, build_job(small.models), "query.describe").content
    assert described["metrics"]["reason"] == ReasonCode.SITE_MISCONFIGURED
    assert not described["config"]["can_take_part"]
    reply = ask(folder, build_job(small.models), "train", KINDS["train"], arrays_for("train"))
    assert reply.error.code == ReasonCode.SITE_MISCONFIGURED
    with pytest.raises(SiteFileError, match=r"site.yaml: compute\.(.|\n)*CUDA"):
        run_check(folder / "site.yaml", None)
    assert not (folder / "cache").exists()
