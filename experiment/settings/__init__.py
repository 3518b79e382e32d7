"""What the flags of train.py and eval.py say."""
