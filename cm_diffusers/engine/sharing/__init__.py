"""Publishing on the Hub: model cards, pushes and Spaces."""
