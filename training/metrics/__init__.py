"""Scores as the official evaluations of the data sets count them."""
