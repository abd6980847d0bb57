"""From a recipe to scores: what `fused-route train`, `eval`, `predict` and `generate` do."""
