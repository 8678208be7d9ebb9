"""The published foundation models: what each is, what its official file is called, and which code reads that file.

Nothing here imports torch, so licences and inputs can be listed at once. A model's network and its reading of the
official file are in its own module, imported when they are asked for; that module has the encoder's class and

- `unwrap(loaded)`: the state dict out of what the official file holds, wrapper and prefixes taken off;
- `published(state, window, **options)`: the encoder's tensors and its architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from bridge.config import Settings
from bridge.errors import ConfigError
from bridge.windows import Modality, WindowSpec

if TYPE_CHECKING:
    from torch import Tensor

    from bridge.encoders.split import SplitEncoder

FORBIDDEN = "forbidden"
"""What a card says of commercial use (`training.commercial_use`) where the licence of the weights forbids it."""


@dataclass(frozen=True)
class PublishedModel:
    """One published foundation model."""

    name: str
    """What commands call it."""
    title: str
    """What its authors call it."""
    modality: Modality
    module: str
    """Its module in `bridge.encoders`."""
    encoder_class: str
    """Its encoder's class in that module; the class says which family it is."""
    official_file: str
    licence_code: str
    licence_weights: str
    commercial: bool | None
    """Whether the licence of the weights lets companies use them; None where it must be read at their source."""
    parameters: Mapping[str, int]
    """Parameters of the encoder by size; a model of one size has the one entry `base`."""
    rate_hz: tuple[float, float]
    """Lowest and highest sampling rate of its windows."""
    unit: str
    """What the values of a window are."""
    positions: str
    """Its list of blocks as its authors call it, with their number."""
    channels: tuple[str, ...]
    """Channels of the published experiments, which a conversion takes where none are named."""
    seconds: float
    """Length of their windows."""
    unused: tuple[str, ...] = ()
    """Patterns of the unwrapped state's keys that the encoder does not need."""
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Options of a conversion and their values, the default first; without values: a whole number."""

    @property
    def commercial_use(self) -> str:
        """What the licence of the weights says of commercial use, in words that cards and reports repeat."""
        words = {True: "permitted", False: FORBIDDEN, None: "not settled here: read the licence at its source"}
        return words[self.commercial]

    def unwrap(self, loaded: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The model's state dict out of what the official file holds. Raises `WeightsError`."""
        return cast("Mapping[str, Tensor]", self._module().unwrap(loaded))

    def convert(
        self, state: Mapping[str, Tensor], window: WindowSpec, **options: str | int
    ) -> tuple[Mapping[str, Tensor], Settings]:
        """The encoder's tensors and architecture, from an unwrapped state dict, for these windows.

        Raises `ConfigError` for an option that the model has not, `WindowError` where the windows don't fit, and
        `WeightsError` with the names of missing, extra and misshapen keys.
        """
        self.check_options(options)
        return cast("tuple[Mapping[str, Tensor], Settings]", self._module().published(state, window, **options))

    def encoder(self) -> type[SplitEncoder]:
        """The encoder's class."""
        return cast("type[SplitEncoder]", getattr(self._module(), self.encoder_class))

    def check_options(self, options: Mapping[str, str | int]) -> None:
        """Raise `ConfigError` for an option that the model has not, or a value that can't be."""
        for name, value in options.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ConfigError(f"{self.title} has no option '{name}'", fix=f"its options: {known}")
            values = self.options[name]
            if values and value not in values:
                raise ConfigError(f"option {name} can't be {value!r}", fix=f"choose one of {', '.join(values)}")
            if not values and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"option {name} can't be {value!r}", fix="give a whole number, 0 or more")

    def _module(self) -> Any:
        return import_module(f"bridge.encoders.{self.module}")


