"""Formulas, in torch and a little NumPy.

Nothing here reads files, uses the Internet or needs Accelerate. Everything works in float64.
"""
