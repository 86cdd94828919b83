"""Datasets of images, from any source, checked and in an order that only the seed decides."""
