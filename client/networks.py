"""The networks that a message needs, built from the site's model folders and the broadcast parameters."""

from __future__ import annotations

from bridge.chain import InferenceChain
from bridge.encoders.loading import load_encoder
from bridge.encoders.protocol import Encoder
from bridge.head import load_head
from bridge.prototype import PrototypeBridge
from client.requests import Request
from client.site import Site


def old_encoder(site: Site) -> Encoder:
    """The site's frozen old encoder. Raises `WeightsError`, `ModelsError`."""
    return load_encoder(site.model_folder("old_encoder"))


def broadcast_bridge(request: Request) -> PrototypeBridge:
    """The bridge that the server sent; the request's arrays were checked against its shape."""
    assert request.shape is not None
    bridge = PrototypeBridge(request.shape)
    bridge.load_arrays(request.arrays)
    return bridge


def inference_chain(site: Site, request: Request) -> InferenceChain:
    """The site's frozen networks with the broadcast bridge between them, at the request's positions."""
    return InferenceChain(
        load_encoder(site.model_folder("new_encoder")),
        broadcast_bridge(request),
        old_encoder(site),
        load_head(site.model_folder("task_head")),
        *request.positions,
    )
