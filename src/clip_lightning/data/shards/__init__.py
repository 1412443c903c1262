"""Convert captioned images to tars, and train from tars."""
