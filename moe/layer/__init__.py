"""What stands between a router and its experts' results: slots, ranks, kernels, lookahead."""
