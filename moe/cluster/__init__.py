"""Ray actors that host the experts of one model, and the controller that keeps their requests."""
