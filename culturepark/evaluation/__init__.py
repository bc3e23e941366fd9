"""What a model is worth: figures with floors, intervals and the share of replies that could not be read."""
