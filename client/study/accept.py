"""`fedbridge-site accept`: compare a study with the site, show what it asks, ask, and put the answer on record."""

from __future__ import annotations

import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridge.errors import FedbridgeError
from bridge.files import cause
from bridge.installation import check_installation
from bridge.messages import ReasonCode
from bridge.study.archive import Study, open_study
from bridge.study.page import require_own_page
from client.errors import NotAcceptedError, OutputError
from client.session import house
from client.site import Site
from client.study.compare import Comparison, Finding, compare
from client.study.record import Accepted, coordinator_of
from client.study.write import holding, record

Consent = Callable[[str], bool]

_STYLE = {"fits": "green", "note": "yellow", "refused": "red"}


def run_accept(path: Path, place: Path, who: str, consent: Consent | None, console: Console) -> None:
    """Accept a study file for the site at `place`; `consent` asks a person, None: nobody can be asked.

    Raises `StudyError` where the file is damaged, not signed by the site's coordinator or its page says other than its
    job, and `NotAcceptedError` where something stands in the way or the answer is no. Then nothing was changed.
    """
    check_installation()
    site, policy = house(place)
    with open_study(path) as study, _workplace(site) as workplace:
        coordinator = coordinator_of(site)
        study.require_signed_by(coordinator.verify_key, f"the coordinator '{coordinator.name}'")
        _show_study(study, console)
        known = holding(site, study)
        if known is not None:
            _say_known(known, console)
            return
        found = compare(study, site, policy, coordinator, workplace)
        show_findings(found, console)
        _refuse(study, found)
        # The code is the installed one by now, so this installation makes the same page, or it says something else.
        require_own_page(study)
        _ask(study, site, who, consent)
        install(found.install)
        accepted = record(site, study, who)
    console.print(
        f"Accepted by {who}: {accepted.id}. It is on record in {accepted.folder} and in {site.audit_path}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def show_findings(found: Comparison, console: Console) -> None:
    """The table of what was compared."""
    table = Table(title="What this site says to it", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("about", "result", "what and why", "what to do"):
        table.add_column(column, overflow="fold")
    for each in found.findings:
        text = each.what + (f"\n{each.why}" if each.why else "")
        verdict = each.verdict if each.verdict != "refused" else f"refused\n{each.reason.name}"
        table.add_row(
            Text(each.topic), Text(verdict, style=_STYLE[each.verdict]), Text(plain(text)), Text(plain(each.fix))
        )
    console.print(table)


def install(folders: Mapping[Path, Path]) -> None:
    """Put model folders in their places, each whole or not at all. Raises `OutputError`."""
    for target, source in folders.items():
        partial = target.with_name(f".{target.name}.installing")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.rename(target)
        except OSError as error:
            raise OutputError(
                f"{target}: the model can't be installed",
                why=cause(error),
                fix="free space or correct the permissions, and accept the study again",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def plain(text: str) -> str:
    """A text that quotes a model's card, for a terminal: without what steers one, hides text or turns its direction."""
    return "".join(each for each in text if each in "\n\t" or not _steers(each))


def _steers(character: str) -> bool:
    category = unicodedata.category(character)
    return category.startswith("C") or category in ("Zl", "Zp")


def _show_study(study: Study, console: Console) -> None:
    for line in (
        f"Study {study.id}",
        f"  sha256 {study.sha256}",
        f"  code   {study.manifest.code.sha256}",
        "",
        study.page,
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _say_known(known: Accepted, console: Console) -> None:
    text = f"{known.id} was accepted by {known.acceptance.who} at {known.acceptance.when}: nothing to do."
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _refuse(study: Study, found: Comparison) -> None:
    if not found.refused:
        return
    first: Finding = found.refused[0]
    raise NotAcceptedError(
        first.reason,
        f"the study '{study.id}' can't be accepted: {', '.join(_names(found))}",
        why=plain(f"{first.topic}: {first.what}" + (f"; {first.why}" if first.why else "")),
        fix=plain(first.fix) + (" (see the table for the others)" if len(found.refused) > 1 else ""),
    )


def _names(found: Comparison) -> list[str]:
    return list(dict.fromkeys(each.reason.name for each in found.refused))


def _ask(study: Study, site: Site, who: str, consent: Consent | None) -> None:
    what = f"the study '{study.id}' was not accepted"
    if consent is None:
        raise NotAcceptedError(
            ReasonCode.OK, what, why="there is no terminal to ask at", fix="call it at a terminal, or with --yes"
        )
    if not consent(f"Does {who} accept this study for the site '{site.name}'?"):
        raise NotAcceptedError(ReasonCode.OK, what, why="the answer was no", fix="nothing: nothing was changed")


@contextmanager
def _workplace(site: Site) -> Iterator[Path]:
    """A folder beside the site file, on the disk of the models, that is gone afterwards. Raises `OutputError`."""
    try:
        with tempfile.TemporaryDirectory(prefix=".accept-", dir=site.folder) as place:
            yield Path(place)
    except FedbridgeError:
        raise
    except OSError as error:
        raise OutputError(
            f"{site.folder}: can't be written", why=cause(error), fix="call it as the site's own user"
        ) from error
