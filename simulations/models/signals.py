"""The signals and windows of a source, told from its configuration: a plan needs them before there is any recording."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.windows import Modality
from client.readers.fog import EMG_CHANNELS, FogReader
from client.readers.fog import RATE_HZ as FOG_HZ
from client.readers.isruc import EPOCH_SECONDS, IsrucReader
from client.readers.isruc import RATE_HZ as ISRUC_HZ
from client.readers.wesad import ECG_HZ, PPG_HZ
from simulations.config import DataConfig
from simulations.datasets.cinc2015 import RATE_HZ as CINC2015_HZ
from simulations.datasets.eegmat import CHANNELS_EEG
from simulations.datasets.eegmat import RATE_HZ as EEGMAT_HZ
from simulations.source import SignalSource


@dataclass(frozen=True)
class Signals:
    """Both modalities as the files hold them, and the length of a window."""

    old: SignalSource
    new: SignalSource
    seconds: float
    by_window: bool = False
    """Whether recordings are cut into epochs of their own, each prepared by itself."""


def signals_of(data: DataConfig) -> Signals:
    """What the source that `data` names will have."""
    if data.source == "builtin":
        made = data.builtin
        ecg, ppg = SignalSource("ECG", ("ECG",), made.ecg_rate_hz), SignalSource("PPG", ("PPG",), made.ppg_rate_hz)
        return Signals(ecg, ppg, made.window_seconds)
    if data.cinc2015 is not None and data.source == "cinc2015":
        ecg, ppg = SignalSource("ECG", ("ECG",), CINC2015_HZ), SignalSource("PPG", ("PPG",), CINC2015_HZ)
        return Signals(ecg, ppg, data.cinc2015.window_seconds)
    if data.eegmat is not None and data.source == "eegmat":
        eeg, ecg = SignalSource("EEG", CHANNELS_EEG, EEGMAT_HZ), SignalSource("ECG", ("ECG",), EEGMAT_HZ)
        return Signals(eeg, ecg, data.eegmat.window_seconds)
    if data.isruc is not None and data.source == "isruc":
        named = IsrucReader({}).options.signals
        eeg = SignalSource("EEG", tuple(named["EEG"].channels), ISRUC_HZ)
        both = [eeg, SignalSource("ECG", tuple(named["ECG"].channels), ISRUC_HZ)]
        return _signals(both, data.isruc.old, EPOCH_SECONDS, by_window=True)
    if data.fog is not None and data.source == "fog":
        both = [
            SignalSource("EEG", tuple(FogReader({}).options.eeg), FOG_HZ),
            SignalSource("EMG", EMG_CHANNELS, FOG_HZ),
        ]
        # Shuffled windows have strangers beside them.
        return _signals(both, data.fog.old, data.fog.window_seconds, by_window=data.fog.windows == "shuffled_008")
    assert data.wesad is not None
    both = [SignalSource("ECG", ("ECG",), ECG_HZ), SignalSource("PPG", ("PPG",), PPG_HZ)]
    return _signals(both, data.wesad.old, data.wesad.window_seconds)


def _signals(both: list[SignalSource], old: Modality, seconds: float, *, by_window: bool = False) -> Signals:
    first, second = both if both[0].modality == old else both[::-1]
    return Signals(first, second, seconds, by_window)
