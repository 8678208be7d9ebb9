"""A study file comes back as it was written; anything else is refused, however the zip lies."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.errors import ExitCode, StudyError, StudyStorageError
from bridge.study.archive import open_study, write_study
from bridge.study.manifest import ModelEntry
from bridge.study.signing import new_key, public_of, sign
from tests.bridge.study.studies import HEAD_WEIGHTS, NEW_WEIGHTS, OLD_WEIGHTS, Parts, cards, job, parts

Entry = tuple[str | zipfile.ZipInfo, bytes]


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(path: Path, entries: list[Entry], compression: int = zipfile.ZIP_STORED) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, content in entries:
            archive.writestr(name, content)


def opened(path: Path) -> None:
    with open_study(path):
        pass


def refused(path: Path, saying: str) -> None:
    with pytest.raises(StudyError, match=saying) as caught:
        opened(path)
    assert caught.value.exit_code is ExitCode.REFUSED
    assert caught.value.fix


def with_manifest(path: Path, secret: bytes, change: Callable[[dict[str, object]], None]) -> None:
    """The study with a changed and freshly signed study.json."""
    files = entries_of(path)
    value = json.loads(files["study.json"])
    change(value)
    content = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    files |= {"study.json": content, "study.sig": sign(secret, content)}
    rezip(path, list(files.items()))


@pytest.fixture
def tiny() -> Parts:
    return parts()


@pytest.fixture
def study(tmp_path: Path, tiny: Parts) -> Path:
    return tiny.write(tmp_path / "study.zip")


def test_a_study_comes_back_as_it_was_written(tmp_path: Path, tiny: Parts) -> None:
    path = tmp_path / "study.zip"
    sha256 = write_study(path, tiny.manifest, tiny.files, tiny.secret)
    content = entries_of(path)["study.json"]
    assert sha256 == hashlib.sha256(content).hexdigest()
    with open_study(path) as study:
        assert study.manifest == tiny.manifest
        assert study.sha256 == sha256
        assert study.id == f"tiny-{sha256[:8]}"
        assert study.content == content
        assert study.job == job()
        assert study.job_text.encode() == tiny.files["job.yaml"]
        assert study.page == "# Tiny\n"
        assert study.cards() == cards()
        assert study.is_signed_by(tiny.public)
        study.require_signed_by(tiny.public, "lead")


def test_the_file_is_the_same_byte_for_byte(tmp_path: Path, tiny: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny.write(tmp_path / "first.zip").read_bytes()
    weights = tmp_path / "weights"
    weights.write_bytes(OLD_WEIGHTS)
    os.utime(weights, (1e9, 1e9))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    tiny.files = {"models/old_encoder/weights.safetensors": weights} | {
        name: content for name, content in reversed(tiny.files.items()) if not name.startswith("models/old_encoder/w")
    }
    assert tiny.write(tmp_path / "second.zip").read_bytes() == first


def test_a_study_is_extracted_whole(tmp_path: Path, study: Path, tiny: Parts) -> None:
    with open_study(study) as found:
        found.extract(tmp_path / "all")
        found.extract_models(tmp_path / "models")
    wanted = entries_of(study)
    assert wanted.keys() == {*tiny.files, "study.json", "study.sig"}
    extracted = {str(p.relative_to(tmp_path / "all")): p for p in (tmp_path / "all").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in extracted.items()} == wanted
    models = {str(p.relative_to(tmp_path / "models")): p for p in (tmp_path / "models").rglob("*") if p.is_file()}
    assert {f"models/{name}": path.read_bytes() for name, path in models.items()} == {
        name: content for name, content in wanted.items() if name.startswith("models/")
    }
    assert (tmp_path / "models" / "task_head" / "weights.safetensors").read_bytes() == HEAD_WEIGHTS


def test_weights_may_be_left_out(tmp_path: Path) -> None:
    path = parts(included=False).write(tmp_path / "study.zip")
    with open_study(path) as study:
        assert study.cards() == cards()
        study.extract_models(tmp_path / "models")
    assert sorted(p.name for p in (tmp_path / "models").rglob("*") if p.is_file()) == ["card.json"] * 3


def test_a_signature_by_another_key_is_refused_by_name(study: Path) -> None:
    with open_study(study) as found, pytest.raises(StudyError, match="not signed by the coordinator 'lead'"):
        found.require_signed_by(public_of(new_key()), "the coordinator 'lead'")


def test_a_changed_study_json_is_not_signed(study: Path, tiny: Parts) -> None:
    files = entries_of(study)
    files["study.json"] = files["study.json"].replace(b'"attempts":5', b'"attempts":6')
    rezip(study, list(files.items()))
    with open_study(study) as found:
        assert found.manifest.attempts == 6
        assert not found.is_signed_by(tiny.public)


@pytest.mark.parametrize(
    "name",
    [
        "../escape.txt",
        "models/../../escape.txt",
        "/tmp/escape.txt",
        "models/old_encoder/../../../escape.txt",
        "models\\..\\escape.txt",
        "C:\\escape.txt",
        "page.md/",
        "./page.md",
        "PAGE.MD",
        "page.md\n",
        "extra.txt",
        "models/old_encoder/extra.safetensors",
        "models/.hidden.safetensors",
        "models/new_encoder/",
        "",
    ],
)
def test_a_name_that_no_study_has_is_refused(tmp_path: Path, study: Path, name: str) -> None:
    files = entries_of(study)
    rezip(study, [*files.items(), (zipfile.ZipInfo(name), b"escaped")])
    refused(study, "which is no file of a study|a link or another special file")
    assert not list(tmp_path.rglob("*escape*"))


def test_a_name_with_a_zero_byte_is_refused(study: Path) -> None:
    content = bytearray(study.read_bytes())
    at = content.rindex(b"page.md")
    content[at : at + 7] = b"page\0md"
    study.write_bytes(content)
    refused(study, "no file of a study")


@pytest.mark.parametrize("name", ["../up.safetensors", "/etc/passwd", "models/a/b.safetensors", "models/x.pkl"])
def test_a_manifest_that_lists_a_strange_name_is_refused(study: Path, tiny: Parts, name: str) -> None:
    def add(value: dict[str, object]) -> None:
        value["members"] = {**dict(value["members"]), name: {"sha256": "0" * 64, "bytes": 1}}  # type: ignore[call-overload]

    with_manifest(study, tiny.secret, add)
    refused(study, "which is no file of a study")


def test_neither_writes_what_it_would_refuse(tmp_path: Path, tiny: Parts) -> None:
    tiny.files["../up.safetensors"] = b"x"
    tiny.relist()
    with pytest.raises(StudyError, match="no file of a study"):
        tiny.write(tmp_path / "study.zip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["page.md", "study.json", "study.sig", "models/task_head/weights.safetensors"])
def test_a_file_that_is_there_twice_is_refused(study: Path, name: str) -> None:
    files = entries_of(study)
    rezip(study, [*files.items(), (name, files[name])])
    refused(study, "twice")


def test_a_file_that_is_not_listed_is_refused(study: Path) -> None:
    files = entries_of(study)
    rezip(study, [*files.items(), ("models/other.safetensors", b"x")])
    refused(study, "models/other.safetensors is not listed")


@pytest.mark.parametrize("name", ["page.md", "job.yaml", "models/new_encoder/weights.safetensors"])
def test_a_listed_file_that_is_missing_is_refused(study: Path, name: str) -> None:
    files = entries_of(study)
    del files[name]
    rezip(study, list(files.items()))
    refused(study, f"{name} is listed in study.json and missing")


@pytest.mark.parametrize("name", ["study.json", "study.sig"])
def test_a_study_without_its_own_files_is_refused(study: Path, name: str) -> None:
    files = entries_of(study)
    del files[name]
    rezip(study, list(files.items()))
    refused(study, f"holds no {name}")


@pytest.mark.parametrize("needed", ["page.md", "job.yaml", "models/new_encoder/card.json"])
def test_a_manifest_without_a_needed_file_is_refused(study: Path, tiny: Parts, needed: str) -> None:
    files = entries_of(study)
    del files[needed]
    rezip(study, list(files.items()))

    def drop(value: dict[str, object]) -> None:
        value["members"] = {k: v for k, v in dict(value["members"]).items() if k != needed}  # type: ignore[call-overload]

    with_manifest(study, tiny.secret, drop)
    refused(study, "lacks a job, a page, or one of the models")


def test_compression_is_refused_so_nothing_can_be_a_bomb(study: Path) -> None:
    rezip(study, list(entries_of(study).items()), zipfile.ZIP_DEFLATED)
    refused(study, "compressed")


def test_a_file_larger_than_listed_is_refused_before_it_is_read(study: Path) -> None:
    files = entries_of(study)
    rezip(study, list((files | {"page.md": b"x" * (64 << 20)}).items()))
    tracemalloc.start()
    refused(study, f"page.md has {64 << 20} bytes, study.json lists 7")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(("name", "size"), [("study.json", 2 << 20), ("study.sig", 65), ("study.sig", 63)])
def test_own_files_of_a_wrong_size_are_refused(study: Path, name: str, size: int) -> None:
    rezip(study, list((entries_of(study) | {name: b"x" * size}).items()))
    refused(study, f"{name} has {size} bytes")


def test_a_signed_page_that_is_too_large_is_refused(tmp_path: Path, tiny: Parts) -> None:
    tiny.files["page.md"] = b"x" * ((1 << 20) + 1)
    tiny.relist()
    with pytest.raises(StudyError, match=r"page\.md is larger than 1048576 bytes"):
        tiny.write(tmp_path / "study.zip")


def test_headers_that_lie_about_the_size_are_refused(study: Path) -> None:
    """The central directory claims what study.json lists, while the file behind it is another's bytes and shorter."""
    content = bytearray(study.read_bytes())
    files = entries_of(study)
    rezip(study, list((files | {"page.md": b"abc"}).items()))
    content = bytearray(study.read_bytes())
    at = content.rindex(b"page.md") - 46
    assert content[at : at + 4] == b"PK\x01\x02"
    content[at + 20 : at + 28] = struct.pack("<II", 7, 7)
    study.write_bytes(content)
    refused(study, r"page\.md is damaged")


