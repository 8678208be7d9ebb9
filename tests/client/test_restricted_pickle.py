"""Arrays and plain containers come through whoever pickled them; whatever else is refused and has no effect."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.errors import RecordingError, UnsafePickleError
from client.readers.restricted_pickle import load_plain
from simulations.made_up.python2 import write_python2

PLAIN: dict[str, Any] = {
    "subject": "S2",
    "signal": {"chest": {"ECG": np.arange(12, dtype=np.float64).reshape(6, 2)}, "empty": []},
    "label": np.array([0, 1, -2], dtype=np.int32),
    "more": (1, 2.5, None, True, -(2**70), {"a"}, b"\x00\xff"),
    "turned": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "big": np.arange(5, dtype=">i2"),
    "none": np.zeros((0, 3)),
}


def dumped(path: Path, value: Any, protocol: int) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            same(found[key], wanted[key])
    elif isinstance(wanted, np.ndarray):
        assert type(found) is np.ndarray
        assert found.dtype == wanted.dtype.newbyteorder("=")
        assert np.array_equal(found, wanted)
        assert found.shape == wanted.shape
        assert found.flags.writeable
    else:
        assert found == wanted


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_content_comes_through_every_protocol(tmp_path: Path, protocol: int) -> None:
    # Before protocol 4 a set is a call of a builtin.
    content = PLAIN if protocol >= 4 else {**PLAIN, "more": (1, 2.5, None, True, -(2**70), b"\x00\xff")}
    same(load_plain(dumped(tmp_path / "a.pkl", content, protocol)), content)


def test_python_2s_pickles_come_through(tmp_path: Path) -> None:
    content = {**PLAIN, "more": [1, 2.5, None, "caf\xe9"], "scalar": np.float32(0.5), "long": "x" * 300}
    path = write_python2(tmp_path / "a.pkl", content)
    names = {argument for opcode, argument, _ in pickletools.genops(path.read_bytes()) if opcode.name == "GLOBAL"}
    assert names == {
        "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "numpy.core.multiarray scalar"
    }  # fmt: skip
    same(load_plain(path), content)


def test_an_object_is_unpacked_once_however_often_it_is_held(tmp_path: Path) -> None:
    array = np.arange(3.0)
    bomb: list[Any] = [array]
    for _ in range(40):
        bomb = [bomb, bomb]  # 2**40 leaves, were each unpacked
    found = load_plain(dumped(tmp_path / "a.pkl", bomb, 2))
    assert found[0] is found[1]


class Calls:
    """Pickles to a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: Path) -> dict[str, Any]:
    shell = f"touch {marker}"
    return {
        "os.system": Calls(os.system, shell),
        "in a dict": {"signal": {"chest": Calls(os.system, shell)}},
        "as a key": {Calls(os.system, shell): 1},
        "eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(marker)!r}, 'w')"),
        "open": Calls(open, str(marker), "w"),
        "subprocess": Calls(subprocess.call, ["touch", str(marker)]),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "numpy's file": Calls(np.save, str(marker), 1),
        "another class": collections.OrderedDict(a=1),
        "objects in an array": np.array([Calls(os.system, shell)], dtype=object),
        "plain objects in an array": np.array([{}], dtype=object),
        "composed type": np.zeros(2, dtype=[("a", "f8"), ("b", "O")]),
        "a date": np.zeros(2, dtype="M8[s]"),
        "a subclass": np.ma.masked_array([1.0]),
        "a path": Path("a"),
    }


@pytest.mark.parametrize("kind", hostile(Path("x")))
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles_have_no_effect(tmp_path: Path, kind: str, protocol: int) -> None:
    marker = tmp_path / "marker"
    path = dumped(tmp_path / "a.pkl", hostile(marker)[kind], protocol)
    with pytest.raises(UnsafePickleError, match=r"a\.pkl: is a pickle that asks for") as caught:
        load_plain(path)
    assert "nothing of it was run" in caught.value.why
    assert not marker.exists()


def test_what_a_pickle_names_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnsafePickleError, match=r"asks for posix\.system"):
        load_plain(dumped(tmp_path / "a.pkl", Calls(os.system, "true"), 2))


def by_hand(code: bytes, protocol: bytes = b"\x80\x04") -> bytes:
    return protocol + code + b"."


NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(b"Pidentifier\n", id="persistent id"),
        pytest.param(b"\x82\x01", id="extension"),
        pytest.param(b"(ios\nsystem\n", id="instance"),
        pytest.param(b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R", id="stack global"),
        pytest.param(NDARRAY, id="the class itself"),
        pytest.param(RECONSTRUCT, id="a function itself"),
        pytest.param(RECONSTRUCT + DTYPE + b"K\x00\x85\x8c\x01b\x87R", id="array of another class"),
        pytest.param(DTYPE + b"\x8c\x01O\x85R", id="object type"),
        pytest.param(DTYPE + b"\x8c\x07(100,)O\x85R", id="sub-array type"),
        # A type of plain bytes whose state smuggles in fields of objects.
        pytest.param(
            DTYPE + b"\x8c\x02S8\x85R(K\x03\x8c\x01|N\x8c\x01a\x85}\x8c\x01aK\x00sK\x08K\x01K\x00tb",
            id="fields in a state",
        ),
        pytest.param(b"c_codecs\nencode\n\x8c\x01a\x8c\x05rot13\x86R", id="another encoding"),
        pytest.param(b"]\x94h\x00a", id="a list that holds itself"),
        pytest.param(b"]" * 1 + b"]" * 200 + b"a" * 200, id="deep"),
    ],
)  # fmt: skip
def test_pickles_written_by_hand_are_refused(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "a.pkl").write_bytes(by_hand(code))
    with pytest.raises(RecordingError, match=r"a\.pkl: "):
        load_plain(tmp_path / "a.pkl")


def test_no_pickle_changes_the_machine_for_the_next(tmp_path: Path) -> None:
    # BUILD with a pair sets attributes of any object: here the defaults of the function that makes arrays.
    (tmp_path / "a.pkl").write_bytes(by_hand(RECONSTRUCT + b"N}\x8c\x0c__defaults__K\x01\x85s\x86b"))
    (tmp_path / "b.pkl").write_bytes(by_hand(NDARRAY + b"N}\x8c\x0c__setstate__Ns\x86b"))
    for name in ("a", "b"):
        with pytest.raises(RecordingError):
            load_plain(tmp_path / f"{name}.pkl")
    same(load_plain(dumped(tmp_path / "c.pkl", PLAIN, 4)), PLAIN)


def test_sizes_that_a_pickle_only_claims_take_no_memory(tmp_path: Path) -> None:
    claims = {
        "bytes": b"\x8e" + struct.pack("<Q", 2**50),
        "text": b"T" + struct.pack("<i", 2**31 - 1),
        "memo": b"Nr\xff\xff\xff\xff",
        "array": RECONSTRUCT + NDARRAY + b"K\x00\x85\x8c\x01b\x87R(K\x01J\x00\x00\x00\x7f\x85" + DTYPE
        + b"\x8c\x02f8\x85R\x89U\x08" + 8 * b"\x00" + b"tb",
    }  # fmt: skip
    for name, code in claims.items():
        (tmp_path / f"{name}.pkl").write_bytes(by_hand(code))
        if name == "memo":
            assert load_plain(tmp_path / "memo.pkl") is None
            continue
        with pytest.raises(RecordingError, match="can't be read as a pickle"):
            load_plain(tmp_path / f"{name}.pkl")


@pytest.mark.parametrize("keep", [0, 1, 2, 10, 110, 250])
def test_truncated_pickles_are_refused(tmp_path: Path, keep: int) -> None:
    path = write_python2(tmp_path / "a.pkl", PLAIN)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RecordingError, match=r"a\.pkl: can't be read as a pickle") as caught:
        load_plain(path)
    assert not isinstance(caught.value, UnsafePickleError)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"not a pickle", bytes(range(256)), b"\x89HDF\r\n\x1a\n" + bytes(100)):
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(RecordingError, match=r"a\.pkl: "):
            load_plain(tmp_path / "a.pkl")
    with pytest.raises(RecordingError, match=r"b\.pkl: can't be read as a pickle"):
        load_plain(tmp_path / "b.pkl")


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = write_python2(tmp_path / "a.pkl", PLAIN).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "b.pkl").write_bytes(bytes(damaged))
        try:
            load_plain(tmp_path / "b.pkl")
        except RecordingError:
            continue
