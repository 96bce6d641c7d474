"""Train models to adapt, and adapt them online."""
