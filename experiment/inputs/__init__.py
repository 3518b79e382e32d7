"""What comes in: checkpoints, images, networks of others."""
