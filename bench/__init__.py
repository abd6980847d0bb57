"""Measurements of the project: `python -m bench` from the top folder. Never installed."""
