"""The one training loop: a `Task` says what a step is, the loop does the rest and knows no model."""
