"""Clouds by name: the rules each one documents, and how it is connected."""