MODELS: tuple[PublishedModel, ...] = (
    PublishedModel(
        name="labram",
        title="LaBraM-base",
        modality="EEG",
        module="labram",
        encoder_class="LabramEncoder",
        official_file="labram-base.pth",
        licence_code="MIT",
        licence_weights="MIT",
        commercial=True,
        parameters={"base": 5_819_536},
        rate_hz=(200, 200),
        unit="microvolt / 100",
        positions="blocks (12)",
        channels=("F3", "C3", "O1", "F4", "C4", "O2"),
        seconds=30,
        unused=("norm.*", "mask_token", "lm_head.*", "projection_head.*"),
        options={
            "electrode_embedding": ("on", "off"),
            "time_embedding": ("interpolated", "random"),
            "seed": (),
        },
    ),
    PublishedModel(
        name="hubert-ecg",
        title="HuBERT-ECG",
        modality="ECG",
        module="hubert_ecg",
        encoder_class="HubertEcgEncoder",
        official_file="hubert_ecg_small.pt, hubert_ecg_base.pt or hubert_ecg_large.pt",
        licence_code="CC BY-NC 4.0",
        licence_weights="CC BY-NC 4.0",
        commercial=False,
        parameters={"small": 30_209_664, "base": 92_798_848, "large": 187_644_736},
        rate_hz=(100, 100),
        unit="standard deviations (z-scored)",
        positions="encoder.layers (small 8, base 12, large 16)",
        channels=("ECG",),
        seconds=30,
        unused=("final_proj.*", "label_embedding.*"),
        options={"leads": ("none", "zero_pad", "repeat"), "heads": ()},
    ),
    PublishedModel(
        name="papagei",
        title="PaPaGei-S",
        modality="PPG",
        module="papagei",
        encoder_class="PapageiEncoder",
        official_file="papagei_s.pt",
        licence_code="BSD 3-Clause Clear",
        licence_weights="see its Zenodo record",
        commercial=None,
        parameters={"base": 5_797_554},
        rate_hz=(125, 125),
        unit="standard deviations (z-scored)",
        positions="basicblock_list (18)",
        channels=("PPG",),
        seconds=60,
        # The first block has a norm that its authors never run.
        unused=("basicblock_list.0.bn1.*", "final_bn.*", "dense.*", "expert_layers_*", "gating_network_*"),
    ),
    PublishedModel(
        name="normwear",
        title="NormWear",
        modality="EMG",
        module="normwear",
        encoder_class="NormwearEncoder",
        official_file="normwear_last_checkpoint-15470-correct.pth",
        licence_code="Apache 2.0",
        licence_weights="Apache 2.0",
        commercial=True,
        parameters={"base": 128_118_528},
        rate_hz=(65, 130),
        unit="standard deviations (z-scored)",
        positions="backbone.encoder_blocks (12)",
        channels=("EMG1", "EMG2", "EMG3"),
        seconds=3,
        unused=("norm.*", "decoder*", "mask_token", "temporal_recon*", "spatial_recon*"),
        options={"heads": ()},
    ),
    PublishedModel(
        name="ecg-fm",
        title="ECG-FM",
        modality="ECG",
        module="ecg_fm",
        encoder_class="EcgFmEncoder",
        official_file="mimic_iv_ecg_physionet_pretrained.pt",
        licence_code="MIT",
        licence_weights="see its model card (wanglab/ecg-fm-preprint)",
        commercial=None,
        parameters={"base": 90_373_248},
        rate_hz=(500, 500),
        unit="standard deviations (z-scored)",
        positions="encoder.layers (12)",
        channels=("ECG",),
        seconds=30,
        unused=("mask_emb", "quantizer.*", "project_q.*", "final_proj.*"),
        options={"heads": ()},
    ),
)


def published_model(name: str) -> PublishedModel:
    """The published model of this name; raises `ConfigError` with the names that there are."""
    for model in MODELS:
        if model.name == name:
            return model
    raise ConfigError(
        f"'{name}' is no published model that can be converted",
        fix=f"name one of {', '.join(model.name for model in MODELS)}",
    )
