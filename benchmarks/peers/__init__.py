"""The programs that are compared: each module trains the same VAE in its own idiom.

    build(pixels, batch_size, seed, **options) -> epoch,    epoch() -> (images, elbo)

`pixels` are uint8 (N, 784) in NumPy. One call of `epoch` trains on all of them once, in a
fresh order and binarised afresh, and returns the number of images it trained on and their
mean ELBO in nats. The network is that of NumPyro's VAE example, 784-400-50 and back, with
softplus and one layer each for the location and the scale; Adam with step size 1e-3.
"""

HIDDEN, LATENT, LEARNING_RATE = 400, 50, 1e-3
