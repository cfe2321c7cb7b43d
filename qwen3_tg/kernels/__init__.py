"""What each operation of the model becomes on a device, or on one that is not here."""
