"""`data check`: what the loader would see of a data set, and what is wrong with it."""
