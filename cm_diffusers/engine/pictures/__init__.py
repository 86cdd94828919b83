"""What people look at: samples, curves, diagnostics, the report of runs."""
