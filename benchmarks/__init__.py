"""Measurements. Not in the wheel."""
