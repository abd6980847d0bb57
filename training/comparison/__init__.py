"""Arms against each other, over seeds: from one file to a report."""
