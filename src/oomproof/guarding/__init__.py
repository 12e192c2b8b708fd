"""The ladder: what is done when memory runs out under a plan, rung by rung, none of it silent."""
