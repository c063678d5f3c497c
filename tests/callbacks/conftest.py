"""Searches in their smallest form."""

from smallest_search import digits, fit, float_state, foreign, made_up_device, search

__all__ = ["digits", "fit", "float_state", "foreign", "made_up_device", "search"]
