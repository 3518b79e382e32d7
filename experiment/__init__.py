"""What train.py and eval.py share: settings, data, checkpoints, training, measuring, results."""
