"""`weights list` and `weights convert`, the same under `fedbridge-site` and `fedbridge-sim`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from bridge.errors import ConfigError

if TYPE_CHECKING:
    from bridge.encoders.published import PublishedModel
    from bridge.windows import Modality


def new_weights_app() -> typer.Typer:
    """The sub-command `weights`; each of the main commands has its own and may add to it."""
    app = typer.Typer(help="Published foundation models: what there is, and turning them into model folders.")
    app.command("list")(list_command)
    app.command("convert")(convert_command)
    return app


def list_command(
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Tell of each published model its official file, licence, parameters, input and positions."""
    from bridge.encoders.published import MODELS

    if json:
        import json as json_

        typer.echo(json_.dumps([_facts(model) for model in MODELS], indent=2, ensure_ascii=False))
        return
    for model in MODELS:
        for line in _lines(model):
            typer.echo(line)


def convert_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, as `weights list` tells them.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The model's official file, as it was published.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The model folder to make; must not exist.")],
    channels: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Channels of the windows; as published where left out.")
    ] = "",
    seconds: Annotated[
        float | None, typer.Option(help="Length of the windows in seconds; as published where left out.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Sampling rate of the windows in Hz, for a model that reads several.")
    ] = None,
    modality: Annotated[
        str, typer.Option(metavar="ECG|PPG|EEG|EMG", help="Another modality, for a model that reads several.")
    ] = "",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="An option of this model (`weights list`). May be repeated."
        ),
    ] = None,
    by_window: Annotated[
        bool, typer.Option("--by-window", help="Recordings are epochs: prepare each window by itself.")
    ] = False,
) -> None:
    """Turn a published model's official file into a model folder: safetensors and a sealed card.

    Nothing that is pickled in the file is executed. Every key is used and every parameter filled, or the differences
    are told by name. The network is bound to the channels and the length of its windows. The same file and options
    give the same digest everywhere.
    """
    from bridge.encoders.convert import Conversion, convert, window_for
    from bridge.encoders.published import published_model

    known = published_model(model)
    names = tuple(name.strip() for name in channels.split(",")) if channels else ()
    window = window_for(known, names, seconds, rate, cast("Modality | None", modality or None))
    card = convert(Conversion(known, window, _options(option or [], known), by_window), file, out)
    typer.echo(f"{out}: {known.title}, {card.parameters:,} parameters, {card.positions} positions")
    typer.echo(
        f"  reads {window.modality}: {', '.join(window.channels)}, {window.seconds:g} s at {window.rate_hz:g} Hz"
    )
    typer.echo(f"  sha256 of the file:    {card.training['source_sha256']}")
    typer.echo(f"  sha256 of the weights: {card.weights_sha256}")
    typer.echo(f"  digest of the model:   {card.digest}")
    typer.echo(f"  licence of the weights: {known.licence_weights}; commercial use: {known.commercial_use}")


def _options(texts: list[str], model: PublishedModel) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in found:
            raise ConfigError(
                f"--option {text}: {'given twice' if equals else 'no value'}", fix="write each once, as KEY=VALUE"
            )
        # An option without a list of values is a whole number; the model itself refuses what is none.
        is_number = not model.options.get(name, ("",)) and value.isdecimal()
        found[name] = int(value) if is_number else value
    return found


def _facts(model: PublishedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "title": model.title,
        "modality": model.modality,
        "official_file": model.official_file,
        "licence_code": model.licence_code,
        "licence_weights": model.licence_weights,
        "commercial_use": model.commercial_use,
        "parameters": dict(model.parameters),
        "rate_hz": list(model.rate_hz),
        "unit": model.unit,
        "channels": list(model.channels),
        "seconds": model.seconds,
        "positions": model.positions,
        "options": {name: list(values) for name, values in model.options.items()},
    }


def _lines(model: PublishedModel) -> list[str]:
    low, high = model.rate_hz
    rate = f"{low:g} Hz" if low == high else f"{low:g} to {high:g} Hz"
    sizes = ", ".join(
        f"{number:,}" + (f" ({size})" if size != "base" or len(model.parameters) > 1 else "")
        for size, number in model.parameters.items()
    )
    options = "; ".join(f"{name}={'|'.join(values) or 'NUMBER'}" for name, values in model.options.items())
    return [
        f"{model.name}: {model.title}",
        f"  official file  {model.official_file}",
        f"  licence        code {model.licence_code}, weights {model.licence_weights}",
        f"  commercial use {model.commercial_use.upper() if model.commercial is False else model.commercial_use}",
        f"  parameters     {sizes}",
        f"  input          {model.modality} at {rate}, {model.unit}; as published {model.seconds:g} s of "
        f"{', '.join(model.channels)}",
        f"  positions      {model.positions}",
        f"  options        {options or 'none'}",
    ]
