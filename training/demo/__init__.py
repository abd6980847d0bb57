"""`fused-route demo`: routes compared on real images, questions and weights that packages ship."""
