"""Models as programs that need neither this library nor PyTorch: whole samplers, as files and in a page."""
