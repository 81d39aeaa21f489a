"""The same function as the dense formula, cheaper."""
