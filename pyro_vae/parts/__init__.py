"""Parts: networks, priors, likelihoods and posteriors, each returning a distribution."""
