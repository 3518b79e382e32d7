"""What comes in: checkpoints, images, your own network."""
