"""Data sets in their official layouts, as rows of one form, and the images they are about."""
