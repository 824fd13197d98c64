"""What an inversion found, and the certificate that replays it."""
