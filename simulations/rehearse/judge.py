"""What `accept` would refuse, refused before a recording is read."""

from __future__ import annotations

from bridge.study.archive import Study
from client.policy import load_policy
from client.site import Site


def judge(site: Site, study: Study) -> None:
    """Raise the first thing for which the site could not accept the study."""
    load_policy(site.policy_path).judge(study.job)
