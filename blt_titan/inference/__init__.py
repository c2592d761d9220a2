"""What a trained model is asked: held-out bits per byte, and text."""
