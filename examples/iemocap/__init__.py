"""TelME on IEMOCAP."""
