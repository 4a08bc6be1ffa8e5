"""Layers and blocks that compute elsewhere, and fall back here. Importing this loads no torch."""
