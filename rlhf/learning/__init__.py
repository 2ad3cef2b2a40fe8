"""From samples and their rewards to new weights: the learner, and the mathematics that it is made of."""
