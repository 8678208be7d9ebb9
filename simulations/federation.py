"""Flower's own settings for a simulation."""

from __future__ import annotations

from bridge.run_config import Value


def federation_config(sites: int, workers: int) -> dict[str, Value]:
    """Flower's simulation settings: one CPU a site, `workers` of them at the same time, Ray's own log off."""
    return {
        "num-supernodes": sites,
        "client-resources-num-cpus": 1,
        "init-args-num-cpus": workers,
        "init-args-logging-level": "error",
        "init-args-log-to-driver": False,
    }
