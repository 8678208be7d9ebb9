"""What a job would cost the patients of this site, before anybody runs it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from bridge.errors import ConfigError
from bridge.hashing import sha256_json
from bridge.job import Job, parse_job
from client.bounds import plan_of
from client.errors import JobError
from client.ledger import Ledger, Plan
from client.ledger.view import Forecast, forecast
from client.patients import cohorts_of
from client.site import Site


def forecast_file(ledger: Ledger, site: Site, path: Path, cap: float) -> Forecast:
    """What a job file's plan would do to the patients of this site's recordings. Raises `JobError`."""
    from bridge.privacy.calibration import resolved

    try:
        return forecast_job(ledger, site, resolved(_read(path)), cap)
    except (ConfigError, JobError) as error:
        raise JobError(f"{path}: {error.what}", why=error.why, fix=error.fix) from error


def forecast_job(ledger: Ledger, site: Site, job: Job, cap: float) -> Forecast:
    """What a job's plan would do to the patients of this site's recordings. Raises `JobError`."""
    releases = plan_of(job)
    if not releases:
        raise JobError(
            "the job has no private mechanism",
            why=f"its privacy.mechanism is '{job.privacy.mechanism}': it promises nothing, so nothing is charged",
            fix="forecast a job with privacy.mechanism local or central",
        )
    asked = {release.cohort for release in releases}
    cohorts: dict[str, tuple[str, ...]] = {
        name: patients for name, patients in cohorts_of(site).items() if name in asked
    }
    digest = sha256_json(job.model_dump(mode="json", by_alias=True))
    return forecast(ledger, Plan(digest, releases, job.privacy.delta, cap, cohorts))


def _read(path: Path) -> Job:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            text = str(tomllib.loads(text).get("job", ""))
    except (OSError, ValueError) as error:
        raise JobError("can't be read", why=str(error), fix="name the study's job.yaml or run-config.toml") from error
    return parse_job(text)
