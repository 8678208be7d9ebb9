"""What a hospital permits: the policy file, its defaults where there is none, and its judgement of a job.

Default-deny: an item that `items` does not list does not leave, whatever the server asks. The stricter of the server's
wish and the policy holds, and nothing here is ever compared with a threshold of the server's.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from pydantic import Field, field_validator

from bridge.config import Settings, load_model
from bridge.errors import ConfigError
from bridge.job import Job
from bridge.job_privacy import MechanismName
from bridge.messages import DEFAULT_ITEMS, ITEMS, SITE_NAME, UPDATE_ITEMS, ReasonCode
from client.bounds import judge_privacy
from client.errors import PolicyError, SiteFileError


class EncodersPolicy(Settings):
    """Digests of the frozen models that the site accepts; an empty list accepts any."""

    old: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    head: tuple[str, ...] = ()


class PrivacyPolicy(Settings):
    """Which mechanisms are accepted, and bounds on those with noise; `none` has nothing that they could bound."""

    mechanisms: tuple[MechanismName, ...] = ("local",)
    epsilon_cap: float = Field(default=1.0, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    clip_max: float = Field(default=1.0, gt=0)
    noise_multiplier_min: float = Field(default=1.0, ge=0)
    sampling_rate_max: float = Field(default=0.1, gt=0, le=1)


class Policy(Settings):
    """Every key of a policy file. `Policy()` is what holds without a file: default items only, 5 patients."""

    site: str = ""
    coordinators: tuple[str, ...] = ()
    items: tuple[str, ...] = DEFAULT_ITEMS
    encoders: EncodersPolicy = EncodersPolicy()
    minimum_patients: int = Field(default=5, ge=1)
    minimum_group: int = Field(default=5, ge=1)
    max_rounds: int = Field(default=100, ge=1)
    max_seconds_per_message: float = Field(default=3600.0, gt=0)
    fit_head: bool = False
    privacy: PrivacyPolicy = PrivacyPolicy()

    @field_validator("site")
    @classmethod
    def _plain_name(cls, site: str) -> str:
        if site and not SITE_NAME.match(site):
            raise ValueError("must be letters, digits, '_', '.', '-', at most 63, beginning with a letter or digit")
        return site

    @field_validator("items")
    @classmethod
    def _declared_items(cls, items: tuple[str, ...]) -> tuple[str, ...]:
        listed = {name for pattern in items for name in _expand(pattern)}
        return tuple(name for name in ITEMS if name in listed)

    def permits(self, item: str) -> bool:
        """Whether an item of this name may leave."""
        return item in self.items

    def judge(self, job: Job) -> None:
        """Raise `PolicyError` where the job asks for more than this policy gives; no data is touched."""
        self._judge_coordinator(job)
        if job.privacy.mechanism not in self.privacy.mechanisms:
            raise PolicyError(
                ReasonCode.MECHANISM_FORBIDDEN,
                f"the job asks for the mechanism '{job.privacy.mechanism}'",
                why=f"the policy's privacy.mechanisms are {list(self.privacy.mechanisms)}",
                fix="list it there if the hospital agrees",
            )
        if job.rounds > self.max_rounds:
            raise PolicyError(
                ReasonCode.TOO_MANY_ROUNDS,
                f"the job asks for {job.rounds} rounds",
                why=f"the policy's max_rounds is {self.max_rounds}",
                fix="raise max_rounds if the hospital agrees",
            )
        if job.privacy.private:
            judge_privacy(job, self.privacy)
        for item in required_items(job):
            self.demand(item)
        self._judge_models(job)

    def demand(self, item: str) -> None:
        """Raise `PolicyError` unless the item may leave."""
        if not self.permits(item):
            raise PolicyError(
                ReasonCode.POLICY_FORBIDS,
                f"the item '{item}' may not leave",
                why="the policy's items do not list it",
                fix=f"add '{item}' to items if the hospital agrees",
            )

    def demand_fit(self) -> None:
        """Raise `PolicyError` unless a task head may be fitted on the site's patients."""
        if not self.fit_head:
            raise PolicyError(
                ReasonCode.POLICY_FORBIDS,
                "no task head may be fitted on this site's patients",
                why="the policy's fit_head is false; a head or model that was fitted on patients can reveal them",
                fix="set fit_head: true if the hospital agrees to hand out what is fitted",
            )

    def _judge_coordinator(self, job: Job) -> None:
        if self.coordinators and job.coordinator not in self.coordinators:
            raise PolicyError(
                ReasonCode.COORDINATOR_UNKNOWN,
                f"the coordinator '{job.coordinator}' is not known",
                why=f"the policy's coordinators are {list(self.coordinators)}",
                fix="add it to coordinators if the hospital agrees",
            )

    def _judge_models(self, job: Job) -> None:
        asked = {
            "old": (job.models.old_encoder, self.encoders.old),
            "new": (job.models.new_encoder, self.encoders.new),
            "head": (job.models.task_head, self.encoders.head),
        }
        for key, (digest, accepted) in asked.items():
            if accepted and digest not in accepted:
                raise PolicyError(
                    ReasonCode.POLICY_FORBIDS,
                    f"the job's {key} model {digest[:16]}... is not accepted",
                    why=f"the policy's encoders.{key} lists {[each[:16] for each in accepted]}",
                    fix=f"add the digest to encoders.{key} if the hospital agrees",
                )


def required_items(job: Job) -> tuple[str, ...]:
    """The items without which a site can't take part in the job: those of its selection mode and of training."""
    statistic = {"scores": "sums" if job.privacy.private else "scores", "moments": "moments", "fixed": ""}
    kind = statistic[job.selection.mode]
    selection = (f"probe_{kind}", f"similarity_{kind}") if kind else ()
    statistics = "statistics" if job.privacy.private else "closed_form_moments"
    closed_form = (statistics,) if job.train.solves else ()
    updates = UPDATE_ITEMS[:2] if job.bridge.frozen_prototypes else UPDATE_ITEMS
    return (*selection, *closed_form, *((*updates, "weight") if job.rounds else ()))


def load_policy(path: Path | None) -> Policy:
    """The policy in a file, or the strictest defaults where none is named.

    Raises `SiteFileError` where the file is named but absent, unreadable, has unknown keys or values out of bounds: a
    policy that can't be understood permits nothing.
    """
    if path is None:
        return Policy()
    try:
        return load_model(path, Policy)
    except ConfigError as error:
        raise SiteFileError(error.what, why=error.why, fix=error.fix) from error


def template(site: str = "") -> str:
    """A policy file with every key explained, with the values of `Policy()`; `site` fills in the agreed name."""
    text = resources.files("client").joinpath("policy_template.yaml").read_text(encoding="utf-8")
    return text.replace('site: ""', f'site: "{site}"', 1)


def _expand(pattern: str) -> tuple[str, ...]:
    """The declared items that a name or a `prefix.*` names."""
    if pattern in ITEMS:
        return (pattern,)
    if pattern.endswith(".*"):
        found = tuple(name for name in ITEMS if name.startswith(pattern[:-1]))
        if found:
            return found
    groups = {name.partition(".")[0] + ".*" for name in ITEMS if "." in name}
    close = difflib.get_close_matches(pattern, [*ITEMS, *sorted(groups)], n=1, cutoff=0.4)
    raise ValueError(
        f"'{pattern}' is not a declared item"
        + (f", did you mean '{close[0]}'?" if close else "; see fedbridge-site --help")
    )
