"""What the published models were trained to read: their authors' steps from a recording to a window.

Each is for a whole recording; recordings that are epochs of their own (ISRUC-Sleep) take `Preprocessing.by_window`.
NormWear's scalogram is no step: its encoder makes it (`bridge.encoders.normwear`). Nothing here imports torch.
"""

from __future__ import annotations

from bridge.windows import ChebyshevBandpass, FirBandpass, Preprocessing, Resampling

LABRAM = Preprocessing(scale=0.01, stages=(Resampling(method="linear"),), normalise="none")
"""From microvolts to hundreds of microvolts, not normalised."""

HUBERT_ECG = Preprocessing(
    stages=(
        Resampling(method="linear", rate_hz=500),
        FirBandpass(taps=151, band_hz=(0.05, 47)),
        Resampling(method="linear", rate_hz=100),
    ),
    normalise="recording",
)

ECG_FM = Preprocessing(stages=(Resampling(method="linear"),), normalise="recording")

PAPAGEI = Preprocessing(
    stages=(
        Resampling(method="fourier", rate_hz=125),
        ChebyshevBandpass(order=4, ripple_db=0.5, band_hz=(0.5, 12)),
    ),
    normalise="recording",
)

NORMWEAR = Preprocessing(stages=(Resampling(method="linear"),), normalise="recording")

RECIPES = {"labram": LABRAM, "hubert-ecg": HUBERT_ECG, "ecg-fm": ECG_FM, "papagei": PAPAGEI, "normwear": NORMWEAR}
"""By the name that commands call a published model."""
