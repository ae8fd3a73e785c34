"""What only the bundled model promises. Delete this folder with `model/sentiment` and `model/training`."""
