"""Cards of encoders that are still to be made: the layout at each position, from the configuration alone.

No recording and no file of weights is opened, except the card of a ready model folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bridge.encoders.cards import EncoderCard, Layout, read_card
from bridge.encoders.checkpoints import require_window
from bridge.encoders.leads import LEADS, lead_places
from bridge.encoders.speech import SpeechArchitecture, require_a_token
from bridge.encoders.split import SplitEncoder
from bridge.windows import Preprocessing, WindowSpec
from simulations.models.config import NewEncoderConfig, PublishedConfig, Size
from simulations.source import SignalSource


def planned_card(encoder: NewEncoderConfig, signal: SignalSource, seconds: float) -> EncoderCard:
    """The windows and layouts of an encoder to come, of a source's signal; of a ready folder, its own card.

    Raises `ConfigError` and `WindowError` where the model can't read the signal, `WeightsError` where a folder holds
    no model.
    """
    window = encoder.spec(signal, seconds)
    if encoder.folder is not None:
        return read_card(encoder.folder, EncoderCard)
    if encoder.published is not None:
        return published_card(encoder.published, window)
    sizes = encoder.architecture
    return _card("compact", window, ((sizes.tokens, sizes.width),) * (sizes.blocks + 1))


def published_card(published: PublishedConfig, window: WindowSpec) -> EncoderCard:
    """The layouts of a published model of this size. Raises `WindowError` where it can't read such windows."""
    layouts = _LAYOUTS[published.model](published, window)
    return _card(published.model, window, layouts)


def _card(family: str, window: WindowSpec, layouts: tuple[Layout, ...]) -> EncoderCard:
    return EncoderCard(
        family=family,
        window=window,
        preprocessing=Preprocessing(),
        layouts_in=layouts[:-1],
        layouts_out=layouts[1:],
        parameters=0,
        weights_sha256="",
    )


_HUBERT: dict[Size, tuple[int, int, int, int]] = {
    "small": (512, 8, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (960, 16, 12, 3840),
}
"""Width, layers, heads and feed-forward width."""

_ECG_FM = SpeechArchitecture(
    width=768,
    layers=12,
    heads=12,
    feed_forward=3072,
    filters=(256,) * 4,
    kernels=(2,) * 4,
    strides=(2,) * 4,
    place_kernel=128,
    place_groups=16,
)


def _hubert_ecg(published: PublishedConfig, window: WindowSpec) -> tuple[Layout, ...]:
    width, layers, heads, feed_forward = _HUBERT[published.size or "base"]
    architecture = SpeechArchitecture(
        width=width,
        layers=layers,
        heads=heads,
        feed_forward=feed_forward,
        filters=(512,) * 5,
        kernels=(10, 3, 3, 2, 2),
        strides=(4, 2, 2, 2, 2),
        place_kernel=128,
        place_groups=16,
    )
    leads = len(window.channels) if published.options.get("leads", "none") == "none" else len(LEADS)
    return _speech(published, window, architecture, window.samples * leads)


def _ecg_fm(published: PublishedConfig, window: WindowSpec) -> tuple[Layout, ...]:
    return _speech(published, window, _ECG_FM, window.samples)


def _speech(
    published: PublishedConfig, window: WindowSpec, architecture: SpeechArchitecture, samples: int
) -> tuple[Layout, ...]:
    """By the convolutions' rule: these networks are `transformers`', whose import alone takes seconds."""
    model = published.known
    require_window(window, model.modality, model.rate_hz, model.title)
    lead_places(window, model.title)
    require_a_token(architecture, samples, model.title)
    return ((architecture.tokens(samples), architecture.width),) * (architecture.layers + 1)


def _labram(published: PublishedConfig, window: WindowSpec) -> tuple[Layout, ...]:
    from bridge.encoders.labram import LabramArchitecture, LabramEncoder

    # Windows beyond the published time embedding get a longer one in conversion.
    seconds = max(LabramArchitecture().seconds, round(window.seconds))
    electrodes = {"electrode_embedding": published.options.get("electrode_embedding", "on"), "seconds": seconds}
    return _walked(LabramEncoder.skeleton(window, LabramArchitecture.model_validate(electrodes)))


def _papagei(published: PublishedConfig, window: WindowSpec) -> tuple[Layout, ...]:
    from bridge.encoders.papagei import PapageiArchitecture, PapageiEncoder

    return _walked(PapageiEncoder.skeleton(window, PapageiArchitecture()))


def _normwear(published: PublishedConfig, window: WindowSpec) -> tuple[Layout, ...]:
    from bridge.encoders.normwear import NormwearArchitecture, NormwearEncoder

    return _walked(NormwearEncoder.skeleton(window, NormwearArchitecture()))


def _walked(network: SplitEncoder) -> tuple[Layout, ...]:
    """Of a network that has shapes and no values."""
    last = network.positions - 1
    return (*(network.layout(i, "in") for i in range(network.positions)), network.layout(last, "out"))


_LAYOUTS: Mapping[str, Callable[[PublishedConfig, WindowSpec], tuple[Layout, ...]]] = {
    "labram": _labram,
    "hubert-ecg": _hubert_ecg,
    "papagei": _papagei,
    "normwear": _normwear,
    "ecg-fm": _ecg_fm,
}
