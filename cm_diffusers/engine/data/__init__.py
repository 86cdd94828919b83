"""Image datasets from any source. Images are checked before training, and the seed alone decides their order."""
