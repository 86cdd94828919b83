"""Export whole samplers as files and web pages that need neither this library nor PyTorch."""
