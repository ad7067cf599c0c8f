"""TelME on MELD."""
