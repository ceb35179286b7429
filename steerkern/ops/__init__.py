"""The two ops and their backends."""
