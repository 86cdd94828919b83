"""What goes to the Hub: model cards, pushes, Spaces."""
