"""Placement beside proven optima."""
