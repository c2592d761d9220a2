"""How a model is split over devices: functions beside the model, which itself is single-device code."""