def test_a_directory_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(30000):
            archive.writestr(zipfile.ZipInfo(f"models/{i}.safetensors"), b"")
    tracemalloc.start()
    refused(path, "directory is too large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_changed_byte_in_a_file_is_found_and_named(tmp_path: Path, study: Path) -> None:
    content = study.read_bytes()
    assert content.count(NEW_WEIGHTS) == 1
    study.write_bytes(content.replace(NEW_WEIGHTS, b"N" + NEW_WEIGHTS[1:]))
    with open_study(study) as found, pytest.raises(StudyError, match=r"models/new_encoder/weights.safetensors"):
        found.extract(tmp_path / "all")
    rezip(study, list((entries_of_unchecked(study)).items()))
    with (
        open_study(study) as found,
        pytest.raises(StudyError, match=r"models/new_encoder/weights.safetensors is not what the study was signed"),
    ):
        found.extract_models(tmp_path / "models")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.zip"]


def entries_of_unchecked(path: Path) -> dict[str, bytes]:
    """The files whatever their checksums say."""
    content, found = path.read_bytes(), {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            start = entry.header_offset + 30 + len(entry.filename)
            found[entry.filename] = content[start : start + entry.file_size]
    return found


@pytest.mark.parametrize("name", ["job.yaml", "page.md"])
def test_a_changed_byte_in_job_or_page_is_found_at_once(study: Path, name: str) -> None:
    files = entries_of(study)
    rezip(study, list((files | {name: b"#" + files[name][1:-1] + b"?"}).items()))
    refused(study, f"{name} is not what the study was signed with")


def test_a_changed_card_is_found_and_named(study: Path) -> None:
    files = entries_of(study)
    name = "models/old_encoder/card.json"
    rezip(study, list((files | {name: files[name].replace(b"compact", b"c0mpact")}).items()))
    with open_study(study) as found, pytest.raises(StudyError, match=f"{name} is not what the study was signed with"):
        found.cards()


def test_a_listed_card_of_another_model_is_refused(tmp_path: Path, tiny: Parts) -> None:
    tiny.files["models/old_encoder/card.json"] = tiny.files["models/new_encoder/card.json"]
    tiny.relist()
    path = tiny.write(tmp_path / "study.zip")
    with open_study(path) as found, pytest.raises(StudyError, match="not the card of the old_encoder"):
        found.cards()


@pytest.mark.parametrize(
    "change", [(b'"parameters": 100', b'"parameters": 101'), (b'"family"', b'"famly"'), (b"{", b"[")]
)
def test_a_listed_card_that_is_none_is_refused(tmp_path: Path, tiny: Parts, change: tuple[bytes, bytes]) -> None:
    name = "models/old_encoder/card.json"
    card = tiny.files[name]
    assert isinstance(card, bytes)
    tiny.files[name] = card.replace(*change)
    tiny.relist()
    path = tiny.write(tmp_path / "study.zip")
    with open_study(path) as found, pytest.raises(StudyError, match=r"is not a EncoderCard|is not the card"):
        found.cards()


@pytest.mark.parametrize("sections", [{"name": "other"}, {"coordinator": "other"}])
def test_a_job_that_disagrees_with_the_manifest_is_refused(
    tmp_path: Path, tiny: Parts, sections: dict[str, str]
) -> None:
    tiny.files["job.yaml"] = parts(**sections).files["job.yaml"]
    tiny.relist()
    refused(tiny.write(tmp_path / "study.zip"), f"disagree about the {next(iter(sections))}")


def test_a_job_of_other_models_is_refused(tmp_path: Path, tiny: Parts) -> None:
    text = tiny.files["job.yaml"]
    assert isinstance(text, bytes)
    tiny.files["job.yaml"] = text.replace(cards()[1].digest.encode(), b"f" * 64)
    tiny.relist()
    refused(tiny.write(tmp_path / "study.zip"), "disagree about the new_encoder")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"name: [", "not valid YAML"),
        (b"[" * 60000, "nested too deeply"),
        (b"rounds: 1\n", "unknown key 'rounds'"),
        (b'"\\x1b[8m": 1\n', "unknown key '\\x1b[8m'"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"", "holds no keys"),
    ],
)
def test_a_job_that_is_none_is_refused(tmp_path: Path, tiny: Parts, text: bytes, why: str) -> None:
    tiny.files["job.yaml"] = text
    tiny.relist()
    refused(tiny.write(tmp_path / "study.zip"), "not a job|not a sound study file")
    with pytest.raises(StudyError) as caught:
        opened(tmp_path / "study.zip")
    assert why in str(caught.value)


