"""A site on a machine of its own: its folder, its keys, its part of Flower, and what runs there."""
