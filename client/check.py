"""What `fedbridge-site check` tells before anything is run: files, signals, splits, what would be rejected and why.

It reads every recording and computes nothing with the encoders. Everything is printed on this terminal and nowhere
else; the picture holds signals of patients, but no names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bridge.errors import ExitCode
from bridge.windows import Preprocessing, WindowSpec
from client.errors import RecordingError
from client.labels import LabelSource
from client.policy import Policy, load_policy
from client.readers.base import Recording
from client.site import InputFormat, Site, open_site
from client.site_file import SPLITS, Role, SiteFile
from client.windowing import Cut, FileProblem, cut, formats_of

_PATIENTS_SHOWN = 40
_OTHER = "in no split"


@dataclass
class FileFinding:
    """One usable recording: its patient and split, what its signals are, and what was cut from it."""

    path: Path
    patient: str
    split: str
    seconds: float
    signals: Mapping[Role, str]
    accepted: int
    labels: Counter[int]
    rejections: tuple[tuple[float, str], ...]

    @property
    def rejected(self) -> Counter[str]:
        """How many windows were rejected for each reason."""
        return Counter(reason for _, reason in self.rejections)


@dataclass
class Findings:
    """Everything that `check` found."""

    site: Site
    policy: Policy
    formats: Mapping[Role, InputFormat]
    files: list[FileFinding] = field(default_factory=list)
    unusable: list[FileProblem] = field(default_factory=list)
    excluded: int = 0

    @property
    def rejected(self) -> Counter[str]:
        """Rejected windows of all files by reason."""
        return sum((each.rejected for each in self.files), Counter[str]())

    @property
    def problems(self) -> list[str]:
        """What keeps the site from being used as its file says, one sentence each; empty: nothing does."""
        splits, found = self.site.file.splits, {each.patient for each in self.files}
        problems = [f"{len(self.unusable)} file(s) can't be used: see the list above"] if self.unusable else []
        absent = sorted(splits.listed - found)
        if absent:
            problems.append(f"{len(absent)} listed patient(s) have no usable recording, the first is '{absent[0]}'")
        for split, wanted in zip(SPLITS, (splits.pair, splits.validation, splits.test), strict=True):
            patients = {each.patient for each in self.files if each.split == split and each.accepted}
            if wanted and not patients:
                problems.append(f"the split '{split}' has no window")
            elif split == "pair" and len(patients) == 1:
                problems.append("the split 'pair' has one patient: choosing positions compares patients, it needs 2")
            elif split == "pair" and patients and len(patients) < self.policy.minimum_patients:
                problems.append(
                    f"the split 'pair' has {len(patients)} patients with windows, the policy's minimum_patients is "
                    f"{self.policy.minimum_patients}: the site would refuse to take part"
                )
        return problems

    @property
    def notes(self) -> list[str]:
        """What an engineer should know, though nothing fails by it."""
        idle = sorted({each.patient for each in self.files} - {each.patient for each in self.files if each.accepted})
        notes = [f"{len(idle)} patient(s) have no usable window: {', '.join(idle)}"] if idle else []
        if self.site.awaits_models:
            notes.append(
                "there are no models yet: they come with a study (`fedbridge-site accept`), and whether they fit is "
                "checked then; windows were cut from the signals as they were recorded"
            )
        for split in ("validation", "test"):
            count = len({each.patient for each in self.files if each.split == split and each.accepted})
            if 0 < count < self.policy.minimum_group:
                notes.append(
                    f"the split '{split}' has {count} patients, the policy's minimum_group is "
                    f"{self.policy.minimum_group}: no metric of it would leave"
                )
        return notes


def run_check(path: Path, picture: Path | None, console: Console | None = None) -> int:
    """Check a site, print what was found, draw `picture`; return `ExitCode.OK`, or `ExitCode.DATA` for any problem.

    Raises `SiteFileError`, `ModelsError` and `NoWindowsError` where the site can't even be looked at.
    """
    console = console or Console()
    findings = examine(open_site(path), console)
    print_findings(findings, console)
    if picture is not None:
        from client.check_picture import draw

        shown = draw(findings, picture)
        console.print(f"\nPicture: [bold]{picture}[/bold]. It holds signals of patients: keep it here.")
        for number, text in enumerate(shown, start=1):
            console.print(f"  row {number}: {text}", highlight=False)
    for note in findings.notes:
        console.print(f"[yellow]Note:[/yellow] {note}.", highlight=False)
    problems = findings.problems
    for problem in problems:
        console.print(f"[red]Problem:[/red] {problem}.", highlight=False)
    if not problems:
        console.print("[green]Everything fits the site file.[/green]")
    return int(ExitCode.DATA if problems else ExitCode.OK)


def examine(site: Site, console: Console) -> Findings:
    """Read and cut every recording of the site, once it is known that the machine can compute as its file says."""
    _ = site.compute
    paths, excluded = site.all_files()
    findings = Findings(site, load_policy(site.policy_path), check_formats(site), excluded=len(excluded))
    labels = LabelSource.of(site)
    with Progress(console=console, transient=True) as progress:
        for path in progress.track(paths, description="Reading recordings"):
            try:
                recording = site.reader.read(path)
                found = cut(recording, site.file, findings.formats, labels)
            except RecordingError as error:
                findings.unusable.append(FileProblem(path, error))
            else:
                findings.files.append(_finding(path, recording, found, site.file))
    return findings


def check_formats(site: Site) -> dict[Role, InputFormat]:
    """What the encoders read; where the site has no models yet, windows as recorded, normalised."""
    roles: list[Role] = [role for role in ("old", "new") if getattr(site.file, role) is not None]
    if site.file.models is not None and not site.awaits_models:
        formats = formats_of(site, roles)
        if len(roles) == 2:
            _ = site.head_card  # raises where the head does not fit the old encoder or the classes
        return formats
    formats = {}
    for role in roles:
        section = site.file.section(role)
        samples = max(1, round(site.file.window.seconds * section.rate_hz))
        spec = WindowSpec(
            modality=section.modality, channels=section.channels, rate_hz=section.rate_hz, samples=samples
        )
        formats[role] = InputFormat(window=spec, preprocessing=Preprocessing())
    return formats


def _finding(path: Path, recording: Recording, found: Cut, file: SiteFile) -> FileFinding:
    signals: dict[Role, str] = {}
    for role in found.signals:
        signal = recording.signals[file.section(role).modality]
        signals[role] = f"{', '.join(signal.channels)} at {signal.rate_hz:g} Hz"
    return FileFinding(
        path=path,
        patient=recording.patient,
        split=file.splits.of(recording.patient) or _OTHER,
        seconds=sum(end - start for start, end in recording.segments),
        signals=signals,
        accepted=len(found.starts),
        labels=Counter(found.labels.tolist()),
        rejections=found.rejections,
    )


def print_findings(findings: Findings, console: Console) -> None:
    """The tables: site, splits, rejections, unusable files, patients."""
    site, files = findings.site, findings.files
    hours = sum(each.seconds for each in files) / 3600
    console.print(f"\n[bold]Site '{site.name}'[/bold]  {site.path}", highlight=False)
    console.print(
        f"{len(files)} usable recordings of {len({each.patient for each in files})} patients, {hours:.1f} h; "
        f"{len(findings.unusable)} unusable, {findings.excluded} left out by 'exclude'.",
        highlight=False,
    )
    compute = site.compute
    console.print(
        f"Networks: {compute.device}, {compute.precision}; a batch may take {compute.memory_bytes / 1e9:.1f} GB.",
        highlight=False,
    )
    for role, form in findings.formats.items():
        kinds = Counter(each.signals[role] for each in files)
        console.print(f"  {role}: {form.window.modality}, windows {_window(form)}", highlight=False)
        for kind, count in kinds.most_common(5):
            console.print(f"     {count} recordings hold {kind}", highlight=False)
    for table in (_splits(findings), _rejections(findings), _unusable(findings.unusable), _patients(files)):
        if table.row_count:
            console.print(table)


def _window(form: InputFormat) -> str:
    window = form.window
    return f"of {window.seconds:g} s, {', '.join(window.channels)} as {window.samples} samples at {window.rate_hz:g} Hz"


def _splits(findings: Findings) -> Table:
    classes = findings.site.file.labels.classes
    table = _table("Windows by split", "split", ["patients", "recordings", "windows", *classes, "no label"])
    for split in (*SPLITS, _OTHER):
        mine = [each for each in findings.files if each.split == split]
        labels = sum((each.labels for each in mine), Counter[int]())
        counts = [len({each.patient for each in mine}), len(mine), sum(each.accepted for each in mine)]
        counts += [labels[index] for index in range(len(classes))] + [labels[-1]]
        if mine or split != _OTHER:
            table.add_row(split, *map(str, counts))
    return table


def _rejections(findings: Findings) -> Table:
    table = _table("Rejected windows", "reason", ["windows", "share of all", "recordings"])
    total = sum(each.accepted + len(each.rejections) for each in findings.files)
    for reason, count in findings.rejected.most_common():
        touched = sum(reason in each.rejected for each in findings.files)
        table.add_row(reason, str(count), f"{count / total:.1%}", str(touched))
    return table


def _unusable(problems: Sequence[FileProblem]) -> Table:
    table = Table(title="Files that can't be used", title_justify="left", show_lines=True)
    for column in ("file", "what and why", "what to do"):
        table.add_column(column, overflow="fold")
    for problem in problems:
        error = problem.error
        table.add_row(problem.path.name, error.what + (f": {error.why}" if error.why else ""), error.fix)
    return table


def _patients(files: Sequence[FileFinding]) -> Table:
    """One row a patient; of many, those that lose the largest share of their windows."""
    patients = sorted({each.patient for each in files})
    rows = []
    for patient in patients:
        mine = [each for each in files if each.patient == patient]
        accepted, rejected = sum(each.accepted for each in mine), sum(len(each.rejections) for each in mine)
        minutes = sum(each.seconds for each in mine) / 60
        share = rejected / max(1, accepted + rejected)
        rows.append((share, [patient, mine[0].split, str(len(mine)), f"{minutes:.1f}", str(accepted), str(rejected)]))
    title = "Patients"
    if len(rows) > _PATIENTS_SHOWN:
        title = f"The {_PATIENTS_SHOWN} of {len(rows)} patients that lose the largest share of their windows"
        worst = np.argsort([-share for share, _ in rows], kind="stable")[:_PATIENTS_SHOWN]
        rows = [rows[index] for index in worst]
    table = _table(title, "patient", ["split", "recordings", "minutes", "windows", "rejected"])
    for _, row in rows:
        table.add_row(*row)
    return table


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", overflow="fold")
    return table
