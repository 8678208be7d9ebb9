"""Published files are read, whatever is pickled in them never runs, and what is no such file is told so."""

from __future__ import annotations

import argparse
import builtins
import collections
import os
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridge.encoders.checkpoint_file import Inert, read_checkpoint
from bridge.errors import WeightsError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor(4), "half": torch.ones(2).half()}


class Calling:
    """Pickles itself as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def saved(path: Path, content: object, **settings: Any) -> Path:
    torch.save(content, path, **settings)
    return path


def foreign(monkeypatch: pytest.MonkeyPatch, module: str, name: str, **contents: Any) -> type:
    """A class of a package that is not installed, for as long as it takes to pickle it."""
    parts = module.split(".")
    for i in range(len(parts)):
        dotted = ".".join(parts[: i + 1])
        monkeypatch.setitem(sys.modules, dotted, sys.modules.get(dotted, types.ModuleType(dotted)))
    made = type(name, (), {"__module__": module, "__qualname__": name, **contents})
    monkeypatch.setattr(sys.modules[module], name, made, raising=False)
    return made


def refusal(path: Path) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    return caught.value


def test_tensors_come_back_with_the_files_hash(tmp_path: Path) -> None:
    import hashlib

    path = saved(tmp_path / "m.pt", {"model": STATE, "epoch": 3, "name": "x", "parts": [1, (2.5, None, True)]})
    read = read_checkpoint(path)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.content["model"].keys() == STATE.keys()
    assert all(torch.equal(read.content["model"][name], tensor) for name, tensor in STATE.items())
    assert (read.content["epoch"], read.content["name"], read.content["parts"]) == (3, "x", [1, (2.5, None, True)])


def test_parameters_and_ordered_dicts_are_read(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2)
    path = saved(tmp_path / "m.pt", {"model": network.state_dict(), "extra": torch.nn.Parameter(torch.ones(2))})
    read = read_checkpoint(path).content
    assert torch.equal(read["model"]["weight"], network.weight)
    assert torch.equal(read["extra"], torch.ones(2))


def test_configurations_pass_as_objects_without_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import HubertConfig

    dict_config = foreign(monkeypatch, "omegaconf.dictconfig", "DictConfig")
    tree = dict_config()
    tree.nested = collections.defaultdict(dict, {"a": {"b": dict_config()}})
    ecg_config = foreign(monkeypatch, "hubert_ecg", "HuBERTECGConfig")()
    ecg_config.hidden_size = 512
    beside = {
        "cfg": tree,
        "args": argparse.Namespace(lr=0.1, of=dict_config()),
        "model_config": HubertConfig(),
        "ecg_config": ecg_config,
        "score": np.float64(0.5),
        "space": types.SimpleNamespace(path=Path("x")),
    }
    read = read_checkpoint(saved(tmp_path / "m.pt", {"model": STATE, **beside})).content
    assert torch.equal(read["model"]["a.weight"], STATE["a.weight"])
    for name in beside:
        assert isinstance(read[name], Inert), name
        assert vars(read[name]) == {}, name


def test_what_is_on_the_list_is_not_run_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of a listed package that would write a file, as it pickles and as it sets its state."""
    victim = tmp_path / "written"
    module = types.ModuleType("fairseq_signals")

    def write(text: str) -> None:
        victim.write_text(text)

    write.__module__, write.__qualname__ = "fairseq_signals", "write"
    module.write = write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fairseq_signals", module)

    def state(self: object, state: object) -> None:
        victim.write_text("state")

    thing = foreign(monkeypatch, "transformers.evil", "Thing", __setstate__=state, __getstate__=lambda self: {"x": 1})
    read = read_checkpoint(saved(tmp_path / "m.pt", {"model": STATE, "cfg": Calling(write, "x"), "more": thing()}))
    assert isinstance(read.content["cfg"], Inert)
    assert isinstance(read.content["more"], Inert)
    assert not victim.exists()


