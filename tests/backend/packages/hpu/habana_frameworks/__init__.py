"""Stands in for Intel's package of this name."""
