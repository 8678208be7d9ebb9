"""What a site has agreed to: the studies that it accepted, and what is refused because it did not."""