@pytest.mark.parametrize("where", ["alone", "beside", "inside", "deep"])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, "posix.system"),
        (builtins.exec, "builtins.exec"),
        (builtins.open, "io.open"),
        (builtins.getattr, "builtins.getattr"),
        (Path.write_text, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
    ],
)
def test_a_hostile_pickle_has_no_effect(tmp_path: Path, where: str, function: Callable[..., Any], named: str) -> None:
    victim = tmp_path / "written"
    words: dict[object, tuple[object, ...]] = {
        os.system: (f"touch {victim}",),
        builtins.exec: (f"open({str(victim)!r}, 'w')",),
        builtins.open: (str(victim), "w"),
        Path.write_text: (victim, "x"),
    }
    evil = Calling(function, *words.get(function, ("x", "y")))
    contents: dict[str, object] = {
        "alone": evil,
        "beside": {"model": STATE, "cfg": evil},
        "inside": {"model": {**STATE, "b": evil}},
        "deep": {"model": STATE, "cfg": [({"x": argparse.Namespace(y=evil)},)]},
    }
    error = refusal(saved(tmp_path / "m.pt", contents[where]))
    assert "nothing of it was run" in error.what
    assert named in error.why
    assert not victim.exists()


def test_a_tensor_that_is_rebuilt_by_a_stranger_is_refused(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    assert "torch._utils._rebuild_sparse_tensor" in refusal(saved(tmp_path / "m.pt", {"a": sparse})).why
    meta = torch.zeros(3, device="meta")
    assert "torch._utils._rebuild_meta_tensor_no_storage" in refusal(saved(tmp_path / "m.pt", {"a": meta})).why


def test_what_is_no_checkpoint_is_told_so(tmp_path: Path) -> None:
    assert "can't be read" in refusal(tmp_path / "absent.pt").what
    assert "can't be read" in refusal(tmp_path).what
    path = tmp_path / "m.pt"
    for content in (b"", b"{}", b"\x80\x02}q\x00.", bytes(1000)):
        path.write_bytes(content)
        assert "and this is none" in refusal(path).why
    saved(path, {"model": STATE}, _use_new_zipfile_serialization=False)
    assert "since torch 1.6" in refusal(path).why
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not one that torch.save writes" in refusal(path).why
    assert "a list and no weights by name" in refusal(saved(path, [torch.ones(2)])).why


def test_truncated_and_damaged_files_are_told_so(tmp_path: Path) -> None:
    whole = saved(tmp_path / "m.pt", {"model": {"a": torch.ones(1000)}}).read_bytes()
    path = tmp_path / "n.pt"
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        error = refusal(path)
        assert "truncated" in error.why or "damaged" in error.why
    place = whole.index(torch.ones(4).numpy().tobytes()) + 40
    path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    assert "does not have its checksum" in refusal(path).why


def repacked(source: Path, target: Path, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", how) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def test_more_than_there_is_is_not_believed(tmp_path: Path) -> None:
    path, other = saved(tmp_path / "m.pt", {"a": torch.arange(10.0)}), tmp_path / "n.pt"
    assert torch.equal(read_checkpoint(repacked(path, other, lambda _, old: old)).content["a"], torch.arange(10.0))

    def declare(count: int, both: bool = True) -> Callable[[str, bytes], bytes]:
        number = b"J" + struct.pack("<i", count)
        times = -1 if both else 1
        return lambda name, old: old.replace(b"K\n", number, times) if name.endswith("data.pkl") else old

    for change in (declare(1_000_000), declare(2_000_000_000), declare(-1), declare(100, both=False)):
        assert refusal(repacked(path, other, change)).what == f"{other}: no checkpoint that can be read"
    error = refusal(repacked(path, other, lambda _, old: old + bytes(2**20), zipfile.ZIP_DEFLATED))
    assert "compressed" in error.why
    wide = {"a": torch.zeros(1).expand(10_000_000_000), "b": torch.zeros(3)}
    assert "declare 40,000,000,012 bytes" in refusal(saved(path, wide)).why


def test_a_table_of_contents_that_declares_more_than_the_file_is_refused(tmp_path: Path) -> None:
    content = bytearray(saved(tmp_path / "m.pt", {"a": torch.arange(10.0)}).read_bytes())
    uncompressed_size = content.index(b"PK\x01\x02") + 24
    content[uncompressed_size : uncompressed_size + 4] = struct.pack("<I", 2**31)
    (tmp_path / "n.pt").write_bytes(content)
    assert refusal(tmp_path / "n.pt").why.startswith("it declares 2,147,")


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", {"a": torch.arange(10.0)})
    swapped = repacked(path, tmp_path / "n.pt", lambda name, old: b"big" if name.endswith("byteorder") else old)
    assert "another byte order" in refusal(swapped).why


def test_a_pickle_of_another_protocol_is_refused(tmp_path: Path) -> None:
    error = refusal(saved(tmp_path / "m.pt", {"model": STATE, "x": os.getcwd}, pickle_protocol=4))
    assert "STACK_GLOBAL" in error.why
