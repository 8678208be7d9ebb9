"""`page.md`: what a study asks of a hospital, in plain language, made from the manifest, the job and the cards alone.

The same manifest, job and cards always give the same page. A site whose code is the study's makes it again and finds
out whether the page that it was shown tells what the job asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import ceil
from types import MappingProxyType

from bridge.encoders.cards import EncoderCard, HeadCard
from bridge.errors import StudyError
from bridge.job import Job
from bridge.job_privacy import MechanismName
from bridge.messages import ITEMS
from bridge.study.archive import Study
from bridge.study.checks import REBUILD
from bridge.study.manifest import MODEL_NAMES, PAGE, Manifest
from bridge.study.traffic import (
    Bytes,
    Planned,
    needed_items,
    planned_messages,
    possible_items,
    required_items,
    total,
)

Cards = tuple[EncoderCard, EncoderCard, HeadCard]

WHAT: Mapping[str, str] = MappingProxyType(
    {
        "site": "the name of your site, as agreed",
        "can_take_part": "yes or no",
        "reason": "a number that names why not",
        "probe_scores": "one number for each layer of the new model, over all patients together",
        "probe_moments": "sums of products of features over windows; they tell how many windows there are",
        "probe_sums": "one number for each layer of the new model, summed over groups of patients",
        "similarity_scores": "one number for each layer of the old model, over all patients together",
        "similarity_moments": "three sums for each layer of the old model, over all windows",
        "similarity_sums": "one number for each layer of the old model, summed over groups of patients",
        "statistics": "one sum over patients of averaged products of features, each patient's part bounded",
        "closed_form_moments": "one sum over patients of averaged products of features; it tells how many patients",
        "update.A": "how local training changed the first matrix of the bridge",
        "update.B": "how local training changed the second matrix of the bridge",
        "update.P": "how local training changed the bridge's prototypes",
        "weight": "the site's agreed weight: 1, or a number of the study, never a count",
        "train_loss": "one number: the mean loss of local training",
        "confusion.bridge": "a table that counts windows of test or validation patients: true class, found class",
        "confusion.teacher": "the same of the old model",
        "confusion.agreement": "a table that counts windows: class by the old model, class by the bridge",
        "confusion_sums": "three such tables, each patient's part scaled to at most one",
    }
)
"""Each item of `bridge.messages` in plain words."""

_THREAT: Mapping[MechanismName, str] = MappingProxyType(
    {
        "none": "**None.** No noise is added, and there is no mathematical bound on what the items above can reveal "
        "about single patients to the coordinator and to everyone who sees them. Patients are protected by this: "
        "nothing else leaves, the coordinator is trusted with what leaves, and each site's policy decides.",
        "local": "**Differential privacy by patient, mechanism `local`.** Your site adds noise to everything that is "
        "computed from patients before it leaves. The coordinator need not be trusted for it.",
        "central": "**Differential privacy by patient, mechanism `central`.** Your site sends sums of bounded parts of "
        "its patients; the coordinator adds the noise. It is trusted to do so and to keep and show no sum without it. "
        "The bound holds against everyone else.",
    }
)

_NEVER = (
    "Recordings, windows, features or tokens of single windows, labels of single windows.",
    "Names, numbers or any other mark of patients; file names; dates.",
    "How many patients or recordings there are, but as far as an item above says that it tells.",
    "Texts of errors: the coordinator learns a number from a fixed list.",
    "Keys, the site file, the policy, the audit log, the privacy ledger.",
)


def require_own_page(study: Study) -> None:
    """Raise `StudyError` unless the study's page is the one that follows from its manifest, job and cards.

    It has to be where the study's code is this installation's; other versions may write other pages. Raises what
    `Study.cards` and `study_page` raise, too.
    """
    if study_page(study.manifest, study.job, study.cards()) != study.page:
        raise StudyError(
            f"{study.path}: {PAGE} does not tell what the study asks",
            why="the page that follows from its job and its cards is another",
            fix=REBUILD,
        )


def study_page(manifest: Manifest, job: Job, cards: Cards) -> str:
    """Markdown of `page.md`. What `manifest.members` lists does not matter.

    Raises `PositionError` and, where a private job lacks a noise multiplier, `ConfigError`.
    """
    parts = (_head, _computed, _leaves, _never, _privacy, _models, _code, _asked)
    sections = ("\n".join(part(manifest, job, cards)) for part in parts)
    return "\n\n".join(sections) + "\n"


def _head(manifest: Manifest, job: Job, cards: Cards) -> Iterator[str]:
    yield f"# What the study '{job.name}' asks of your site"
    yield ""
    yield f"Asked by the coordinator '{_line(manifest.coordinator)}'. Written on {manifest.created[:10]}."
    yield ""
    yield f"**Purpose.** {_line(manifest.purpose) or 'The coordinator gives none.'}"
    yield ""
    yield f"**Whom to ask.** {_line(manifest.contact) or 'The coordinator names nobody.'}"


def _computed(manifest: Manifest, job: Job, cards: Cards) -> Iterator[str]:
    old, new, head = cards
    yield "## What is computed"
    yield ""
    yield (
        f"Two trained networks are given and stay as they are: an old one that reads {_input(old)} and classifies it "
        f"({_line(', '.join(head.classes))}), and a new one that reads {_input(new)}. The study trains a small bridge "
        "between them, so that the new signal can be classified by what the old network knows. Your site computes on "
        "recordings that hold both signals at the same time, without labels; labels serve to judge the result."
    )
    yield ""
    yield f"- Layers to connect: {_selection(job)}."
    yield f"- Training: {_training(job)}."
    yield f"- Evaluation: {_evaluation(job)}."
    yield "- The computing is done at your site, by the code that is installed there."


def _input(card: EncoderCard) -> str:
    window = card.window
    channels = _line(", ".join(window.channels))
    return f"{window.modality} (channels {channels}; {window.rate_hz:g} Hz; windows of {window.seconds:g} s)"


def _selection(job: Job) -> str:
    asked = job.selection
    if asked.mode == "fixed":
        return f"fixed by the study (output of layer {asked.input_position}, input of layer {asked.output_position})"
    return f"chosen from what the sites send, at most {asked.windows_per_patient} windows of a patient"


def _training(job: Job) -> str:
    rounds = f"{job.rounds} rounds of {job.train.local_steps} steps each ({job.strategy.name})"
    if job.train.method == "closed_form":
        return "one message with the statistics of a regression, no rounds"
    return f"one message with the statistics of a regression, then {rounds}" if job.train.solves else rounds


def _evaluation(job: Job) -> str:
    judged = [round_ for round_ in range(1, job.rounds + 1) if job.evaluates("validation", round_)]
    found = [f"validation patients after {len(judged)} of the rounds"] if judged else []
    found += ["test patients once, at the end"] if job.evaluate.final else []
    return " and ".join(found) or "none"


def _leaves(manifest: Manifest, job: Job, cards: Cards) -> Iterator[str]:
    planned = planned_messages(job, *cards, items=possible_items(job))
    needed = planned_messages(job, *cards, items=needed_items(job))
    yield "## What leaves your site"
    yield ""
    yield (
        f"This list is closed. One run asks {len(planned)} questions. Over the whole study, interruptions included, "
        f"each but the first (whether your site takes part) is answered at most {_times(manifest.attempts)}: your "
        "site counts, and refuses more. Items not "
        "marked `yes` leave only where your policy lists them; `by one site`: at least one site has to send it."
    )
    yield ""
    yield "| item | what it is | what for | in one run | bytes each | needed |"
    yield "|---|---|---|---|---|---|"
    yield from _rows(job, planned)
    yield ""
    most = total(planned)
    yield (
        f"In all, one run sends {_bytes(total(needed))} with the needed items alone and {_bytes(most)} with every "
        f"item; with every question answered {_times(manifest.attempts)}, at most {most[1] * manifest.attempts:,} "
        "bytes. These are the values alone, without what the network adds. What comes in: the job, the questions, and "
        "the bridge's numbers."
    )


def _rows(job: Job, planned: list[Planned]) -> Iterator[str]:
    required, needed = set(required_items(job)), set(needed_items(job))
    times = Counter(name for message in planned for name in message.items)
    sizes = {name: size for message in planned for name, size in message.items.items()}
    for name in possible_items(job):
        if name in sizes:
            marked = "yes" if name in required else "by one site" if name in needed else "if permitted"
            cells = (f"`{name}`", WHAT[name], ITEMS[name].purpose, _times(times[name]), _bytes(sizes[name]), marked)
            yield f"| {' | '.join(cells)} |"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _bytes(size: Bytes) -> str:
    low, high = size
    if low != high:
        return f"{low:,} to {high:,} bytes"
    return "1 byte" if high == 1 else f"{high:,} bytes"


def _never(manifest: Manifest, job: Job, cards: Cards) -> Iterator[str]:
    yield "## What never leaves"
    yield ""
    yield from (f"- {line}" for line in _NEVER)


def _privacy(manifest: Manifest, job: Job, cards: Cards) -> Iterator[str]:
    yield "## Privacy budget"
    yield ""
    yield _THREAT[job.privacy.mechanism]
    if not job.privacy.private:
        return
    from bridge.privacy.accounting import Cohort, epsilon, releases_of

    yield ""
    yield "| patients | loses at most (epsilon) | delta |"
    yield "|---|---|---|"
    words = {"pair": "who give paired recordings", "validation": "who judge rounds", "test": "who judge the result"}
    cohorts: tuple[Cohort, ...] = ("pair", "validation", "test")
    for cohort in cohorts:
        if releases := releases_of(job, cohort):
            # Rounded up, so that a page never promises more than holds.
            lost = ceil(100 * epsilon(releases, job.privacy.delta)) / 100
            yield f"| {words[cohort]} | {lost:.2f} | {job.privacy.delta:g} |"
    yield ""
    yield (
        "In one run, with all recordings of the patient at your site. Your ledger reserves it before the first answer; "
        "a run that is resumed costs nothing more, another run costs it again, up to your policy's cap. The study "
        f"assumes at most {job.privacy.patients_bound} patients at a site. How long answers take is not hidden."
    )


def _models(manifest: Manifest, job: Job, cards: Cards) -> Iterator[str]:
    yield "## Models"
    yield ""
    yield "| model | digest of its card | sha256 of its weights | weights | trained on, says its card |"
    yield "|---|---|---|---|---|"
    listed: tuple[EncoderCard | HeadCard, ...] = cards
    for name, card in zip(MODEL_NAMES, listed, strict=True):
        entry = manifest.models[name]
        where = "in the study file" if entry.included else _cell(f"not included; from: {entry.source}")
        data = _cell(str(card.training.get("data") or "it does not say"))
        yield f"| {name.replace('_', ' ')} | `{entry.digest}` | `{entry.weights_sha256}` | {where} | {data} |"
    yield ""
    yield "Your site refuses others. They are read as numbers (safetensors), never run as code."


def _cell(text: str) -> str:
    """Text of others in one cell of a table."""
    return _line(text.replace("|", "\\|"))


def _line(text: str) -> str:
    """Text of others on one line, where it can't look like a section of the page."""
    return " ".join(text.split())


def _code(manifest: Manifest, job: Job, cards: Cards) -> Iterator[str]:
    yield "## Code"
    yield ""
    versions = ", ".join(_line(f"{name} {version}") for name, version in sorted(manifest.versions.items()))
    yield (
        f"The app bundle with the sha256 `{manifest.code.sha256}` ({len(manifest.code.files)} files). Your site runs "
        "its own installed copy, and only if that gives the same bundle; nothing that the coordinator sends is run. "
        f"Built with: {versions}."
    )


def _asked(manifest: Manifest, job: Job, cards: Cards) -> Iterator[str]:
    sites = job.sites
    yield "## Who takes part, and how to leave"
    yield ""
    named = _line(", ".join(sites.expected)) if sites.expected else "any site that is enrolled"
    yield f"Sites: {named}. At least {sites.minimum} have to answer each question."
    yield ""
    yield (
        "`fedbridge-site accept` records your consent with this file's hash. `fedbridge-site withdraw` ends it at "
        "once: nothing more is answered. What was sent before stays with the coordinator."
    )
