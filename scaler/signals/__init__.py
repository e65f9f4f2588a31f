"""scaler.signals."""
