"""Pictures of runs: samples, curves, diagnostics, and the report."""
