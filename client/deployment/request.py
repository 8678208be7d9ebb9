"""The enrolment request: what the coordinator registers, signed by the node's own key."""

from __future__ import annotations

import base64

import yaml

from bridge.enrolment import EnrolmentRequest, signed_bytes
from client.deployment.keys import node_key, public_line
from client.site import Site


def make_request(site: Site) -> EnrolmentRequest:
    """The site's request: ECDSA with SHA-384 over name and key. Raises `EnrolmentError` where the key can't be used."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = node_key(site)
    public = public_line(key)
    signature = key.sign(signed_bytes(site.name, public), ec.ECDSA(hashes.SHA384()))
    return EnrolmentRequest(site=site.name, public_key=public, signature=base64.b64encode(signature).decode())


def request_text(request: EnrolmentRequest) -> str:
    """As it is sent: a YAML file."""
    return yaml.safe_dump(request.model_dump(mode="json", by_alias=True), sort_keys=False)
