"""Frozen encoders behind one protocol: the card, the loader, and the families."""