def test_a_manifest_that_contradicts_itself_about_weights_is_refused(tmp_path: Path, tiny: Parts) -> None:
    entry = tiny.manifest.models["task_head"]
    for update in ({"included": False}, {"weights_sha256": "0" * 64}):
        models = {**tiny.manifest.models, "task_head": entry.model_copy(update=update)}
        manifest = tiny.manifest.model_copy(update={"models": models})
        with pytest.raises(StudyError, match="contradicts itself about the weights of the task_head"):
            write_study(tmp_path / "study.zip", manifest, tiny.files, tiny.secret)


@pytest.mark.parametrize("models", [{}, {"old_encoder": 1}, {"a": 1, "new_encoder": 1, "task_head": 1}])
def test_a_manifest_with_other_models_is_refused(tmp_path: Path, tiny: Parts, models: dict[str, int]) -> None:
    entry = ModelEntry(digest="", weights_sha256="", included=True)
    manifest = tiny.manifest.model_copy(update={"models": dict.fromkeys(models, entry)})
    with pytest.raises(StudyError, match="one of the models old_encoder, new_encoder, task_head"):
        write_study(tmp_path / "study.zip", manifest, tiny.files, tiny.secret)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content + b" ", "not written the one way"),
        (lambda content: content.replace(b'"attempts":5', b'"attempts":4,"attempts":5'), "not written the one way"),
        (lambda content: content.replace(b'"attempts":5', b'"attempts":0'), "attempts"),
        (lambda content: content.replace(b'"attempts":5', b'"attempt":5'), "attempt"),
        (lambda content: content.replace(b"fedbridge.study/1", b"fedbridge.study/2"), "schema"),
        (lambda content: content[:-1], "study.json"),
        (lambda content: b"[" * 100000, "study.json"),
        (lambda content: b"\xff" + content, "study.json"),
    ],
)
def test_a_study_json_that_is_none_is_refused(
    study: Path, tiny: Parts, change: Callable[[bytes], bytes], why: str
) -> None:
    files = entries_of(study)
    content = change(files["study.json"])
    rezip(study, list((files | {"study.json": content, "study.sig": sign(tiny.secret, content)}).items()))
    refused(study, "not a sound study file")
    with pytest.raises(StudyError) as caught:
        opened(study)
    assert why in caught.value.why


