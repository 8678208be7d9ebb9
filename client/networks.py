"""The networks that a message needs, built from the site's model folders and the broadcast parameters."""

from __future__ import annotations

from bridge.chain import InferenceChain
from bridge.encoders.loading import load_encoder
from bridge.encoders.placed import PlacedEncoder
from bridge.head import load_head
from bridge.prototype import PrototypeBridge
from client.requests import Request
from client.site import Site


def old_encoder(site: Site) -> PlacedEncoder:
    """The site's frozen old encoder, on its machine. Raises `WeightsError`, `ModelsError`, `SiteFileError`."""
    return PlacedEncoder(load_encoder(site.model_folder("old_encoder")), site.compute)


def new_encoder(site: Site) -> PlacedEncoder:
    """The site's frozen new encoder, on its machine. Raises as `old_encoder` does."""
    return PlacedEncoder(load_encoder(site.model_folder("new_encoder")), site.compute)


def broadcast_bridge(request: Request) -> PrototypeBridge:
    """The bridge that the server sent; the request's arrays were checked against its shape."""
    assert request.shape is not None
    bridge = PrototypeBridge(request.shape)
    bridge.load_arrays(request.arrays)
    return bridge


def inference_chain(site: Site, request: Request) -> InferenceChain:
    """The site's frozen networks with the broadcast bridge between them, at the request's positions."""
    return InferenceChain(
        new_encoder(site),
        broadcast_bridge(request),
        old_encoder(site),
        load_head(site.model_folder("task_head")),
        *request.positions,
    )
