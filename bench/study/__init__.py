"""Does routing help? The study under docs/study, made and written."""
