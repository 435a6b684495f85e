"""Records -> frames -> statistics -> tables. Knows nothing of torch, Hydra or the training code."""
