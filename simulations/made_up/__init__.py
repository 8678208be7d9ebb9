"""Made-up recordings and checkpoints in the published formats: a direction can be tried before its files are there.

Weights are filled with numbers, signals are drawn by rules. Whatever comes out says nothing about any model or patient.
"""
