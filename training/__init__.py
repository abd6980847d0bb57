"""Training on real data: the demo, its data set and its reports."""
