"""Changes that leave what a model computes as it is and make it easier to round."""
