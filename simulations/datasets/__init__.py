"""Real open sets as sources of a simulation; their files stay where they are."""
