"""The mathematics: torch and a little NumPy, no files, no network, no Accelerate. Everything works in float64."""
