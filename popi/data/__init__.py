"""Data: users with their signals and the pairs they are tested on."""