@pytest.mark.parametrize("character", ["\x1b", "\r", "\0", "\u202e", "\u200b", "\x9b"])
def test_texts_that_hide_something_are_refused(tmp_path: Path, tiny: Parts, character: str) -> None:
    tiny.files["page.md"] = f"# Harmless {character}[8m budget 1000\n".encode()
    tiny.relist()
    refused(tiny.write(tmp_path / "study.zip"), "not a sound study file")
    tiny = parts()
    tiny.manifest = tiny.manifest.model_copy(update={"purpose": f"good{character}"})
    with pytest.raises(StudyError) as caught:
        opened(tiny.write(tmp_path / "study.zip"))
    assert caught.value.why == f"study.json holds the character U+{ord(character):04X}, which is not for reading"


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO])
def test_links_and_special_files_are_refused(study: Path, kind: int) -> None:
    files: list[Entry] = []
    for name, content in entries_of(study).items():
        entry = zipfile.ZipInfo(name)
        entry.external_attr = ((kind if name == "page.md" else stat.S_IFREG) | 0o644) << 16
        files.append((entry, content))
    rezip(study, files)
    refused(study, "a link or another special file")


def test_an_encrypted_file_is_refused(study: Path) -> None:
    content = bytearray(study.read_bytes())
    at = content.rindex(b"page.md") - 46
    content[at + 8] |= 1
    study.write_bytes(content)
    refused(study, "encrypted")


