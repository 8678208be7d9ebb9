"""The coordinator's own machine: its folder, keys and certificates, the door for the sites, who is let in."""
