"""The loop around the decision: when to record, what to ask, what to freeze. NumPy only."""