def test_files_that_overlap_are_refused(study: Path, tiny: Parts) -> None:
    """A signed study.json and the directory agree on a size that the zip can't hold beside the others."""
    name, size = "models/zz.safetensors", study.stat().st_size

    def add(value: dict[str, object]) -> None:
        value["members"] = {**dict(value["members"]), name: {"sha256": "0" * 64, "bytes": size}}  # type: ignore[call-overload]

    with_manifest(study, tiny.secret, add)
    rezip(study, [*entries_of(study).items(), (name, b"")])
    content = bytearray(study.read_bytes())
    at = content.rindex(name.encode()) - 46
    content[at + 20 : at + 28] = struct.pack("<II", size, size)
    study.write_bytes(content)
    refused(study, "its files overlap")


def test_every_truncation_is_refused(tmp_path: Path, study: Path) -> None:
    content = study.read_bytes()
    path = tmp_path / "short.zip"
    for length in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(StudyError):
            opened(path)


def test_any_changed_bytes_are_refused_or_change_nothing(tmp_path: Path, study: Path, tiny: Parts) -> None:
    """Whatever is flipped: either a StudyError, or what was signed comes out unchanged."""
    content, chance, path = study.read_bytes(), random.Random(0), tmp_path / "flipped.zip"
    directory = content.index(b"PK\x01\x02")
    wanted, survived = entries_of(study), 0
    for i in range(600):
        changed = bytearray(content)
        start = directory if i % 2 else 0
        for _ in range(chance.choice((1, 1, 4))):
            changed[chance.randrange(start, len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        place = tmp_path / f"out-{i}"
        try:
            with open_study(path) as found:
                found.require_signed_by(tiny.public, "lead")
                found.cards()
                found.extract(place)
        except StudyError:
            assert not place.exists()
            continue
        survived += 1
        assert {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()} == wanted
    assert 0 < survived < 300  # times, host systems and unused attributes of the zip's directory


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"PK", b"not a zip" * 100, b"PK\x05\x06" + b"\0" * 18, b"\0" * (3 << 20)):
        (tmp_path / "study.zip").write_bytes(content)
        refused(tmp_path / "study.zip", "not a sound study file")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.zip", "can't be read")
    refused(tmp_path, "can't be read")


def test_an_error_of_the_caller_stays_what_it_is(study: Path) -> None:
    with pytest.raises(OSError, match="mine"), open_study(study):
        raise OSError("mine")


def test_nothing_that_is_there_is_extracted_over(tmp_path: Path, study: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with open_study(study) as found:
        for name in ("out", "link"):
            with pytest.raises(StudyError, match="there already"):
                found.extract(tmp_path / name)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_that_can_t_be_written_is_a_storage_error(tmp_path: Path, study: Path, tiny: Parts) -> None:
    (tmp_path / "file").write_bytes(b"")
    with open_study(study) as found, pytest.raises(StudyStorageError) as caught:
        found.extract(tmp_path / "file" / "below")
    assert caught.value.exit_code is ExitCode.STORAGE
    with pytest.raises(StudyStorageError):
        tiny.write(tmp_path / "absent" / "study.zip")


def test_a_file_that_changed_while_it_was_built_leaves_nothing(tmp_path: Path, tiny: Parts) -> None:
    tiny.files["page.md"] = b"# Tinx\n"
    with pytest.raises(StudyError, match=r"page\.md is not what the manifest lists"):
        tiny.write(tmp_path / "study.zip")
    del tiny.files["page.md"]
    with pytest.raises(StudyError, match="not those that the manifest lists"):
        tiny.write(tmp_path / "study.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, tiny: Parts) -> None:
    tiny.files["models/public_vectors.safetensors"] = tmp_path / "absent"
    with pytest.raises(StudyStorageError, match="can't be written"):
        tiny.write(tmp_path / "study.zip")
    assert list(tmp_path.iterdir()) == []
