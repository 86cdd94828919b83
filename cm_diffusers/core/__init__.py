"""The mathematics: pure torch, no files, no network, no Accelerate. Everything works in float64."""
